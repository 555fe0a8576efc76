"""Parquet shards read while they are trained on: which row stands where is arithmetic, and threads read ahead."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError


class Window(NamedTuple):
    """Rows of a lane that are shuffled among one another; in the order in which a lane reads them."""

    number_of_pass: int
    lane: int
    number: int


class WindowedOrder:
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
        self._line = lru_cache(4)(self._shard_order)
        self._shuffled = lru_cache(4 * self.lanes)(self._window_permutation)

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

    def lane_from(self, window: Window) -> list[tuple[int, int, int]]:
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

    def _shard_order(self, number_of_pass: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The shards in the order of a pass, where each ends, and which row of them comes first."""
        random = np.random.default_rng(derive_seed(self.seed, "shards", number_of_pass))
        order = random.permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        return order, ends, int(random.integers(ends[-1]))

    def _window_permutation(self, window: Window) -> NDArray[np.int64]:
        first, last = self.span(window)
        return np.random.default_rng(derive_seed(self.seed, "window", *window)).permutation(last - first)


class TrainBatchSampler(Sampler[list[int]]):
    """This rank's share of each global batch; the order follows from (seed, epoch), the place from the step alone.

    So another number of devices or a resumed run changes nothing: iteration starts at the step that `position` tells.

    Args:
        length: images of the set.
        global_batch: images of one optimizer step.
        parts: micro-batches that make up a global batch (devices x nodes x accumulation).
        rank: of this process.
        world: number of processes.
        seed: the run's.
        position: optimizer steps done so far.
        steps_per_epoch: unless all images are an epoch.
    """

    def __init__(
        self, length: int, global_batch: int, parts: int, rank: int, world: int, seed: int, position: Callable[[], int],
        steps_per_epoch: int | None = None,
    ) -> None:  # fmt: skip
        if global_batch > length:
            raise UserError(_too_large(global_batch, length))
        self.length, self.global_batch = length, global_batch
        self.parts, self.rank, self.world = parts, rank, world
        self.seed, self.position = seed, position
        self.steps_per_pass = length // global_batch
        self.steps_per_epoch = steps_per_epoch or self.steps_per_pass
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.steps_per_epoch * (self.parts // self.world)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.position()
        share = self.global_batch // self.parts
        for step in range(first, first + self.steps_per_epoch):
            batch = self.batch(step)
            for part in range(self.rank, self.parts, self.world):
                yield batch[part * share : (part + 1) * share].tolist()

    def batch(self, step: int) -> NDArray[np.int64]:
        """The images of a global batch (B,), in the order of their places."""
        number, step = divmod(step, self.steps_per_pass)
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng(derive_seed(self.seed, "order", number)).permutation(self.length)
        return self._order[step * self.global_batch :][: self.global_batch]


def _too_large(global_batch: int, length: int) -> str:
    return f"data.batch_size must be at most the number of training images, {length}: got {global_batch}"


class ValidationSampler(Sampler[int]):
    """Every world-th image; shares are filled up to equal length by negative indices, which count for nothing."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        padded = -(-length // world) * world
        self.indices = [i if i < length else -(i % length) - 1 for i in range(rank, padded, world)]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
