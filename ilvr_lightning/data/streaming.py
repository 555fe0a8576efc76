"""Parquet shards read while they are trained on: which row stands where is arithmetic, and threads read ahead."""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice

from torch import Tensor

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.images import BrokenImageError, to_tensor
from ilvr_lightning.data.order import Window, WindowedOrder
from ilvr_lightning.data.shards import Encoded, ParquetSource
from ilvr_lightning.data.sources import decode_image_at
from ilvr_lightning.errors import UserError

Sample = tuple[Tensor, int, int]


MAX_REPLACEMENT_ROWS = 64
"""Rows that are tried where a whole window is broken."""


MAX_LANES = 32
"""Parts at most that a pass is read in side by side; each keeps a file open."""


READER_THREADS = 8
"""Threads that read shards; those that decode are data.num_workers."""


PREFETCH_BATCHES = 2
"""Micro-batches that are being decoded while one is trained on."""


def stream_order(shards: ParquetSource, config: DataConfig, seed: int) -> WindowedOrder:
    """The order of a set's rows; two lanes seldom read of one row group."""
    lanes = min(MAX_LANES, sum(map(len, shards.groups)))
    return WindowedOrder(shards.counts, config.batch_size, lanes, config.shuffle_window, seed)


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
        self, shards: ParquetSource, order: WindowedOrder, config: DataConfig, parts: int, rank: int, world: int,
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
        with _pool(self.threads, "decode") as pool, _Prefetcher(self.shards, self.order, lanes, self._read) as reading:
            waiting: deque[list[Future[Sample]]] = deque()
            for step in range(first, first + self.steps):
                reading.advance_to(step)
                for places in self.places:
                    served = [self.order.window_at(step, place) for place in places]
                    waiting.append([pool.submit(self._decode, reading.encoded(w), w, index) for w, index in served])
                    if len(waiting) > PREFETCH_BATCHES:
                        yield self.collate([image.result() for image in waiting.popleft()])
            while waiting:
                yield self.collate([image.result() for image in waiting.popleft()])

    def _decode(self, read: Future[list[Encoded]], window: Window, index: int) -> Sample:
        wanted = self.order.row(window, index)
        for row, source in self._candidates(read.result(), window, index):
            try:
                pixels = decode_image_at(self.shards, row, source, self.config)
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
        for row in range(last + 1, last + 1 + MAX_REPLACEMENT_ROWS):
            yield row % len(self.shards), self.shards.image_bytes(row % len(self.shards))


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what is not begun at the end."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Prefetcher:
    """The windows of some lanes, read half a window ahead of the step; those that are read outlive it in `kept`."""

    def __init__(
        self,
        shards: ParquetSource,
        order: WindowedOrder,
        lanes: Sequence[int],
        kept: dict[Window, Future[list[Encoded]]],
    ) -> None:
        self.order, self.kept = order, kept
        self._closed = threading.Event()
        self._lanes = {lane: _LaneReader(shards, order, self._closed) for lane in lanes}
        self._windows: dict[Window, Future[list[Encoded]]] = {}
        self._last: dict[int, Future[list[Encoded]]] = {}
        self._asked_to = 0
        self._stack = ExitStack()

    def __enter__(self) -> "_Prefetcher":
        self._windows = dict(self.kept)
        self.kept.clear()
        self._pool = self._stack.enter_context(_pool(min(READER_THREADS, len(self._lanes)), "read"))
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

    def advance_to(self, step: int) -> None:
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


class _LaneReader:
    """Reads the windows of a lane in order, each from where the one before ended."""

    def __init__(self, shards: ParquetSource, order: WindowedOrder, closed: threading.Event) -> None:
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
        for shard, first, last in self.order.lane_from(window):
            yield from self.shards.read(shard, first, last, self.closed.wait)

    def close(self) -> None:
        """Close the file that is open."""
        if self._rows is not None:
            self._rows.close()
