"""Where images come from, what is held out, what broken ones do, and the order of the batches."""

import errno
import io
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub.errors as hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.datamodule import PADDING_INDEX, ImageDataModule, ImageDataset, collate
from ilvr_lightning.data.images import BrokenImageError
from ilvr_lightning.data.order import TrainBatchSampler, ValidationSampler
from ilvr_lightning.data.sources import open_splits
from ilvr_lightning.errors import UserError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 255 - value)).save(file, "PNG")
    return file.getvalue()


def table(count: int, first: int = 0, **columns: Any) -> datasets.Dataset:
    """Row i is a plain picture whose red is first + i."""
    values = [{"bytes": png(first + i), "path": None} for i in range(count)]
    return datasets.Dataset.from_dict({"image": values, **columns}).cast_column("image", datasets.Image())


def config(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"image_size": 8, "num_workers": 0, **settings})


def values(settings: DataConfig, seed: int = 0) -> tuple[list[int], list[int]]:
    """The red of every training and every validation image."""
    data = ImageDataModule(settings, seed)
    data.setup()
    assert data.train is not None
    assert data.validation is not None
    both = [[int((rows[i][0][0, 0, 0] + 1) * 127.5 + 0.5) for i in range(len(rows))] for rows in
            (data.train, data.validation)]  # fmt: skip
    return both[0], both[1]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """An ImageFolder: cats are 0 to 4, dogs 100 to 104."""
    for i, name in itertools.product(range(5), ("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name / f"{i}.png").write_bytes(png(i + 100 * (name == "dog")))
    return tmp_path / "pets"


def test_plain_folder(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    train, validation = values(config(tmp_path))
    assert (len(train), len(validation)) == (5, 1)
    assert sorted(train + validation) == [0, 1, 2, 3, 4, 5]


def test_folders_of_classes(classes: Path) -> None:
    train, validation = values(config(classes))
    assert sorted(train + validation) == [*range(5), *range(100, 105)]
    train, validation = values(config(classes, label="dog"))
    assert sorted(train + validation) == [*range(100, 105)]
    with pytest.raises(UserError, match=r"data\.label='fox' is not in .*: it has cat, dog"):
        values(config(classes, label="fox"))


def test_label_without_classes(tmp_path: Path) -> None:
    table(3, title=["a", "b", "c"]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"data\.label='dog': .* has no class column among image, title"):
        values(config(tmp_path / "x.parquet", label="dog"))


def test_parquet_file_and_glob(tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "a.parquet")
    table(4, first=50).to_parquet(tmp_path / "b.parquet")
    assert sorted(sum(values(config(tmp_path / "a.parquet")), [])) == [0, 1, 2, 3]
    assert sorted(sum(values(config(tmp_path / "*.parquet")), [])) == [0, 1, 2, 3, 50, 51, 52, 53]
    with pytest.raises(UserError, match=r"data\.path=.*\*\.csv: give Parquet or Arrow files"):
        values(config(tmp_path / "*.csv"))


def test_saved_to_disk(tmp_path: Path) -> None:
    table(4).save_to_disk(tmp_path / "one")
    splits = {"train": table(3), "validation": table(2, first=50), "test": table(2, first=90)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "many")
    assert sorted(sum(values(config(tmp_path / "one")), [])) == [0, 1, 2, 3]
    assert values(config(tmp_path / "many")) == ([0, 1, 2], [50, 51])
    assert values(config(tmp_path / "many", split="validation", validation_split="test")) == ([50, 51], [90, 91])


def test_local_data_set_with_its_own_test_split(tmp_path: Path) -> None:
    """The layout of data/toon."""
    table(5).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table(2, first=50).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert values(config(tmp_path)) == ([0, 1, 2, 3, 4], [50, 51])
    for setting in ("split", "validation_split"):
        with pytest.raises(UserError, match=rf"data\.{setting}='dev' is not in .*: it has train, test"):
            values(config(tmp_path, **{setting: "dev"}))


def test_held_out_part_follows_from_the_seed(tmp_path: Path) -> None:
    table(40).to_parquet(tmp_path / "x.parquet")
    settings = config(tmp_path / "x.parquet", validation_fraction=0.25)
    train, validation = values(settings, seed=1)
    assert (len(train), len(validation)) == (30, 10)
    assert sorted(train + validation) == list(range(40))
    assert values(settings, seed=1) == (train, validation)
    assert set(values(settings, seed=2)[1]) != set(validation)


def test_one_image_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "only.png").write_bytes(png(0))
    with pytest.raises(UserError, match="holds 1 image; at least 2"):
        values(config(tmp_path))


def test_image_columns(tmp_path: Path) -> None:
    rows = [{"bytes": png(100 + i), "path": None} for i in range(3)]
    both = table(3, mask=rows, title=["a", "b", "c"]).cast_column("mask", datasets.Image())
    both.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"data\.image_column must be given: .*2 image columns among image, mask, ti"):
        values(config(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"data\.image_column='msk' is not in .*: it has image, mask, title"):
        values(config(tmp_path / "x.parquet", image_column="msk"))
    assert sorted(sum(values(config(tmp_path / "x.parquet", image_column="mask")), [])) == [100, 101, 102]


def test_column_of_another_kind(tmp_path: Path) -> None:
    table(3, title=["a", "b", "c"], number=[1, 2, 3]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"data\.image_column='number' holds no images; image columns: image"):
        values(config(tmp_path / "x.parquet", image_column="number"))
    with pytest.raises(UserError, match="no image in it can be read"):  # texts may be paths
        values(config(tmp_path / "x.parquet", image_column="title"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "some/where/else", "missing.parquet"])
def test_missing_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match=r"data\.path=\S+: there is no such folder or file"):
        values(config(path))


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"data\.path=.*: no images in this folder"):
        values(config(tmp_path))


