"""Parquet shards read while they are trained on: which row stands where is arithmetic, and threads read ahead."""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ilvr_lightning.config import DataConfig
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError
from ilvr_lightning.images import BrokenImageError, to_tensor
from ilvr_lightning.shards import Encoded, Shards
from ilvr_lightning.source import fitted_pixels

Sample = tuple[Tensor, int, int]
FURTHER = 64
"""Rows that are tried where a whole window is broken."""
LANES = 32
"""Parts at most that a pass is read in side by side; each keeps a file open."""
READERS = 8
"""Threads that read shards; those that decode are data.num_workers."""
AHEAD = 2
"""Micro-batches that are being decoded while one is trained on."""


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


def stream_order(shards: Shards, config: DataConfig, seed: int) -> StreamOrder:
    """The order of a set's rows; two lanes seldom read of one row group."""
    lanes = min(LANES, sum(map(len, shards.groups)))
    return StreamOrder(shards.counts, config.global_batch, lanes, config.shuffle_window, seed)


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
