"""Parquet shards streamed: the same rows at the same indices for any number of ranks, threads and resumes."""

import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile  # type: ignore[import-untyped]

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.order import rank_share
from ilvr_lightning.data.shards import ParquetSource, open_shards
from ilvr_lightning.data.streaming import StreamBatches, stream_order
from ilvr_lightning.errors import UserError
from tests.support.image_sets import stream_config as config
from tests.support.image_sets import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


def batches(
    settings: DataConfig, rank: int = 0, world_size: int = 1, accumulation: int = 1, first: int = 0, steps: int = 16
) -> StreamBatches:
    """Two passes of the shards, unless other steps are asked for."""
    rows = open_shards(settings)[0]
    order = stream_order(rows, settings, seed=3)
    shares = rank_share(order.batch_size, world_size * accumulation, rank, world_size)
    return StreamBatches(rows, order, settings, shares, lambda: first, steps, settings.num_workers or 1)


def seen(stream: StreamBatches) -> list[list[int]]:
    """The red of each image, which is its row, by micro-batch."""
    return [((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for batch in stream]


@pytest.fixture(scope="module")
def alone(shards: Path) -> list[list[int]]:
    return seen(batches(config(shards)))


# What ranks, threads and resumed runs see


def test_images_are_those_of_the_order(shards: Path, alone: list[list[int]]) -> None:
    stream = batches(config(shards))
    assert alone == [stream.order.batch(step).tolist() for step in range(16)]
    assert len(stream) == len(alone) == 16
    assert len(set(sum(alone[:7], []))) == 42  # of 47; three are held out
    assert alone[:7] != alone[7:14]
    assert max(sum(alone, [])) < 48


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 1), (1, 2), (3, 2), (6, 1)])
@pytest.mark.parametrize("window", [1, 12, 4096])
def test_global_batch_is_the_same_however_it_is_split(
    world_size: int, accumulation: int, window: int, shards: Path
) -> None:
    settings = config(shards, shuffle_window=window)
    ranks = [seen(batches(settings, rank, world_size, accumulation)) for rank in range(world_size)]
    joined = []
    for step in range(16):
        micro = range(step * accumulation, (step + 1) * accumulation)
        joined.append([row for m in micro for rank in ranks for row in rank[m]])
    assert joined == seen(batches(settings))


def test_number_of_threads_does_not_matter(shards: Path, alone: list[list[int]]) -> None:
    assert seen(batches(config(shards, num_workers=4))) == alone


@pytest.mark.parametrize("first", range(1, 16))
def test_resume_continues(first: int, shards: Path, alone: list[list[int]]) -> None:
    assert seen(batches(config(shards), first=first, steps=16 - first)) == alone[first:]


def test_more_shards_than_lanes_and_more_lanes_than_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "many", [3] * 16)
    write_shards(tmp_path / "one", [48])
    for name in ("many", "one"):
        rows = sum(seen(batches(config(tmp_path / name, batch_size=4), steps=11)), [])
        assert len(set(rows)) == len(rows) == 44


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often each (shard, row) is read."""
    counter: Counter[tuple[int, int]] = Counter()
    original = ParquetSource.read_shard

    def counted(self: ParquetSource, shard: int, first: int, end: int) -> Iterator[Any]:
        for row, value in enumerate(original(self, shard, first, end), start=first):
            counter[shard, row] += 1
            yield value

    monkeypatch.setattr(ParquetSource, "read_shard", counted)
    return counter


def test_nothing_is_read_twice_in_a_pass(shards: Path, reads: Counter[tuple[int, int]]) -> None:
    """Not even where it is three epochs, as long as none ends while a window is being read: that one is given up."""
    stream = batches(config(shards), steps=2)
    reads.clear()
    rows = []
    for step in (0, 2, 4):
        stream.position = lambda step=step: step  # type: ignore[misc]
        for batch in stream:
            rows += batch["index"].tolist()
            wait(stream._windows.values())
    assert len(set(rows)) == len(rows) == 36
    assert max(reads.values()) == 1


def test_nothing_is_read_twice_in_an_epoch(shards: Path, reads: Counter[tuple[int, int]]) -> None:
    stream = batches(config(shards), steps=2)
    for step in (0, 2, 4):
        reads.clear()
        stream.position = lambda step=step: step  # type: ignore[misc]
        seen(stream)
        assert max(reads.values(), default=1) == 1


def test_ranks_share_the_reading(shards: Path, reads: Counter[tuple[int, int]]) -> None:
    for rank in range(3):
        stream = batches(config(shards), rank, world_size=3, steps=7)
        if rank == 0:
            reads.clear()  # what was held out
        seen(stream)
    held_out = {(4, 28), (4, 27), (4, 26)}
    assert {key: count for key, count in reads.items() if count != 1 and key not in held_out} == {}


def test_resume_reads_at_most_a_window_of_each_lane_again(shards: Path, reads: Counter[tuple[int, int]]) -> None:
    for first in range(1, 7):
        stream = batches(config(shards, shuffle_window=18), first=first, steps=7 - first)
        reads.clear()
        seen(stream)
        trained = set(np.concatenate([stream.order.batch(step) for step in range(first)]))
        again = [row for (shard, i), count in reads.items() for row in [int(stream.order.starts[shard]) + i] * count]
        assert len([row for row in again if row in trained]) <= 18


# Threads and files


def open_files() -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".parquet") for fd in os.listdir("/proc/self/fd"))


def readers() -> int:
    """The number of a stream's threads; other libraries may start threads of their own at any time."""
    return sum(thread.name.startswith(("read", "decode")) for thread in threading.enumerate())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_threads_and_files_end_with_the_iterator(shards: Path) -> None:
    threads, files = readers(), open_files()
    iterator = iter(batches(config(shards, num_workers=3), steps=1000))
    next(iterator)
    assert readers() > threads
    del iterator
    assert (readers(), open_files()) == (threads, files)
    seen(batches(config(shards)))
    assert (readers(), open_files()) == (threads, files)