def gated() -> Exception:
    error: Exception = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'x/y' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    return error


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (gated, "accept its terms on the Hub, then run `hf auth login`"),
        (
            lambda: datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub"),
            "neither a local folder nor a data set on the Hub",
        ),
        (lambda: ConnectionError("Couldn't reach 'x/y' on the Hub (ProxyError)"), "the Hub cannot be reached"),
        (lambda: hub.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode"), "cannot be reached"),
        (lambda: hub.LocalEntryNotFoundError("Cannot find the file in the cache"), "the Hub cannot be reached"),
        (lambda: RuntimeError("first line\nsecond line"), "could not be loaded: first line$"),
    ],
)
def test_hub_errors_say_what_to_do(error: Callable[[], Exception], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise error()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=rf"^data\.path=x/y .*{hint}") as caught:
        values(config("x/y"))
    assert "\n" not in str(caught.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself, told to stay offline."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing .*the Hub cannot be reached"):
        values(config("nobody/nothing"))


@pytest.fixture
def one_broken(tmp_path: Path) -> Path:
    """Five training rows, of which row 2 is cut short, and two for validation."""
    rows = [{"bytes": png(i)[: 20 if i == 2 else None], "path": None} for i in range(5)]
    broken = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    broken.to_parquet(tmp_path / "train.parquet")
    table(2, first=50).to_parquet(tmp_path / "test.parquet")
    return tmp_path


def test_broken_image_leaves_the_cache(one_broken: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        assert values(config(one_broken)) == ([0, 1, 3, 4], [50, 51])
    messages = "\n".join(str(w.message) for w in caught)
    assert "row 2 of" in messages
    assert "/train is broken" in messages
    assert "1 broken images skipped in train" in messages


def test_broken_image_is_replaced_and_named_without_a_cache(one_broken: Path) -> None:
    data = ImageDataModule(config(one_broken, cache_mb=0))
    data.setup()
    assert data.train is not None
    assert data.train.cache is None
    batch = collate([data.train[i] for i in range(5)])
    assert ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 1, 3, 3, 4]
    assert batch["broken"].tolist() == [-1, -1, 2, -1, -1]
    with pytest.warns(UserWarning, match=r"row 2 of .* is broken and skipped \(1 so far\)"):
        data.on_before_batch_transfer(dict(batch), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.on_before_batch_transfer(dict(batch), 0)  # each row is told of once


@pytest.mark.parametrize("cache_mb", [0, 1024])
def test_broken_image_can_stop_the_run(one_broken: Path, cache_mb: int) -> None:
    with pytest.raises(BrokenImageError, match=r"row 2 of .*/train is broken: .*data\.on_broken=skip leaves it out"):
        values(config(one_broken, cache_mb=cache_mb, on_broken="stop"))


@pytest.mark.parametrize("cache_mb", [0, 1024])
def test_all_broken(tmp_path: Path, cache_mb: int) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"data\.path=.*: no image in it can be read"):
        values(config(tmp_path, cache_mb=cache_mb))


