"""Parquet shards read while they are trained on: threads read ahead of the step, others decode."""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

import torch

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.crops import random_window
from ilvr_lightning.data.dataset import Batch, Sample, collate
from ilvr_lightning.data.images import to_tensor
from ilvr_lightning.data.order import Window, WindowedOrder
from ilvr_lightning.data.shards import ParquetSource
from ilvr_lightning.diffusion.noise import derive_seed

MAX_LANES = 32
"""A pass is read in up to so many parts side by side, each of which has a thread and an open file."""

PREFETCH_BATCHES = 2
"""So many micro-batches are decoded while one is trained on."""

Windows = dict[Window, Future[list[bytes | Path]]]
"""The encoded images of windows, or the reading of them."""


def stream_order(shards: ParquetSource, config: DataConfig, seed: int) -> WindowedOrder:
    """The order of a data set's rows; there are never more lanes than row groups, so that two seldom read the same."""
    return WindowedOrder(shards.counts, config.batch_size, min(MAX_LANES, shards.groups), config.shuffle_window, seed)


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
    """

    def __init__(
        self, shards: ParquetSource, order: WindowedOrder, config: DataConfig, shares: Sequence[range],
        position: Callable[[], int], steps: int, threads: int,
    ) -> None:  # fmt: skip
        self.shards, self.order, self.config, self.shares = shards, order, config, shares
        self.position, self.steps, self.threads = position, steps, threads
        self._windows: Windows = {}

    def __len__(self) -> int:
        return self.steps * len(self.shares)

    def __iter__(self) -> Iterator[Batch]:
        first = self.position()
        lanes = sorted({index // self.order.lane_share for share in self.shares for index in share})
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
            stack.callback(pool.shutdown, cancel_futures=True)
            reader = stack.enter_context(closing(_WindowReader(self.shards, self.order, lanes, self._windows)))
            waiting: deque[list[Future[Sample]]] = deque()
            for step in range(first, first + self.steps):
                reader.advance_to(step)
                for share in self.shares:
                    waiting.append([pool.submit(self._decode, *self._served(step, index)) for index in share])
                    if len(waiting) > PREFETCH_BATCHES:
                        yield _batch_of(waiting.popleft())
            while waiting:
                yield _batch_of(waiting.popleft())

    def _served(self, step: int, index: int) -> tuple[Future[list[bytes | Path]], Window, int, int]:
        """What an index of a step's batch is decoded from: the images of a window, which one, and the crop's seed."""
        window, position = self.order.window_at(step, index)
        return self._windows[window], window, position, derive_seed(self.order.seed, "train", step, index)

    def _decode(self, read: Future[list[bytes | Path]], window: Window, position: int, seed: int) -> Sample:
        images = read.result()
        positions = (*range(position, len(images)), *range(position))
        candidates = ((self.order.row(window, other), images[other]) for other in positions)
        pixels, row = self.shards.decode_first(candidates, self.config)
        return to_tensor(random_window(pixels, self.config, seed)), row


def _batch_of(samples: Sequence[Future[Sample]]) -> Batch:
    """The batch that they make, in memory that a GPU copies from if there is one."""
    batch = collate([sample.result() for sample in samples])
    return {name: value.pin_memory() for name, value in batch.items()} if torch.cuda.is_available() else batch


class _WindowReader:
    """Reads the windows of some lanes half a window ahead of the step.

    Windows that are read stay in `windows` when it is closed: the next epoch begins with them.
    """

    def __init__(self, shards: ParquetSource, order: WindowedOrder, lanes: Sequence[int], windows: Windows) -> None:
        self.order, self.windows = order, windows
        self._lanes = {lane: _LaneReader(shards, order) for lane in lanes}
        self._requested_until = 0

    def close(self) -> None:
        """End the threads and close their files."""
        for lane in self._lanes.values():
            lane.closed.set()
        for lane in self._lanes.values():
            lane.close()
        for window, read in list(self.windows.items()):
            if read.cancelled() or read.exception() is not None:
                del self.windows[window]

    def advance_to(self, step: int) -> None:
        """Drop the windows that lie behind a step, and request those that it needs and those that come next."""
        first = {lane: self.order.windows(step, lane)[0] for lane in self._lanes}
        for window in [w for w in self.windows if w < first[w.lane]]:
            del self.windows[window]
        until = step + 1 + math.ceil(self.order.window / 2 / self.order.lane_share)
        for ahead in range(max(step, self._requested_until), until):
            for number, lane in self._lanes.items():
                for window in self.order.windows(ahead, number):
                    if window not in self.windows:
                        self.windows[window] = lane.request(window)
        self._requested_until = until


class _LaneReader:
    """Reads the windows of a lane in order, in a thread of its own, each from where the one before ended."""

    def __init__(self, shards: ParquetSource, order: WindowedOrder) -> None:
        self.shards, self.order = shards, order
        self.closed = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._images: Generator[bytes | Path] | None = None
        self._next: Window | None = None

    def request(self, window: Window) -> Future[list[bytes | Path]]:
        """The images of a window, once the windows before it are read."""
        return self._thread.submit(self._read, window)

    def close(self) -> None:
        """End the thread and close the file that is open."""
        self.closed.set()
        self._thread.shutdown(cancel_futures=True)
        if self._images is not None:
            self._images.close()

    def _read(self, window: Window) -> list[bytes | Path]:
        if self._images is None or window != self._next:
            self._images = self._images_from(window)
        first, end = self.order.span(window)
        images = []
        for image in islice(self._images, end - first):
            if self.closed.is_set():
                raise CancelledError
            images.append(image)
        self._next = window._replace(number=window.number + 1)
        return images

    def _images_from(self, window: Window) -> Generator[bytes | Path]:
        for shard, first, end in self.order.lane_from(window):
            yield from self.shards.read_shard(shard, first, end)
