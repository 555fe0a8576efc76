"""Parquet shards read while they are trained on: which row stands where is arithmetic, and threads read ahead."""

import glob
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ilvr_lightning.config import DataConfig
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError
from ilvr_lightning.images import BrokenImageError, to_tensor
from ilvr_lightning.source import (
    Rows,
    encoded,
    explain,
    fitted_pixels,
    held_out_rows,
    image_column,
    validation_name,
)

Encoded = bytes | Path
Sample = tuple[Tensor, int, int]
FURTHER = 64
"""Rows that are tried where a whole window is broken."""
LANES = 32
"""Parts at most that a pass is read in side by side; each keeps a file open."""
VALIDATION_ROWS = 1000
"""Rows at most that are validated on; they are read at the start of a run, and stay in memory."""
READERS = 8
"""Threads that read shards; those that decode are data.num_workers."""
AHEAD = 2
"""Micro-batches that are being decoded while one is trained on."""
BUFFER = 2**20
"""Bytes that are read of a column at a time."""
RETRIES = 5
"""Attempts to go on with a remote shard that broke off."""
PAUSE = 1.0
"""Seconds before the first of them; each waits for twice as long."""


class Window(NamedTuple):
    """Rows of a lane that are shuffled among one another; in the order in which a lane reads them."""

    number_of_pass: int
    lane: int
    number: int