def test_cached_and_decoded_images_are_equal(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "x.parquet")
    assert values(config(tmp_path / "x.parquet", cache_mb=0)) == values(config(tmp_path / "x.parquet"))


def test_batches_follow_channels_and_size(tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "x.parquet")
    settings = config(tmp_path / "x.parquet", channels=1, image_size=(4, 6))
    rows = ImageDataset(open_splits(settings, 0)[0], settings)
    image = collate([rows[0], rows[1]])["image"]
    assert (image.shape, image.dtype) == ((2, 1, 4, 6), torch.float32)
    assert -1 <= image.min() <= image.max() <= 1


def batches(rank: int = 0, world: int = 1, accumulation: int = 1, first: int = 0) -> list[list[int]]:
    """One epoch's micro-batches of 4 of 22 images a step."""
    position: Callable[[], int] = lambda: first  # noqa: E731
    return list(TrainBatchSampler(22, 4, world * accumulation, rank, world, seed=3, position=position))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_global_batch_is_the_same_however_it_is_split(world: int, accumulation: int) -> None:
    """A rank's micro-batch m holds the places (m * world + rank) * share and on, as the module's seeds assume."""
    ranks = [batches(rank, world, accumulation) for rank in range(world)]
    joined = []
    for step in range(5):
        micro = range(step * accumulation, (step + 1) * accumulation)
        joined.append([index for m in micro for rank in ranks for index in rank[m]])
    assert joined == batches()
    assert {len(rank) for rank in ranks} == {5 * accumulation}


