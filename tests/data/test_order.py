"""Which row stands at which index of which step's batch, for any number of ranks and after any resume."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilvr_lightning.data.order import ShuffledOrder, WindowedOrder, rank_share
from ilvr_lightning.errors import UserError
from tests.support.image_sets import SIZES


@given(size=st.integers(1, 5), world_size=st.integers(1, 6), accumulation=st.integers(1, 4))
def test_ranks_share_a_batch(size: int, world_size: int, accumulation: int) -> None:
    """Micro-batch m of rank r holds the indices from (m * world_size + r) * size on, as the module's seeds assume."""
    micro_batches = world_size * accumulation
    shares = [rank_share(size * micro_batches, micro_batches, rank, world_size) for rank in range(world_size)]
    joined = [index for m in range(accumulation) for rank in shares for index in rank[m]]
    assert joined == list(range(size * micro_batches))
    assert {len(share) for share in shares} == {accumulation}


# Any order


def test_passes_are_permutations() -> None:
    order = ShuffledOrder(22, 4, seed=3)
    passes = [np.concatenate([order.batch(5 * number + step) for step in range(5)]).tolist() for number in range(3)]
    for rows in passes:
        assert len(set(rows)) == len(rows) == 20
        assert set(rows) <= set(range(22))
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_batch_follows_from_its_step_alone() -> None:
    forwards, backwards = ShuffledOrder(22, 4, seed=3), ShuffledOrder(22, 4, seed=3)
    steps = {step: forwards.batch(step).tolist() for step in range(13)}
    assert {step: backwards.batch(step).tolist() for step in reversed(range(13))} == steps


def test_known_order() -> None:
    """A checkpoint of an earlier version must see the same rows when it is resumed."""
    shuffled, windowed = ShuffledOrder(22, 4, seed=3), WindowedOrder(SIZES, 6, 3, 12, seed=3)
    assert [shuffled.batch(step).tolist() for step in (0, 7)] == [[6, 20, 4, 19], [3, 20, 19, 15]]
    assert [windowed.batch(step).tolist() for step in (0, 40)] == [[28, 32, 44, 45, 19, 7], [9, 10, 3, 4, 35, 33]]


@pytest.mark.parametrize("kind", ["shuffled", "windowed"])
def test_seed_matters(kind: str) -> None:
    orders = [
        ShuffledOrder(50, 6, seed) if kind == "shuffled" else WindowedOrder(SIZES, 6, 6, 12, seed) for seed in (0, 1)
    ]
    assert orders[0].batch(0).tolist() != orders[1].batch(0).tolist()


def test_batch_larger_than_the_data_set() -> None:
    message = r"data\.batch_size must be at most the number of training images, 22: got 23"
    with pytest.raises(UserError, match=message):
        ShuffledOrder(22, 23, seed=0)
    with pytest.raises(UserError, match=message):
        WindowedOrder((20, 2), 23, 4, 12, seed=0)


# The order of shards


@pytest.mark.parametrize("batch_size", [1, 4, 6, 7, 50])
@pytest.mark.parametrize("lanes", [1, 3, 32])
@pytest.mark.parametrize("window", [1, 10, 4096])
@pytest.mark.parametrize("sizes", [SIZES, (50,), (0, 25, 0, 0, 25, 0)])
def test_pass_holds_every_row_once(batch_size: int, lanes: int, window: int, sizes: tuple[int, ...]) -> None:
    order = WindowedOrder(sizes, batch_size, lanes, window, seed=0)
    assert (batch_size % order.lanes, order.steps_per_pass) == (0, 50 // batch_size)
    steps = range(order.steps_per_pass)
    passes = [[order.batch(step + p * order.steps_per_pass).tolist() for step in steps] for p in range(3)]
    for rows in (np.array(each).flatten() for each in passes):
        assert len(np.unique(rows)) == len(rows) == 50 // batch_size * batch_size
        assert set(rows) <= set(range(50))
    assert passes[0] != passes[1] != passes[2] != passes[0]


@pytest.mark.parametrize("sizes", [SIZES, (50,)])
def test_other_passes_leave_out_other_rows(sizes: tuple[int, ...]) -> None:
    order = WindowedOrder(sizes, 7, 7, 10, seed=0)
    left_out = [set(range(50)) - set(np.concatenate([order.batch(7 * p + s) for s in range(7)])) for p in range(20)]
    assert len(set.union(*map(set, left_out))) > 5


def test_order_by_hand() -> None:
    """Without shuffling, a lane is a range of the ring, and a batch takes two rows of each."""
    order = WindowedOrder((4, 9, 2), 6, 5, window=3, seed=0)
    shards, ends, rotation = order._ring(0)
    ring = np.roll(np.concatenate([np.split(np.arange(15), [4, 13])[shard] for shard in shards]), -rotation)
    assert ends.tolist()[-1] == 15
    assert (order.lanes, order.lane_length, order.window, order.steps_per_pass) == (3, 5, 1, 2)
    assert order.batch(0).tolist() == ring[[0, 1, 5, 6, 10, 11]].tolist()
    assert order.batch(1).tolist() == ring[[2, 3, 7, 8, 12, 13]].tolist()


def test_windows_follow_one_another() -> None:
    """The windows of a lane cover it, and each is shuffled within itself."""
    order = WindowedOrder((60,), 4, 2, window=16, seed=0)
    for lane, ends in ((0, [4, 12, 20, 28, 30]), (1, [8, 16, 24, 30])):
        windows = sorted({w for step in range(15) for w in order.windows(step, lane)})
        assert [order.span(window)[1] for window in windows] == ends
        rows = [int(row) for step in range(15) for row in order.batch(step)[2 * lane : 2 * lane + 2]]
        start = 30 * lane + order._ring(0)[2]
        for first, end in itertools.pairwise([0, *ends]):
            assert sorted(rows[first:end]) == sorted(row % 60 for row in range(start + first, start + end))
        assert rows != [row % 60 for row in range(start, start + 30)]