def test_interrupt_ends_the_threads(shards: Path) -> None:
    threads = readers()
    with pytest.raises(KeyboardInterrupt):
        for _ in batches(config(shards)):
            raise KeyboardInterrupt
    assert readers() == threads


def test_damaged_shard_ends_the_run(tmp_path: Path) -> None:
    write_shards(tmp_path, [40])
    stream = batches(config(tmp_path))
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[100:-4000] = bytes(len(content) - 4100)
    path.write_bytes(content)
    threads = readers()
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read: "):
        seen(stream)
    assert readers() == threads


def test_shard_that_became_shorter(tmp_path: Path) -> None:
    write_shards(tmp_path, [40])
    stream = batches(config(tmp_path))
    write_shards(tmp_path, [4, 36])
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="cannot be read: it holds fewer rows than when the run began"):
        seen(stream)


def test_shard_that_is_gone(tmp_path: Path) -> None:
    write_shards(tmp_path, [40])
    stream = batches(config(tmp_path))
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read: "):
        seen(stream)


# Broken rows


@pytest.mark.filterwarnings("ignore:row")
@pytest.mark.parametrize("window", [12, 4096])
def test_broken_row_is_replaced_and_named(window: int, tmp_path: Path) -> None:
    """Alike on every rank and after a resume."""
    write_shards(tmp_path, broken=[0, 9, 30])
    settings = config(tmp_path, shuffle_window=window)
    whole = batches(settings, steps=7)
    with pytest.warns(UserWarning) as caught:
        seen(whole)
    broken = {0, 9, 30} & set(np.concatenate([whole.order.batch(step) for step in range(7)]).tolist())
    assert {str(w.message).partition(" of ")[0] for w in caught} == {f"row {row}" for row in broken}
    assert not {0, 9, 30} & set(sum(seen(whole), []))
    assert seen(batches(settings, first=3, steps=4)) == seen(whole)[3:]
    ranks = [seen(batches(settings, rank, 3, steps=7)) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == seen(whole)


@pytest.mark.filterwarnings("ignore:row")
def test_all_broken(tmp_path: Path) -> None:
    write_shards(tmp_path, broken=range(50))
    with pytest.raises(UserError, match=r"data\.path=.*: no image in it can be read"):
        seen(batches(config(tmp_path)))


# Remote shards


def test_shards_of_the_hub(on_hub: list[str], alone: list[list[int]]) -> None:
    assert len(on_hub) == 5
    assert seen(batches(config("someone/pictures"))) == alone


def test_connection_that_breaks_off(on_hub: list[str], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads again what failed."""
    original, calls = MemoryFile.read, itertools.count(1)

    def flaky(self: Any, *args: int) -> Any:
        if next(calls) % 3 == 0:
            raise TimeoutError("the read operation timed out")
        return original(self, *args)

    monkeypatch.setattr(MemoryFile, "read", flaky)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    assert seen(batches(config("someone/pictures"))) == alone
    stream = batches(config("someone/pictures"))
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    with pytest.raises(UserError, match=r"memory://.*\.parquet cannot be read: Server Disconnected"):
        seen(stream)
