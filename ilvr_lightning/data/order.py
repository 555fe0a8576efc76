"""Which image stands where: arithmetic alone, from the seed and the number of the optimizer step.

Every training step has a global batch of B images, and this module says which image stands at which index of which
step's batch. The answer follows from (seed, step) and from nothing else: no random generator is kept from step to step,
no iterator has a state, and nobody asks how many devices there are. Three things follow:

- A resumed run needs no saved position but the number of its step, in the middle of an epoch as well as at its end.
- A rank computes some indices of the global batch (`rank_share`), and all ranks together compute all of them. Another
  number of devices, or another number of accumulated micro-batches, divides the same batch otherwise.
- Noise, timesteps and flips are drawn per (seed, step, index) in the same way, so that the training itself is the same.

`ShuffledOrder` is for data whose images can be read in any order, `WindowedOrder` for shards that are read from their
beginning to their end.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError


def rank_share(batch_size: int, micro_batches: int, rank: int, world_size: int) -> list[range]:
    """The indices of a global batch that a rank computes, as one range per micro-batch.

    Args:
        batch_size: images of the global batch, a multiple of micro_batches.
        micro_batches: parts of the global batch: devices x nodes x accumulation.
        rank: of this process, from 0.
        world_size: number of processes.
    """
    size = batch_size // micro_batches
    return [range(part * size, (part + 1) * size) for part in range(rank, micro_batches, world_size)]


def _check_batch_size(batch_size: int, length: int) -> None:
    if batch_size > length:
        raise UserError(f"data.batch_size must be at most the number of training images, {length}: got {batch_size}")


class ShuffledOrder:
    """Passes over all rows, each a new permutation by (seed, number of the pass).

    The last rows of a permutation that do not fill a batch are left out: N mod B of N, others in each pass.

    Args:
        length: rows of the data set, N.
        batch_size: images of one optimizer step, B.
        seed: the run's.

    Raises:
        UserError: the batch is larger than the data set.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        _check_batch_size(batch_size, length)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps_per_pass = length // batch_size
        self._permutation = lru_cache(1)(self._permute)

    def batch(self, step: int) -> NDArray[np.int64]:
        """The rows (B,) of a step's global batch, by their indices in it."""
        pass_number, step = divmod(step, self.steps_per_pass)
        return self._permutation(pass_number)[step * self.batch_size :][: self.batch_size]

    def _permute(self, pass_number: int) -> NDArray[np.int64]:
        return np.random.default_rng(derive_seed(self.seed, "order", pass_number)).permutation(self.length)


class Window(NamedTuple):
    """Rows of a lane that are shuffled among one another; in the order in which a lane reads them."""

    pass_number: int
    lane: int
    number: int


class WindowedOrder:
    """Passes over shards that are read sequentially, shuffled within windows.

    In each pass the shards are put in an order by (seed, pass). The ring of rows that they form begins at a row by
    (seed, pass), too, and is cut into L equal lanes. A step takes B / L rows of each lane, so that a batch mixes rows
    from everywhere while every lane is read from its beginning to its end. Within a lane, windows of rows are shuffled
    by (seed, pass, lane, window). Rows that do not fill a batch are left out, others in each pass.

    Args:
        counts: rows of each shard.
        batch_size: images of one optimizer step, B.
        max_lanes: L is the largest divisor of B up to this number.
        window: rows that are shuffled among one another, over all lanes.
        seed: the run's.

    Raises:
        UserError: the batch is larger than the data set.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, max_lanes: int, window: int, seed: int) -> None:
        _check_batch_size(batch_size, sum(counts))
        self.counts, self.batch_size, self.seed = np.asarray(counts, dtype=np.int64), batch_size, seed
        self.starts = np.cumsum(self.counts) - self.counts
        self.lanes = max(n for n in range(1, min(max_lanes, batch_size) + 1) if batch_size % n == 0)
        self.lane_share = batch_size // self.lanes
        """Rows that a step takes of each lane."""
        self.lane_length = int(self.counts.sum()) // self.lanes
        self.window = max(1, min(window // self.lanes, self.lane_length))
        """Rows of each lane that are shuffled among one another."""
        self.steps_per_pass = self.lane_length // self.lane_share
        self._ring = lru_cache(4)(self._shard_order)
        self._shuffled = lru_cache(4 * self.lanes)(self._window_permutation)

    def batch(self, step: int) -> NDArray[np.int64]:
        """The rows (B,) of a step's global batch, by their indices in it; rows are counted through all shards."""
        return np.array([self.row(*self.window_at(step, index)) for index in range(self.batch_size)])

    def window_at(self, step: int, index: int) -> tuple[Window, int]:
        """The window that an index of a step's batch is served from, and the position of its row in that window."""
        pass_number, step = divmod(step, self.steps_per_pass)
        lane, position = index // self.lane_share, step * self.lane_share + index % self.lane_share
        window = Window(pass_number, lane, (position - self._first_end(lane)) // self.window + 1)
        return window, int(self._shuffled(window)[position - self.span(window)[0]])

    def windows(self, step: int, lane: int) -> list[Window]:
        """The windows of a lane that a step is served from."""
        first, last = (self.window_at(step, lane * self.lane_share + i)[0] for i in (0, self.lane_share - 1))
        return [first._replace(number=number) for number in range(first.number, last.number + 1)]

    def span(self, window: Window) -> tuple[int, int]:
        """The first row of a window and the one after its last, counted from the beginning of its lane."""
        end = self._first_end(window.lane) + window.number * self.window
        return max(0, end - self.window), min(end, self.lane_length)

    def row(self, window: Window, position: int) -> int:
        """The row at a position of a window, counted through all shards."""
        ((shard, first, _),) = self._pieces(window, self.span(window)[0] + position, 1)
        return int(self.starts[shard]) + first

    def lane_from(self, window: Window) -> list[tuple[int, int, int]]:
        """(shard, first row, row after the last) of all that a lane reads from the beginning of a window on."""
        first = self.span(window)[0]
        return list(self._pieces(window, first, self.lane_length - first))

    def _first_end(self, lane: int) -> int:
        """Where the first window of a lane ends: lanes are read evenly if they differ in it."""
        return self.window * (lane + 1) // self.lanes

    def _pieces(self, window: Window, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The parts of shards that so many rows of a window's lane are, from a row of the lane on."""
        order, ends, rotation = self._ring(window.pass_number)
        row = (window.lane * self.lane_length + first + rotation) % ends[-1]
        while count > 0:
            place = int(np.searchsorted(ends, row, side="right"))
            shard, end = int(order[place]), int(ends[place])
            start, until = end - int(self.counts[shard]), min(row + count, end)
            yield shard, int(row - start), int(until - start)
            count -= until - row
            row = until % ends[-1]

    def _shard_order(self, pass_number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The shards in the order of a pass, where each of them ends, and which row of the ring comes first."""
        random = np.random.default_rng(derive_seed(self.seed, "shards", pass_number))
        order = random.permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        return order, ends, int(random.integers(ends[-1]))

    def _window_permutation(self, window: Window) -> NDArray[np.int64]:
        first, end = self.span(window)
        return np.random.default_rng(derive_seed(self.seed, "window", *window)).permutation(end - first)