class StreamOrder:
    """Which row of the shards stands at each place of each step.

    A pass over N rows puts the shards in an order by (seed, pass). The ring of rows that they make begins at a row by
    (seed, pass), too, and is cut into L equal lanes; a step takes B / L rows of each, so that a batch mixes rows from
    everywhere and every lane is read from its beginning to its end. Within a lane, windows of rows are shuffled by
    (seed, pass, lane, window). N mod B rows are left out, others in each pass.

    Args:
        counts: rows of each shard.
        global_batch: images of one optimizer step, B.
        lanes: at most so many; L is the largest divisor of B that is.
        window: rows that are shuffled among one another, over all lanes.
        seed: the run's.
    """

    def __init__(self, counts: Sequence[int], global_batch: int, lanes: int, window: int, seed: int) -> None:
        self.counts, self.global_batch, self.seed = np.asarray(counts, dtype=np.int64), global_batch, seed
        self.starts = np.cumsum(self.counts) - self.counts
        self.lanes = max(n for n in range(1, min(lanes, global_batch) + 1) if global_batch % n == 0)
        self.share = global_batch // self.lanes
        self.length = int(self.counts.sum()) // self.lanes
        self.window = max(1, min(window // self.lanes, self.length))
        self.steps_per_pass = self.length // self.share
        self._line = lru_cache(4)(self._line_anew)
        self._shuffled = lru_cache(4 * self.lanes)(self._shuffled_anew)

    def batch(self, step: int) -> NDArray[np.int64]:
        """The rows of a global batch (B,), in the order of their places."""
        return np.array([self.row_at(step, place) for place in range(self.global_batch)])

    def row_at(self, step: int, place: int) -> int:
        """A row, as an index into the concatenated shards."""
        window, index = self.window_at(step, place)
        return self.row(window, index)

    def window_at(self, step: int, place: int) -> tuple[Window, int]:
        """The window that a place is served from, and which of its rows is meant, in the order of the ring."""
        number, step = divmod(step, self.steps_per_pass)
        lane, position = place // self.share, step * self.share + place % self.share
        window = Window(number, lane, (position - self._first_end(lane)) // self.window + 1)
        return window, int(self._shuffled(window)[position - self.span(window)[0]])

    def windows(self, step: int, lane: int) -> list[Window]:
        """The windows of a lane that a step is served from."""
        first, last = (self.window_at(step, lane * self.share + i)[0] for i in (0, self.share - 1))
        return [first._replace(number=number) for number in range(first.number, last.number + 1)]

    def span(self, window: Window) -> tuple[int, int]:
        """Its first row and the one after its last, counted from the beginning of its lane."""
        last = self._first_end(window.lane) + window.number * self.window
        return max(0, last - self.window), min(last, self.length)

    def row(self, window: Window, index: int) -> int:
        """A row of a window, as an index into the concatenated shards."""
        ((shard, first, _),) = self._pieces(window, self.span(window)[0] + index, 1)
        return int(self.starts[shard]) + first

    def rest_of_lane(self, window: Window) -> list[tuple[int, int, int]]:
        """(shard, first row, row after the last) that a lane reads from the beginning of a window on."""
        first = self.span(window)[0]
        return list(self._pieces(window, first, self.length - first))

    def _first_end(self, lane: int) -> int:
        """Lanes come to the ends of their windows at different times, so that reading is even."""
        return self.window * (lane + 1) // self.lanes

    def _pieces(self, window: Window, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        order, ends, rotation = self._line(window.number_of_pass)
        row = (window.lane * self.length + first + rotation) % ends[-1]
        while count > 0:
            place = int(np.searchsorted(ends, row, side="right"))
            shard, end = int(order[place]), int(ends[place])
            start, until = end - int(self.counts[shard]), min(row + count, end)
            yield shard, int(row - start), int(until - start)
            count -= until - row
            row = until % ends[-1]

    def _line_anew(self, number_of_pass: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The shards in the order of a pass, where each ends, and which row of them comes first."""
        random = np.random.default_rng(derive_seed(self.seed, "shards", number_of_pass))
        order = random.permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        return order, ends, int(random.integers(ends[-1]))

    def _shuffled_anew(self, window: Window) -> NDArray[np.int64]:
        first, last = self.span(window)
        return np.random.default_rng(derive_seed(self.seed, "window", *window)).permutation(last - first)


def stream_order(shards: "Shards", config: DataConfig, seed: int) -> StreamOrder:
    """The order of a set's rows; two lanes seldom read of one row group."""
    lanes = min(LANES, sum(map(len, shards.groups)))
    return StreamOrder(shards.counts, config.global_batch, lanes, config.shuffle_window, seed)


class EncodedRows:
    """A few rows in memory, encoded."""

    fingerprint: str | None = None

    def __init__(self, values: Sequence[Encoded], numbers: Sequence[int], name: str) -> None:
        self.values, self.numbers, self.name = values, numbers, name

    def __len__(self) -> int:
        return len(self.values)

    def number(self, row: int) -> int:
        """Of the row in its split."""
        return self.numbers[row]

    def image_bytes(self, row: int) -> Encoded:
        """The encoded image, or the file that holds it."""
        return self.values[row]

    def select(self, rows: Sequence[int]) -> "EncodedRows":
        """Some of the rows, in the order given."""
        return EncodedRows([self.values[row] for row in rows], [self.numbers[row] for row in rows], self.name)


class Shards:
    """The image column of Parquet files, as one split whose rows are counted through them in the order given.

    Args:
        files: paths, or what fsspec opens (hf://...).
        groups: rows of each row group of each file.
        count: so many rows are used, from the first on.
        column: of the images.
        name: of the split.
    """

    fingerprint: str | None = None

    def __init__(self, files: Sequence[str], groups: Sequence[Sequence[int]], count: int, column: str, name: str):
        self.files, self.groups, self.column, self.name = files, groups, column, name
        sizes = np.array([sum(group) for group in groups], dtype=np.int64)
        self.starts = np.cumsum(sizes) - sizes
        self.counts: list[int] = np.clip(count - self.starts, 0, sizes).tolist()

    def __len__(self) -> int:
        return sum(self.counts)

    def number(self, row: int) -> int:
        """Of the row in its split: rows are held out at its end."""
        return row

    def image_bytes(self, row: int) -> Encoded:
        """The encoded image, or the file that holds it; its row group is read for it alone."""
        return next(self._span(row, row + 1))

    def select(self, rows: Sequence[int]) -> EncodedRows:
        """Some of the rows, in the order given, read into memory."""
        values: list[Encoded] = []
        chosen = np.asarray(rows, dtype=np.int64)
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            values += self._span(int(run[0]), int(run[-1]) + 1) if len(run) else ()
        return EncodedRows(values, chosen.tolist(), self.name)

    def head(self, count: int) -> "Shards":
        """The first rows."""
        return Shards(self.files, self.groups, count, self.column, self.name)

    def _span(self, first: int, last: int) -> Iterator[Encoded]:
        for shard, (start, count) in enumerate(zip(self.starts.tolist(), self.counts, strict=True)):
            if max(first, start) < min(last, start + count):
                yield from self.read(shard, max(first, start) - start, min(last, start + count) - start)

    def read(
        self, shard: int, first: int, last: int, pause: Callable[[float], object] | None = None
    ) -> Iterator[Encoded]:
        """Rows of a shard in order; a remote one that breaks off is opened again.

        Args:
            shard: which.
            first: the first row.
            last: the row after the last.
            pause: waits for so many seconds.

        Raises:
            UserError: it cannot be read.
        """
        file, attempt = self.files[shard], 0
        while first < last:
            try:
                for value in self._read_once(shard, first, last):
                    yield value
                    first, attempt = first + 1, 0
                if first < last:
                    raise UserError(f"{file} holds fewer rows than when the run began")
            except UserError:
                raise
            except Exception as error:  # of the network, the Hub, Arrow
                attempt += 1
                if "://" not in file or attempt > RETRIES:
                    raise UserError(f"{file} cannot be read: {_first_line(error)}") from error
                (pause or time.sleep)(PAUSE * 2 ** (attempt - 1))

    def _read_once(self, shard: int, first: int, last: int) -> Iterator[Encoded]:
        with _opened(self.files[shard]) as parquet:
            begin = 0
            for group, count in enumerate(self.groups[shard]):
                row, begin = begin, begin + count
                if begin <= first or row >= last:
                    continue
                for batch in parquet.iter_batches(16, row_groups=[group], columns=[self.column], use_threads=False):
                    start, stop = max(first - row, 0), min(last - row, len(batch))
                    if start < stop:
                        yield from map(encoded, batch.column(0)[start:stop].to_pylist())
                    row += len(batch)


def open_shards(config: DataConfig) -> tuple[Shards, Rows]:
    """The training and the validation rows: the first of a validation split, or the last of the only one, in memory.

    Raises:
        UserError: the data set cannot be had, is no Parquet, has no such split or column, or too few images.
    """
    try:
        splits = _files(config)
        name = validation_name(splits, config)
        train = _shards(splits[config.split], config, config.split)
        if name is not None:
            validation = _shards(splits[name], config, name)
            return train, validation.select(range(min(VALIDATION_ROWS, len(validation))))
        kept = len(train) - min(VALIDATION_ROWS, held_out_rows(len(train), config))
        return train.head(kept), train.select(range(kept, len(train)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(config.path, error)) from error


def _files(config: DataConfig) -> dict[str, list[str]]:
    """The shards of every split, sorted."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said in one line
    path = Path(config.path).expanduser()
    if "://" in config.path:
        found: Any = datasets.load_dataset_builder("parquet", data_files=config.path).config.data_files
    elif glob.has_magic(config.path) or path.is_file():
        found = {"train": glob.glob(str(path), recursive=True)}
    elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        found = {}
    elif path.is_dir():
        found = datasets.load_dataset_builder(str(path), config.name).config.data_files
    elif config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or path.suffix == ".parquet":
        raise UserError(f"data.path={config.path}: there is no such folder or file")
    else:
        found = datasets.load_dataset_builder(config.path, config.name).config.data_files
    splits = {str(split): sorted(map(str, files)) for split, files in (found or {}).items() if files}
    if splits and all(file.endswith(".parquet") for files in splits.values() for file in files):
        return splits
    if path.exists() or glob.has_magic(config.path):
        advice = "leave out data.streaming: what is on this disk is read from where it lies"
    else:
        conversion = (
            f"hf://datasets/{config.path}@refs/convert/parquet/{config.name or 'default'}/{config.split}/*.parquet"
        )
        advice = f"the Hub converts most data sets, of large ones the beginning: try 'data.path={conversion}'"
    raise UserError(f"data.path={config.path} is no Parquet, which data.streaming=true reads; {advice}")


def _shards(files: Sequence[str], config: DataConfig, split: str) -> Shards:
    """The files with their numbers of rows, of which their footers tell."""
    import datasets

    with ThreadPoolExecutor(min(32, max(1, len(files)))) as pool:
        footers = list(pool.map(_footer, files))
    columns = []
    for file, (_, schema) in zip(files, footers, strict=True):
        features = {
            name: datasets.Image() if isinstance(feature, dict) and "bytes" in feature else feature
            for name, feature in datasets.Features.from_arrow_schema(schema).items()
        }
        columns.append(image_column(features, config))
        if columns[-1] != columns[0]:
            raise UserError(
                f"data.image_column must be given: it is {columns[0]} in {files[0]}, {columns[-1]} in {file}"
            )
    groups = [groups for groups, _ in footers]
    return Shards(files, groups, sum(map(sum, groups)), columns[0], f"{Path(config.path).name}/{split}")


def _footer(file: str) -> tuple[list[int], Any]:
    """Rows of each row group, and the schema."""
    import pyarrow as pa

    try:
        with _opened(file) as parquet:
            metadata = parquet.metadata
            return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], parquet.schema_arrow
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is no readable Parquet file: {_first_line(error)}") from error


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A ParquetFile; pages are read as they are needed, rather than whole row groups."""
    import fsspec  # type: ignore[import-untyped]
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        source = stack.enter_context(fsspec.open(file, "rb")) if "://" in file else file
        yield stack.enter_context(pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class StreamBatches:
    """This rank's share of each global batch; a sample is (image (C, H, W) in [-1, 1], row, broken row or -1).

    A broken row gives the next good one of its window in its place. Iteration starts at the step that `position` tells;
    its threads end with it.

    Args:
        shards: the rows.
        order: which of them stands where.
        config: how they are decoded.
        parts: micro-batches that make up a global batch (devices x nodes x accumulation).
        rank: of this process.
        world: number of processes.
        position: optimizer steps done so far.
        steps: of an epoch.
        threads: that decode.
        collate: makes a batch of samples.
    """

    def __init__(
        self, shards: Shards, order: StreamOrder, config: DataConfig, parts: int, rank: int, world: int,
        position: Callable[[], int], steps: int, threads: int, collate: Callable[[list[Sample]], dict[str, Tensor]],
    ) -> None:  # fmt: skip
        self.collate = collate
        self.shards, self.order, self.config = shards, order, config
        self.position, self.steps, self.threads = position, steps, threads
        share = order.global_batch // parts
        self.places = [range(part * share, (part + 1) * share) for part in range(rank, parts, world)]
        self._read: dict[Window, Future[list[Encoded]]] = {}

    def __len__(self) -> int:
        return self.steps * len(self.places)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first = self.position()
        lanes = sorted({place // self.order.share for places in self.places for place in places})
        with _pool(self.threads, "decode") as pool, _Reading(self.shards, self.order, lanes, self._read) as reading:
            waiting: deque[list[Future[Sample]]] = deque()
            for step in range(first, first + self.steps):
                reading.go_on_to(step)
                for places in self.places:
                    served = [self.order.window_at(step, place) for place in places]
                    waiting.append([pool.submit(self._decode, reading.encoded(w), w, index) for w, index in served])
                    if len(waiting) > AHEAD:
                        yield self.collate([image.result() for image in waiting.popleft()])
            while waiting:
                yield self.collate([image.result() for image in waiting.popleft()])

    def _decode(self, read: Future[list[Encoded]], window: Window, index: int) -> Sample:
        wanted = self.order.row(window, index)
        for row, source in self._candidates(read.result(), window, index):
            try:
                pixels = fitted_pixels(self.shards, row, source, self.config)
            except BrokenImageError:
                if self.config.on_broken == "stop":
                    raise
                continue
            return to_tensor(pixels), row, wanted if row != wanted else -1
        raise UserError(f"data.path={self.config.path}: no image around row {wanted} can be read")

    def _candidates(self, read: list[Encoded], window: Window, index: int) -> Iterator[tuple[int, Encoded]]:
        """A row of a window, then the others, then those that follow in the shards."""
        for i in (*range(index, len(read)), *range(index)):
            yield self.order.row(window, i), read[i]
        last = self.order.row(window, len(read) - 1)
        for row in range(last + 1, last + 1 + FURTHER):
            yield row % len(self.shards), self.shards.image_bytes(row % len(self.shards))


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what is not begun at the end."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Reading:
    """The windows of some lanes, read half a window ahead of the step; those that are read outlive it in `kept`."""

    def __init__(
        self, shards: Shards, order: StreamOrder, lanes: Sequence[int], kept: dict[Window, Future[list[Encoded]]]
    ) -> None:
        self.order, self.kept = order, kept
        self._closed = threading.Event()
        self._lanes = {lane: _Lane(shards, order, self._closed) for lane in lanes}
        self._windows: dict[Window, Future[list[Encoded]]] = {}
        self._last: dict[int, Future[list[Encoded]]] = {}
        self._asked_to = 0
        self._stack = ExitStack()

    def __enter__(self) -> "_Reading":
        self._windows = dict(self.kept)
        self.kept.clear()
        self._pool = self._stack.enter_context(_pool(min(READERS, len(self._lanes)), "read"))
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._stack.close()
        for lane in self._lanes.values():
            lane.close()
        for window, read in self._windows.items():
            if read.done() and not read.cancelled() and read.exception() is None:
                self.kept[window] = read

    def encoded(self, window: Window) -> Future[list[Encoded]]:
        """The images of a window, of the step that was gone on to."""
        return self._windows[window]

    def go_on_to(self, step: int) -> None:
        """Drop what lies behind a step, and ask for what it needs and for what comes next."""
        first = {lane: self.order.windows(step, lane)[0] for lane in self._lanes}
        self._windows = {w: read for w, read in self._windows.items() if w.lane in first and w >= first[w.lane]}
        until = step + 1 + math.ceil(self.order.window / 2 / self.order.share)
        for ahead in range(max(step, self._asked_to), until):
            for lane in self._lanes:
                for window in self.order.windows(ahead, lane):
                    if window not in self._windows:
                        read = self._pool.submit(self._lanes[lane].read, window, self._last.get(lane))
                        self._windows[window] = self._last[lane] = read
        self._asked_to = until


class _Lane:
    """Reads the windows of a lane in order, each from where the one before ended."""

    def __init__(self, shards: Shards, order: StreamOrder, closed: threading.Event) -> None:
        self.shards, self.order, self.closed = shards, order, closed
        self._rows: Generator[Encoded] | None = None
        self._next: Window | None = None

    def read(self, window: Window, before: Future[list[Encoded]] | None) -> list[Encoded]:
        """A window's images, once the window before it is read."""
        if before is not None:
            before.exception()
        if self._rows is None or window != self._next:
            self.close()
            self._rows = self._from(window)
        first, last = self.order.span(window)
        images = []
        for image in islice(self._rows, last - first):
            if self.closed.is_set():
                raise CancelledError
            images.append(image)
        self._next = window._replace(number=window.number + 1)
        return images

    def _from(self, window: Window) -> Generator[Encoded]:
        for shard, first, last in self.order.rest_of_lane(window):
            yield from self.shards.read(shard, first, last, self.closed.wait)

    def close(self) -> None:
        """Close the file that is open."""
        if self._rows is not None:
            self._rows.close()
