"""Parquet shards read while they are trained on: threads read ahead of the step, others decode."""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.dataset import Batch, Sample
from ilvr_lightning.data.image_source import Encoded, decode_image_at
from ilvr_lightning.data.images import BrokenImageError, to_tensor
from ilvr_lightning.data.order import Window, WindowedOrder
from ilvr_lightning.data.shards import ParquetSource
from ilvr_lightning.errors import UserError

MAX_REPLACEMENT_ROWS = 64
"""Where all rows of a window are broken, up to so many rows that follow it are tried."""

MAX_LANES = 32
"""A pass is read in up to so many parts side by side, each of which keeps a file open."""

READER_THREADS = 8
"""Up to so many threads read shards; those that decode are data.num_workers."""

PREFETCH_BATCHES = 2
"""So many micro-batches are decoded while one is trained on."""


def stream_order(shards: ParquetSource, config: DataConfig, seed: int) -> WindowedOrder:
    """The order of a data set's rows; there are never more lanes than row groups, so that two seldom read the same."""
    lanes = min(MAX_LANES, sum(map(len, shards.group_sizes)))
    return WindowedOrder(shards.counts, config.batch_size, lanes, config.shuffle_window, seed)


class StreamBatches:
    """The micro-batches of this rank.

    A broken row is replaced by the next good one of its window. An iteration starts at the step that `position` gives,
    and its threads end with it.

    Args:
        shards: the rows.
        order: which row stands at which index of which step's batch.
        config: how rows are decoded.
        shares: the indices of each global batch that this rank computes, one range per micro-batch.
        position: the number of optimizer steps done so far.
        steps: optimizer steps of an epoch.
        threads: number of threads that decode.
        collate: makes a batch of samples.
    """

    def __init__(
        self, shards: ParquetSource, order: WindowedOrder, config: DataConfig, shares: Sequence[range],
        position: Callable[[], int], steps: int, threads: int, collate: Callable[[list[Sample]], Batch],
    ) -> None:  # fmt: skip
        self.shards, self.order, self.config, self.shares = shards, order, config, shares
        self.position, self.steps, self.threads, self.collate = position, steps, threads, collate
        self._kept: dict[Window, Future[list[Encoded]]] = {}

    def __len__(self) -> int:
        return self.steps * len(self.shares)

    def __iter__(self) -> Iterator[Batch]:
        first = self.position()
        lanes = sorted({index // self.order.lane_share for share in self.shares for index in share})
        prefetching = closing(_Prefetcher(self.shards, self.order, lanes, self._kept))
        with _decoding_threads(self.threads) as pool, prefetching as prefetcher:
            waiting: deque[list[Future[Sample]]] = deque()
            for step in range(first, first + self.steps):
                prefetcher.advance_to(step)
                for share in self.shares:
                    served = [self.order.window_at(step, index) for index in share]
                    waiting.append([pool.submit(self._decode, prefetcher.images(w), w, at) for w, at in served])
                    if len(waiting) > PREFETCH_BATCHES:
                        yield self.collate([sample.result() for sample in waiting.popleft()])
            while waiting:
                yield self.collate([sample.result() for sample in waiting.popleft()])

    def _decode(self, images: Future[list[Encoded]], window: Window, position: int) -> Sample:
        wanted = self.order.row(window, position)
        for row, image in self._candidates(images.result(), window, position):
            try:
                pixels = decode_image_at(self.shards, row, image, self.config)
            except BrokenImageError:
                if self.config.on_broken == "stop":
                    raise
                continue
            return to_tensor(pixels), row, wanted if row != wanted else -1
        raise UserError(f"data.path={self.config.path}: no image around row {wanted} can be read")

    def _candidates(self, images: list[Encoded], window: Window, position: int) -> Iterator[tuple[int, Encoded]]:
        """A row of a window, then the window's other rows, then those that follow in the shards."""
        for other in (*range(position, len(images)), *range(position)):
            yield self.order.row(window, other), images[other]
        last = self.order.row(window, len(images) - 1)
        for row in range(last + 1, last + 1 + MAX_REPLACEMENT_ROWS):
            yield row % len(self.shards), self.shards.image_bytes(row % len(self.shards))


@contextmanager
def _decoding_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop at the end what has not begun."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Prefetcher:
    """Reads the windows of some lanes half a window ahead of the step.

    Windows that are read stay in `kept` once it is closed: the next epoch begins with them.
    """

    def __init__(
        self, shards: ParquetSource, order: WindowedOrder, lanes: Sequence[int],
        kept: dict[Window, Future[list[Encoded]]],
    ) -> None:  # fmt: skip
        self.order, self.kept = order, kept
        self._windows = dict(kept)
        kept.clear()
        self._closed = threading.Event()
        self._lanes = {lane: _LaneReader(shards, order, self._closed) for lane in lanes}
        self._last: dict[int, Future[list[Encoded]]] = {}
        self._requested_until = 0
        self._pool = ThreadPoolExecutor(min(READER_THREADS, len(lanes)), thread_name_prefix="read")

    def close(self) -> None:
        """End the threads and close their files."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        for lane in self._lanes.values():
            lane.close()
        for window, read in self._windows.items():
            if read.done() and not read.cancelled() and read.exception() is None:
                self.kept[window] = read

    def images(self, window: Window) -> Future[list[Encoded]]:
        """The encoded images of a window that the current step is served from."""
        return self._windows[window]

    def advance_to(self, step: int) -> None:
        """Drop the windows that lie behind a step, and request those that it needs and those that come next."""
        first = {lane: self.order.windows(step, lane)[0] for lane in self._lanes}
        self._windows = {w: read for w, read in self._windows.items() if w.lane in first and w >= first[w.lane]}
        until = step + 1 + math.ceil(self.order.window / 2 / self.order.lane_share)
        for ahead in range(max(step, self._requested_until), until):
            for lane in self._lanes:
                for window in self.order.windows(ahead, lane):
                    if window not in self._windows:
                        read = self._pool.submit(self._lanes[lane].read, window, self._last.get(lane))
                        self._windows[window] = self._last[lane] = read
        self._requested_until = until


class _LaneReader:
    """Reads the windows of a lane in order, each from where the one before ended."""

    def __init__(self, shards: ParquetSource, order: WindowedOrder, closed: threading.Event) -> None:
        self.shards, self.order, self.closed = shards, order, closed
        self._images: Generator[Encoded] | None = None
        self._next: Window | None = None

    def read(self, window: Window, before: Future[list[Encoded]] | None) -> list[Encoded]:
        """The images of a window, once the window before it is read."""
        if before is not None:
            before.exception()
        if self._images is None or window != self._next:
            self.close()
            self._images = self._images_from(window)
        first, end = self.order.span(window)
        images = []
        for image in islice(self._images, end - first):
            if self.closed.is_set():
                raise CancelledError
            images.append(image)
        self._next = window._replace(number=window.number + 1)
        return images

    def _images_from(self, window: Window) -> Generator[Encoded]:
        for shard, first, end in self.order.lane_from(window):
            yield from self.shards.read_shard(shard, first, end, self.closed.wait)

    def close(self) -> None:
        """Close the file that is open."""
        if self._images is not None:
            self._images.close()