def test_epochs_are_permutations() -> None:
    epochs = [sum(batches(first=5 * epoch), []) for epoch in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 20
        assert set(epoch) <= set(range(22))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_goes_on_in_mid_epoch() -> None:
    both = batches() + batches(first=5)
    assert batches(first=3) == both[3:8]


def test_batch_larger_than_the_set() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size must be at most .* 22: got 23"):
        TrainBatchSampler(22, 23, 1, 0, 1, 0, lambda: 0)


@pytest.mark.parametrize(("length", "world"), [(6, 1), (6, 2), (7, 2), (1, 3), (2, 4)])
def test_validation_covers_all_once(length: int, world: int) -> None:
    shares = [list(ValidationSampler(length, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share if i >= 0) == list(range(length))


def test_padding_is_an_image_that_counts_for_nothing(tmp_path: Path) -> None:
    table(3).to_parquet(tmp_path / "x.parquet")
    settings = config(tmp_path / "x.parquet")
    rows = ImageDataset(open_splits(settings, 0, hold_out=False)[0], settings)
    image, index, _ = rows[-1]  # ValidationSampler's padding by image 0
    assert index == PADDING_INDEX
    assert torch.equal(image, rows[0][0])


@pytest.mark.parametrize("on_broken", ["skip", "stop"])
def test_missing_file_of_a_row_counts_as_broken(tmp_path: Path, on_broken: Literal["skip", "stop"]) -> None:
    """A column of paths."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for split, rows in (("train", paths), ("test", paths[:1])):
        datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "set" / f"{split}.parquet")
    settings = config(tmp_path / "set", on_broken=on_broken, image_column="image")
    if on_broken == "skip":
        with (
            pytest.warns(UserWarning, match="1 broken images skipped in train"),
            pytest.warns(UserWarning, match="row 2 of set/train is broken"),
        ):
            assert values(settings) == ([0, 1], [0])
    else:
        with pytest.raises(BrokenImageError, match="row 2 of set/train is broken"):
            values(settings)


def test_seed_of_the_order_matters() -> None:
    orders = [list(TrainBatchSampler(22, 4, 1, 0, 1, seed, lambda: 0)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert np.unique(sum(orders[0], [])).size == 20


def test_decoded_once_and_mapped(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to come decodes nothing and sees the same; another size is another file."""
    cache = tmp_path / "decoded"

    def rows(image_size: int = 8) -> tuple[ImageDataset, ImageDataset]:
        data = ImageDataModule(config(classes, image_size=image_size), cache=cache)
        data.setup()
        assert data.train is not None and data.validation is not None
        return data.train, data.validation

    plain = ImageDataModule(config(classes))
    plain.setup()
    first = rows()
    with monkeypatch.context() as patched:
        patched.setattr(ImageDataset, "_decode", lambda self, row: pytest.fail("decoded again"))
        second = rows()
    assert plain.train is not None and plain.validation is not None
    for a, b, c in zip((plain.train, plain.validation), first, second, strict=True):
        assert a.cache is not None and b.cache is not None and c.cache is not None
        assert isinstance(c.cache, np.memmap)
        np.testing.assert_array_equal(a.cache, b.cache)
        np.testing.assert_array_equal(a.cache, c.cache)
        torch.testing.assert_close(a[0][0], c[0][0], rtol=0, atol=0)
    assert len(list(cache.glob("*.npy"))) == 2
    rows(image_size=4)
    assert len(list(cache.glob("*.npy"))) == 4
    assert not list(cache.glob("*partial*"))


def test_what_was_broken_is_tried_again(one_broken: Path, tmp_path: Path) -> None:
    """Nothing that may be mended is kept."""
    for _ in range(2):
        data = ImageDataModule(config(one_broken), cache=tmp_path / "decoded")
        with pytest.warns(UserWarning, match="1 broken images skipped in train"):
            data.setup()
        assert data.train is not None
        assert len(data.train) == 4
        assert list(data.train.broken) == [2]
    assert len(list((tmp_path / "decoded").glob("*.npy"))) == 1  # of the validation images


def test_files_behind_a_column_of_paths_are_read_each_time(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"image": paths}).to_parquet(tmp_path / "set" / f"{split}.parquet")
    seen = []
    for shade in (10, 200):
        for path in paths:
            Image.new("RGB", (8, 8), (shade,) * 3).save(path)
        data = ImageDataModule(config(tmp_path / "set", image_column="image"), cache=tmp_path / "decoded")
        data.setup()
        assert data.train is not None and data.train.cache is not None
        seen.append(int(data.train.cache.max()))
    assert seen == [10, 200]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve blocks")
def test_full_disk_is_seen_before_pages_are_written(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = ImageDataModule(config(classes), cache=tmp_path / "decoded")
    with pytest.warns(UserWarning, match=r"stay in memory: .* cannot be written \(No space left on device\)"):
        data.setup()
    assert data.train is not None and data.train.cache is not None
    assert not list((tmp_path / "decoded").glob("*.npy"))


def test_decoded_stay_in_memory_where_nothing_can_be_written(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    data = ImageDataModule(config(classes), cache=tmp_path / "file")
    with pytest.warns(UserWarning, match="decoded images stay in memory"):
        data.setup()
    assert data.train is not None
    assert data.train.cache is not None and not isinstance(data.train.cache, np.memmap)


@pytest.mark.parametrize("harm", ["truncated", "empty", "deleted", "another"])
def test_harmed_file_is_made_again(harm: str, classes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "decoded"

    def first() -> Tensor:
        data = ImageDataModule(config(classes), cache=cache)
        data.setup()
        assert data.train is not None and isinstance(data.train.cache, np.memmap)
        return data.train[0][0].clone()

    expected = first()
    for path in list(cache.glob("*.npy")):
        match harm:
            case "truncated":
                path.write_bytes(path.read_bytes()[:200])
            case "empty":
                path.write_bytes(b"")
            case "deleted":
                path.unlink()
            case "another":
                np.save(path, np.zeros((1, 8, 8, 3), dtype=np.uint8))
    torch.testing.assert_close(first(), expected, rtol=0, atol=0)
