"""Parquet shards streamed: the same rows at the same places for any number of ranks, threads and resumes."""

import io
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import train
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.datamodule import ImageDataModule, collate
from ilvr_lightning.data.images import BrokenImageError
from ilvr_lightning.data.order import WindowedOrder
from ilvr_lightning.data.shards import ParquetSource, open_shards
from ilvr_lightning.data.streaming import StreamBatches, stream_order
from ilvr_lightning.errors import UserError
from ilvr_lightning.training.module import DDPM
from tests.support.runs import assert_same_training, crashing, last
from tests.support.runs import scalars as all_scalars
from tests.system.test_processes import scalars, start

SIZES = (7, 1, 13, 0, 29)
"""Rows of the shards; they hold row groups of three."""
ROWS = sum(SIZES)

TrainRun = Callable[..., Path]


def png(row: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (row, 0, 255 - row)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path | str, sizes: Sequence[int] = SIZES, name: str = "train", broken: Sequence[int] = ()) -> None:
    """ParquetSource whose row i is a plain picture with a red of i."""
    schema = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}).arrow_schema
    rows = itertools.count()
    for number, size in enumerate(sizes):
        mine = list(itertools.islice(rows, size))
        images = [{"bytes": png(row)[: 20 if row in broken else None], "path": None} for row in mine]
        table = pa.Table.from_pydict({"image": images, "caption": [str(row) for row in mine]}, schema)
        with fsspec.open(f"{folder}/{name}-{number:05}-of-{len(sizes):05}.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write(folder)
    return folder


def config(path: Path | str, **settings: Any) -> DataConfig:
    given = {"image_size": 8, "num_workers": 1, "batch_size": 6, "shuffle_window": 12, "streaming": True, **settings}
    return DataConfig(path=str(path), **given)


def batches(
    settings: DataConfig, rank: int = 0, world: int = 1, accumulation: int = 1, first: int = 0, steps: int = 16
) -> StreamBatches:
    """Two passes of the shards, unless told otherwise."""
    rows = open_shards(settings)[0]
    order = stream_order(rows, settings, seed=3)
    threads = settings.num_workers or 1
    return StreamBatches(
        rows, order, settings, world * accumulation, rank, world, lambda: first, steps, threads, collate
    )


def seen(stream: StreamBatches) -> list[list[int]]:
    """The red of each image, which is its row, by micro-batch."""
    return [((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for batch in stream]


@pytest.fixture(scope="module")
def alone(shards: Path) -> list[list[int]]:
    return seen(batches(config(shards)))


# The order


@pytest.mark.parametrize("global_batch", [1, 4, 6, 7, 50])
@pytest.mark.parametrize("lanes", [1, 3, 32])
@pytest.mark.parametrize("window", [1, 10, 4096])
@pytest.mark.parametrize("sizes", [SIZES, (50,), (0, 25, 0, 0, 25, 0)])
def test_pass_holds_every_row_once(global_batch: int, lanes: int, window: int, sizes: tuple[int, ...]) -> None:
    order = WindowedOrder(sizes, global_batch, lanes, window, seed=0)
    assert (global_batch % order.lanes, order.steps_per_pass) == (0, 50 // global_batch)
    steps = range(order.steps_per_pass)
    passes = [[order.batch(step + p * order.steps_per_pass).tolist() for step in steps] for p in range(3)]
    for rows in (np.array(each).flatten() for each in passes):
        assert len(np.unique(rows)) == len(rows) == 50 // global_batch * global_batch
        assert set(rows) <= set(range(50))
    assert passes[0] != passes[1] != passes[2] != passes[0]


@pytest.mark.parametrize("sizes", [SIZES, (50,)])
def test_other_passes_leave_out_other_rows(sizes: tuple[int, ...]) -> None:
    order = WindowedOrder(sizes, 7, 7, 10, seed=0)
    left_out = [set(range(50)) - set(np.concatenate([order.batch(7 * p + s) for s in range(7)])) for p in range(20)]
    assert len(set.union(*map(set, left_out))) > 5


def test_order_by_hand() -> None:
    """Without shuffling: a lane is a range of the line, and a batch takes two rows of each."""
    order = WindowedOrder((4, 9, 2), 6, 5, window=3, seed=0)
    shards, ends, rotation = order._line(0)
    line = np.roll(np.concatenate([np.split(np.arange(15), [4, 13])[shard] for shard in shards]), -rotation)
    assert ends.tolist()[-1] == 15
    assert (order.lanes, order.length, order.window, order.steps_per_pass) == (3, 5, 1, 2)
    assert order.batch(0).tolist() == line[[0, 1, 5, 6, 10, 11]].tolist()
    assert order.batch(1).tolist() == line[[2, 3, 7, 8, 12, 13]].tolist()


def test_windows_follow_one_another() -> None:
    """Those of a lane cover it, and each is shuffled within itself."""
    order = WindowedOrder((60,), 4, 2, window=16, seed=0)
    for lane, ends in ((0, [4, 12, 20, 28, 30]), (1, [8, 16, 24, 30])):
        windows = sorted({w for step in range(15) for w in order.windows(step, lane)})
        assert [order.span(window)[1] for window in windows] == ends
        rows = [order.row_at(step, 2 * lane + i) for step in range(15) for i in range(2)]
        start = 30 * lane + order._line(0)[2]
        for first, end in itertools.pairwise([0, *ends]):
            assert sorted(rows[first:end]) == sorted(row % 60 for row in range(start + first, start + end))
        assert rows != [row % 60 for row in range(start, start + 30)]


def test_seed_matters() -> None:
    first, second = (WindowedOrder(SIZES, 6, 6, 12, seed) for seed in (0, 1))
    assert first.batch(0).tolist() != second.batch(0).tolist()


# What ranks, threads and resumed runs see


def test_images_are_those_of_the_order(shards: Path, alone: list[list[int]]) -> None:
    stream = batches(config(shards))
    assert alone == [stream.order.batch(step).tolist() for step in range(16)]
    assert len(stream) == len(alone) == 16
    assert len(set(sum(alone[:7], []))) == 42  # of 47; three are held out
    assert alone[:7] != alone[7:14]
    assert max(sum(alone, [])) < 48


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 1), (1, 2), (3, 2), (6, 1)])
@pytest.mark.parametrize("window", [1, 12, 4096])
def test_global_batch_is_the_same_however_it_is_split(world: int, accumulation: int, window: int, shards: Path) -> None:
    settings = config(shards, shuffle_window=window)
    ranks = [seen(batches(settings, rank, world, accumulation)) for rank in range(world)]
    joined = []
    for step in range(16):
        micro = range(step * accumulation, (step + 1) * accumulation)
        joined.append([row for m in micro for rank in ranks for row in rank[m]])
    assert joined == seen(batches(settings))


def test_number_of_threads_does_not_matter(shards: Path, alone: list[list[int]]) -> None:
    assert seen(batches(config(shards, num_workers=4))) == alone


@pytest.mark.parametrize("first", range(1, 16))
def test_resume_goes_on(first: int, shards: Path, alone: list[list[int]]) -> None:
    assert seen(batches(config(shards), first=first, steps=16 - first)) == alone[first:]


def test_more_shards_than_lanes_and_more_lanes_than_shards(tmp_path: Path) -> None:
    write(tmp_path / "many", [3] * 16)
    write(tmp_path / "one", [48])
    for name in ("many", "one"):
        rows = sum(seen(batches(config(tmp_path / name, batch_size=4), steps=11)), [])
        assert len(set(rows)) == len(rows) == 44


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often each (shard, row) is read."""
    counter: Counter[tuple[int, int]] = Counter()
    original = ParquetSource._read_once

    def counted(self: ParquetSource, shard: int, first: int, last: int) -> Iterator[Any]:
        for row, value in enumerate(original(self, shard, first, last), start=first):
            counter[shard, row] += 1
            yield value

    monkeypatch.setattr(ParquetSource, "_read_once", counted)
    return counter


def test_nothing_is_read_twice_in_a_pass(shards: Path, reads: Counter[tuple[int, int]]) -> None:
    """Not even where it is three epochs."""
    stream = batches(config(shards), steps=2)
    reads.clear()
    rows = []
    for step in (0, 2, 4):
        stream.position = lambda step=step: step  # type: ignore[misc]
        rows += seen(stream)
    assert len(set(sum(rows, []))) == 36
    assert max(reads.values()) == 1


def test_ranks_share_the_reading(shards: Path, reads: Counter[tuple[int, int]]) -> None:
    for rank in range(3):
        stream = batches(config(shards), rank, world=3, steps=7)
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_threads_and_files_end_with_the_iterator(shards: Path) -> None:
    threads, files = threading.active_count(), open_files()
    iterator = iter(batches(config(shards, num_workers=3), steps=1000))
    next(iterator)
    assert threading.active_count() > threads
    del iterator
    assert (threading.active_count(), open_files()) == (threads, files)
    seen(batches(config(shards)))
    assert (threading.active_count(), open_files()) == (threads, files)


def test_interrupt_ends_the_threads(shards: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        for _ in batches(config(shards)):
            raise KeyboardInterrupt
    assert threading.active_count() == threads


def test_damaged_shard_ends_the_run(tmp_path: Path) -> None:
    write(tmp_path, [40])
    stream = batches(config(tmp_path))
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[100:-4000] = bytes(len(content) - 4100)
    path.write_bytes(content)
    threads = threading.active_count()
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read: "):
        seen(stream)
    assert threading.active_count() == threads


def test_shard_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path, [40])
    stream = batches(config(tmp_path))
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read: "):
        seen(stream)


# Broken rows


@pytest.mark.parametrize("window", [1, 12, 4096])
def test_broken_row_is_replaced_and_named(window: int, tmp_path: Path) -> None:
    """Alike on every rank and after a resume."""
    write(tmp_path, broken=[0, 9, 30])
    settings = config(tmp_path, shuffle_window=window)
    whole = batches(settings, steps=7)
    straight = list(whole)
    broken = {row for batch in straight for row in batch["broken"].tolist() if row >= 0}
    assert broken == {0, 9, 30} & set(np.concatenate([whole.order.batch(step) for step in range(7)]).tolist())
    assert not {0, 9, 30} & set(sum(seen(whole), []))
    assert seen(batches(settings, first=3, steps=4)) == seen(whole)[3:]
    ranks = [seen(batches(settings, rank, 3, steps=7)) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == seen(whole)


def test_broken_row_can_stop_the_run(tmp_path: Path) -> None:
    write(tmp_path, broken=[9])
    with pytest.raises(BrokenImageError, match=r"row 9 of .*/train is broken: .*data\.on_broken=skip leaves it out"):
        seen(batches(config(tmp_path, on_broken="stop")))


def test_all_broken(tmp_path: Path) -> None:
    write(tmp_path, broken=range(50))
    with pytest.raises(UserError, match=r"no image around row \d+ can be read"):
        seen(batches(config(tmp_path)))


# What is validated on, and what cannot be


def module(settings: DataConfig, seed: int = 0) -> ImageDataModule:
    data = ImageDataModule(settings, seed)
    data.setup()
    return data


def reds(data: ImageDataModule) -> list[int]:
    assert data.validation is not None
    return [round((float(data.validation[i][0][0, 0, 0]) + 1) * 127.5) for i in range(len(data.validation))]


def test_last_rows_are_held_out_whatever_the_seed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        data = module(config(shards, validation_fraction=0.1), seed)
        assert reds(data) == [45, 46, 47, 48, 49]
        assert data.counts == "45 images to train on (streamed from 5 Parquet shards), 5 to validate on"
        assert not {45, 46, 47, 48, 49} & {row for step in range(14) for row in data.rows_of(step)}
    monkeypatch.setattr("ilvr_lightning.data.shards.VALIDATION_ROWS", 2)
    assert reds(module(config(shards, validation_fraction=0.1))) == [48, 49]
    reference = data.references([])[0]
    assert (reference.name, int(reference.pixels[0, 0, 0])) == ("validation_0", 45)


def test_held_out_rows_over_several_shards(shards: Path) -> None:
    data = module(config(shards, validation_fraction=0.7))
    assert reds(data) == list(range(15, 50))
    rows = data.rows_of(0) + data.rows_of(1)
    assert len(set(rows)) == 12
    assert max(rows) < 15


def test_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    write(tmp_path, [0, 3, 4], "validation")
    data = module(config(tmp_path))
    assert reds(data) == [0, 1, 2, 3, 4, 5, 6]
    assert data.train is not None and len(data.train) == ROWS
    monkeypatch.setattr("ilvr_lightning.data.shards.VALIDATION_ROWS", 4)
    assert reds(module(config(tmp_path))) == [0, 1, 2, 3]
    assert reds(module(config(tmp_path, split="validation", validation_split="train", batch_size=2))) == [0, 1, 2, 3]


def test_file_and_glob(shards: Path) -> None:
    data = module(config(shards / "train-00004-of-00005.parquet"))
    assert (data.counts.split()[0], reds(data)) == ("28", [49])
    assert module(config(shards / "*-0000[24]-*.parquet")).counts.split()[0] == "40"


def test_rows_at_random(shards: Path) -> None:
    """As the benchmarks take them."""
    data = module(config(shards))
    assert data.train is not None
    assert [round((float(data.train[row][0][0, 0, 0]) + 1) * 127.5) for row in (0, 7, 8, 20, 21, 46)] == [
        0, 7, 8, 20, 21, 46,
    ]  # fmt: skip


def test_columns_of_other_kinds(tmp_path: Path) -> None:
    """Bytes alone, and structs that no data set's metadata calls images."""
    values = [png(row) for row in range(8)]
    pq.write_table(pa.table({"jpg": values, "text": ["x"] * 8}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"picture": [{"bytes": v, "path": "x"} for v in values]}), tmp_path / "b.parquet")
    for name, column in (("a", "jpg"), ("b", None)):
        settings = config(tmp_path / f"{name}.parquet", image_column=column, batch_size=2)
        assert set(sum(seen(batches(settings, steps=3)), [])) <= set(range(7))
    with pytest.raises(UserError, match=r"data\.image_column must be given: .* 0 image columns among jpg, text"):
        module(config(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"data\.image_column must be given: "):
        module(config(tmp_path / "*.parquet"))


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    advice = r"is no Parquet, which data\.streaming=true reads; leave out data\.streaming"
    with pytest.raises(UserError, match=advice):
        module(config(tmp_path))
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "arrow")
    with pytest.raises(UserError, match=advice):
        module(config(tmp_path / "arrow"))
    with pytest.raises(UserError, match=advice):
        module(config(tmp_path / "*.png"))
    with pytest.raises(ValueError, match=r"data\.streaming=true reads every row.* leave out data\.label \(got 'cat'\)"):
        config(tmp_path, label="cat")
    (tmp_path / "x.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(UserError, match=r"x\.parquet is no readable Parquet file: "):
        module(config(tmp_path / "x.parquet"))
    for path in ("missing/folder/of", "/no/such", "./missing", "x.parquet"):
        with pytest.raises(UserError, match="there is no such folder or file"):
            module(config(path))


def test_splits_and_sizes_that_are_not_there(shards: Path, tmp_path: Path) -> None:
    for setting in ("split", "validation_split"):
        with pytest.raises(UserError, match=rf"data\.{setting}='dev' is not in .*: it has train"):
            module(config(shards, **{setting: "dev"}))
    with pytest.raises(UserError, match=r"data\.image_column='msk' is not in .*: it has image, caption"):
        module(config(shards, image_column="msk"))
    write(tmp_path, [1, 0])
    with pytest.raises(UserError, match="holds 1 image; at least 2"):
        module(config(tmp_path))
    data = module(config(shards, batch_size=49))
    trainer: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=1)
    with pytest.raises(UserError, match=r"data\.batch_size must be at most the number of training images, 48: got 49"):
        data.check_batch_size(trainer)


# The Hub


def hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]]) -> None:
    """A set on the Hub; its files are where fsspec finds them."""
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the set was downloaded"))


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write("memory://set")
    files = [f"memory://{path}" for path in fsspec.filesystem("memory").glob("/set/*.parquet")]
    hub(monkeypatch, {"train": files[::-1]})
    return files


def test_shards_of_the_hub(on_hub: list[str], alone: list[list[int]]) -> None:
    assert len(on_hub) == 5
    assert seen(batches(config("someone/pictures"))) == alone


def test_connection_that_breaks_off(on_hub: list[str], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third row; reading goes on at the row that was due."""
    original, calls = ParquetSource._read_once, itertools.count(1)

    def flaky(self: ParquetSource, shard: int, first: int, last: int) -> Iterator[Any]:
        for value in original(self, shard, first, last):
            if next(calls) % 3 == 0:
                raise TimeoutError("the read operation timed out")
            yield value

    stream = batches(config("someone/pictures"))
    monkeypatch.setattr(ParquetSource, "_read_once", flaky)
    monkeypatch.setattr("ilvr_lightning.data.shards.PAUSE", 0.0)
    assert seen(stream) == alone
    monkeypatch.setattr("ilvr_lightning.data.shards.RETRIES", 0)
    with pytest.raises(UserError, match=r"memory://.*\.parquet cannot be read: the read operation timed out"):
        seen(batches(config("someone/pictures")))


def test_set_that_is_no_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": ["hf://datasets/someone/pictures@main/train.tar"]})
    wanted = r"'data\.path=hf://datasets/someone/pictures@refs/convert/parquet/default/train/\*\.parquet'"
    with pytest.raises(UserError, match=rf"is no Parquet.*the Hub converts .* try {wanted}"):
        module(config("someone/pictures"))


def test_address_of_a_conversion(on_hub: list[str]) -> None:
    assert module(config("hf://datasets/someone/pictures@refs/convert/parquet/default/train/*.parquet")).train


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing .*the Hub cannot be reached"):
        module(config("nobody/nothing"))


# Row numbers and epochs of map-style data


def test_rows_of_a_step(shards: Path, tmp_path: Path) -> None:
    """As the split counts them, whatever was held out, dropped or left to another class."""
    streamed = module(config(shards), seed=3)
    assert streamed.rows_of(9) == seen(batches(config(shards), first=9, steps=1))[0]

    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken", [7, 1, 42], broken=[5])
    settings = config(tmp_path / "broken", streaming=False, num_workers=0)
    for cache_mb in (0, 1024):
        with pytest.warns() if cache_mb else pytest.MonkeyPatch.context():
            data = module(DataConfig(**{**vars(settings), "cache_mb": cache_mb}))
        assert data.train is not None
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=1, accumulate_grad_batches=1, global_rank=0, global_step=4, num_devices=1, training=True
        )
        batch = next(iter(data.train_dataloader()))
        found = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        wanted = data.rows_of(4)
        assert [w for w in wanted if w != 5] == [f for f, w in zip(found, wanted, strict=True) if w != 5]
        assert (5 in [row for step in range(8) for row in data.rows_of(step)]) == (cache_mb == 0)


def test_rows_of_one_class(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": png(row), "path": None} for row in range(12)]
    table = datasets.Dataset.from_dict({"image": images, "kind": [row % 2 for row in range(12)]}, features)
    table.to_parquet(tmp_path / "x.parquet")
    data = module(config(tmp_path / "x.parquet", streaming=False, label="dog", batch_size=5))
    assert len(set(data.rows_of(0)) | set(data.rows_of(1))) == 5
    assert set(data.rows_of(0)) < {1, 3, 5, 7, 9, 11}


# Training


STREAM = ("data.streaming=true", "data.num_workers=2", "data.batch_size=6", "data.shuffle_window=12")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The pictures of the tiny recipe as shards that do not divide."""
    folder = tmp_path_factory.mktemp("noisy")
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    values = [{"bytes": path.read_bytes(), "path": None} for path in sorted(images.glob("*.png"))] * 2
    for number, (first, end) in enumerate(itertools.pairwise([0, 5, 6, 6, 23, 42])):
        table = pa.Table.from_pydict({"image": values[first:end]}, schema)
        pq.write_table(table, folder / f"train-{number:05}-of-00005.parquet", row_group_size=3)
    return folder


@pytest.fixture(scope="module")
def straight(train_run: TrainRun, noisy: Path) -> Path:
    """36 rows, six held out: 15 steps in epochs of four, where a pass has six."""
    return train_run("streamed", f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25")


def test_epochs_of_a_number_of_images(straight: Path) -> None:
    assert last(straight)["global_step"] == 12
    assert [step for step, _ in all_scalars(straight, "val/loss")] == [4, 8, 12]


def test_epochs_of_a_number_of_images_map_style(train_run: TrainRun) -> None:
    """Only when an epoch ends is another matter: the order is that of passes over the whole set."""
    five = train_run("epochs_of_three", "data.epoch_images=13", "trainer.max_epochs=4")
    three = train_run("epochs_of_four", "trainer.max_epochs=3")
    assert [step for step, _ in all_scalars(five, "val/loss")] == [3, 6, 9, 12]
    assert all_scalars(five, "train/loss") == all_scalars(three, "train/loss")
    assert_same_training(five, three)


@pytest.mark.parametrize("call", [8, 9, 11])
def test_resume_in_mid_epoch(call: int, train_run: TrainRun, recipe: Path, noisy: Path, straight: Path) -> None:
    name = f"streamed_crash_{call}"
    overrides = [f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25"]
    threads = threading.active_count()
    with crashing(DDPM, "training_step", call), pytest.raises(LookupError):
        train_run(name, *overrides, "checkpoint.every_n_steps=3")
    folder = recipe.parent / "runs" / "tiny" / name
    assert last(folder)["global_step"] == {8: 6, 9: 8, 11: 9}[call]
    train_run(name, *overrides, f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, straight)
    assert threading.active_count() == threads


def test_accumulation_gives_the_same_losses(train_run: TrainRun, noisy: Path, straight: Path) -> None:
    folder = train_run(
        "streamed_accumulated", f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25",
        "trainer.accumulate_grad_batches=2", "data.num_workers=1",
    )  # fmt: skip
    found, expected = (dict(all_scalars(f, "train/loss")) for f in (folder, straight))
    assert found == pytest.approx(expected, rel=2e-5)


def test_broken_rows_are_told_of_once(train_run: TrainRun, tmp_path: Path) -> None:
    write(tmp_path, broken=[9])
    with pytest.warns(UserWarning) as caught:
        train_run("streamed_broken", f"data.path={tmp_path}", *STREAM, "trainer.max_epochs=3")
    assert [str(w.message) for w in caught if "is broken" in str(w.message)] == [
        "row 9 of train is broken and skipped (1 so far)"
    ]


def test_stopped_by_a_broken_row(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, broken=[9])
    settings = [f"data.path={tmp_path}", *STREAM, "trainer.max_epochs=3", "data.on_broken=stop", "run.name=stopped"]
    assert train.main([str(recipe), *settings]) == 2
    assert "row 9 of " in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(recipe: Path, noisy: Path, straight: Path) -> None:
    """They end, too: five shards, one of them empty, over two ranks."""
    ended = start(
        "train.py", recipe, f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25",
        "trainer.devices=2", "trainer.strategy=ddp", f"trainer.default_root_dir={recipe.parent / 'streamed_pair'}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (folder,) = (recipe.parent / "streamed_pair" / "tiny").iterdir()
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert scalars(folder, tag) == pytest.approx(scalars(straight, tag), rel=1e-5), tag
