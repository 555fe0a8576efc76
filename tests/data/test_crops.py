"""Centre, random windows and tiles of pictures; what is held out of few pictures; what ranks and resumed runs see."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ilvr_lightning.config.load import from_dict
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data import dataset
from ilvr_lightning.data.crops import reduced_size, tiles
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import fit_image, from_tensor, to_pixels
from ilvr_lightning.errors import UserError
from tests.data.test_datamodule import trainer
from tests.support.image_sets import data_config as config
from tests.support.image_sets import encode, set_up, stream_config, write_shards
from tests.support.runs import TrainRun, assert_same_training


def places(height: int, width: int, picture: int = 0) -> NDArray[np.uint8]:
    """A picture whose pixels say where they are: row, column, and which picture."""
    rows, columns = np.indices((height, width))
    return np.stack([rows, columns, np.full_like(rows, picture)], axis=2).astype(np.uint8)


def write(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.fromarray(places(*size, number)).save(folder / f"{number:02}.png")
    return folder


def pixels(part: Any, index: int) -> NDArray[np.uint8]:
    return from_tensor(part[index][0])


def corner(image: Tensor) -> tuple[int, int, int]:
    """(picture, top, left) of an image that is a window of a picture; checks that it is one."""
    found = from_tensor(image).astype(int)
    top, left, picture = found[0, 0].tolist()
    assert (found == places(200, 200, picture)[top : top + found.shape[0], left : left + found.shape[1]]).all()
    return picture, top, left


# The windows


def test_centre_is_as_it_was(tmp_path: Path) -> None:
    """Bit for bit, in photographs of odd sizes."""
    folder = tmp_path / "set"
    folder.mkdir()
    images = [np.random.default_rng(i).integers(0, 256, (31 + i, 50, 3), dtype=np.uint8) for i in range(4)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    data = set_up(config(folder, image_size=(16, 12)))
    for part in (data.train, data.validation):
        assert part is not None
        for i in range(len(part)):
            expected = to_pixels(fit_image(Image.fromarray(images[part.split_row(i)]), (16, 12)))
            assert (pixels(part, i) == expected).all()


def test_centre_of_a_scaled_picture(tmp_path: Path) -> None:
    data = set_up(config(write(tmp_path / "set", *[(30, 41)] * 3), scale=1))
    assert data.train is not None
    assert [corner(data.train[i][0])[1:] for i in range(2)] == [(11, 16)] * 2
    half = set_up(config(tmp_path / "set", scale=2.0))
    assert half.train is not None
    reduced = Image.fromarray(places(30, 41, half.train.split_row(0))).resize((20, 15), Image.Resampling.LANCZOS)
    assert (pixels(half.train, 0) == to_pixels(reduced)[3:11, 6:14]).all()


@pytest.mark.parametrize("cache_mb", [0, 1024])
def test_tiles_are_all_squares(cache_mb: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", *[(27, 34)] * 20)
    data = set_up(config(folder, crop="tiles", scale=1, cache_mb=cache_mb))
    assert data.train is not None and data.validation is not None
    assert (len(data.train), len(data.validation)) == (19 * 12, 12)
    found = [corner(part[i][0]) for part in (data.train, data.validation) for i in range(len(part))]
    corners = {(top, left) for top in (1, 9, 17) for left in (1, 9, 17, 25)}
    assert sorted(found) == sorted((picture, *at) for picture in range(20) for at in corners)
    assert data.counts == "228 images to train on (tiles of 19 pictures), 12 to validate on"


def test_tiles_of_other_shapes() -> None:
    settings = DataConfig(image_size=(4, 6), crop="tiles")
    assert tiles((4, 6), settings) == [(0, 0)]
    assert tiles((9, 13), settings) == [(0, 0), (0, 6), (4, 0), (4, 6)]
    assert reduced_size((40, 90), settings) == (4, 9)  # the shorter side fits
    assert reduced_size((90, 60), settings) == (9, 6)
    assert reduced_size((90, 61), DataConfig(image_size=4, crop="tiles", scale=3)) == (30, 20)


@pytest.mark.parametrize("crop", ["center", "random", "tiles"])
def test_pictures_that_are_too_small_are_left_out(crop: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", (20, 14), *[(20, 20)] * 12)
    with pytest.warns(UserWarning, match=r"row 0 .* its 14x20 pixels, reduced by data\.scale=2, are fewer than"):
        data = set_up(config(folder, crop=crop, scale=2), seed=1)
    assert data.train is not None
    assert 0 not in {data.train.split_row(i) for i in range(len(data.train))}
    with pytest.raises(UserError, match="no image in it can be read: row"):
        set_up(config(folder, crop=crop, scale=9))


# Random windows


def random_crops(folder: Path, **settings: Any) -> ImageDataModule:
    return set_up(config(folder, **{"crop": "random", "scale": 1, "batch_size": 6, **settings}), seed=3)


def batches(data: ImageDataModule, step: int = 0, rank: int = 0, world: int = 1, accumulation: int = 1) -> list[Tensor]:
    data.trainer = trainer(step, rank, world, accumulation)
    return [batch["image"] for batch in data.train_dataloader()]


@pytest.mark.parametrize("settings", [{}, {"cache_mb": 0}, {"cache_mb": 0, "num_workers": 1}])
@pytest.mark.filterwarnings("ignore:the pictures of")
def test_random_windows_are_new_each_time(settings: dict[str, Any], tmp_path: Path) -> None:
    data = random_crops(write(tmp_path / "set", (40, 60), *[(30, 30)] * 11), **settings)
    assert data.train is not None
    drawn = torch.cat([x for step in (0, 30, 60, 90) for x in batches(data, step)])
    corners = [corner(x) for x in drawn]
    assert len(set(corners)) > 0.8 * len(corners)
    small = [at for at in corners if at[0] > 0]
    for axis in (1, 2):
        assert {at[axis] for at in small} == set(range(30 - 8 + 1))
    largest = [at for at in corners if at[0] == 0]
    if largest:  # unless it is held out
        assert len(largest) / len(corners) == pytest.approx(40 * 60 / (40 * 60 + 10 * 900), rel=0.3)


def test_the_same_on_any_number_of_ranks_and_after_a_resume(tmp_path: Path) -> None:
    data = random_crops(write(tmp_path / "set", *[(30, 30)] * 12))
    alone = batches(data)
    assert len(alone) >= 20
    for step in (1, 7):
        resumed = batches(data, step)
        assert all(torch.equal(a, b) for a, b in zip(resumed, alone[step:], strict=False))
    for world, accumulation in ((2, 1), (1, 3), (3, 2)):
        ranks = [batches(data, 0, rank, world, accumulation) for rank in range(world)]
        parts = range(accumulation)
        for step, whole in enumerate(alone):
            joined = [ranks[rank][step * accumulation + m] for m in parts for rank in range(world)]
            assert torch.equal(torch.cat(joined), whole)


def test_epochs_cover_the_area_and_hold_a_batch(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", (40, 60))
    data = random_crops(folder)
    assert data.train is not None and data.validation is not None
    assert len(data.train) == round(40 * 52 / 64)
    assert data.counts == "32 images to train on (random crops of 1 picture), 5 to validate on"
    small = random_crops(folder, batch_size=50)
    assert small.train is not None
    assert len(small.train) == 64
    assert len(batches(small)) == 1
    assert len(batches(random_crops(folder, epoch_images=600))) == 100


def test_validation_sees_the_same_each_time(tmp_path: Path) -> None:
    data = random_crops(write(tmp_path / "set", *[(30, 30)] * 20))
    data.trainer = trainer()
    first, second = ([b["image"] for b in data.val_dataloader()] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert {corner(x)[1:] for x in torch.cat(first)} == set(tiles((30, 30), data.config))
    assert len(data.references()) == 4


@pytest.mark.parametrize("world", [1, 3])
def test_streamed_pictures_are_cropped_at_random(world: int, tmp_path: Path) -> None:
    import datasets

    rows = [{"bytes": encode(Image.fromarray(places(20, 24, i))), "path": None} for i in range(40)]
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    data = set_up(stream_config(tmp_path, crop="random", scale=1), seed=3)
    alone, again = batches(data), batches(data, step=2)
    assert all(torch.equal(a, b) for a, b in zip(alone[2:], again, strict=False))
    ranks = [batches(data, 0, rank, world) for rank in range(world)]
    assert all(torch.equal(torch.cat(parts), whole) for *parts, whole in zip(*ranks, alone, strict=True))
    corners = [corner(x) for x in torch.cat(alone)]
    assert len({at[1:] for at in corners}) > 15
    assert data.validation is not None and len(data.validation) == 2 * 6


# What is held out


def test_whole_pictures_are_held_out_of_ten(tmp_path: Path) -> None:
    data = random_crops(write(tmp_path / "set", *[(30, 30)] * 10))
    assert data.train is not None and data.validation is not None
    rows = [{part.split_row(i) for i in range(len(part))} for part in (data.train, data.validation)]
    assert len(rows[1]) == 1 and not rows[0] & rows[1]


@pytest.mark.parametrize("crop", ["random", "tiles"])
@pytest.mark.parametrize("sizes", [[(40, 60)], [(60, 12)], [(40, 60), (50, 50), (9, 9)]])
def test_held_out_strips_share_no_pixel_with_training(crop: str, sizes: Any, tmp_path: Path) -> None:
    data = random_crops(write(tmp_path / "set", *sizes), crop=crop, epoch_images=600, validation_fraction=0.1)
    assert data.train is not None and data.validation is not None
    if crop == "random":
        seen = torch.cat(batches(data))
    else:
        seen = torch.stack([data.train[i][0] for i in range(len(data.train))])
    held_out = torch.stack([data.validation[i][0] for i in range(len(data.validation))])
    used, kept = ({tuple(p) for x in part for p in from_tensor(x).reshape(-1, 3).tolist()} for part in (seen, held_out))
    assert not used & kept
    area = sum(height * width for height, width in sizes)
    assert len(kept) > 0.05 * area and (crop == "tiles" or len(used) > 0.6 * area)
    if len(sizes) == 3:  # the small picture is for training alone
        assert {p[2] for p in used} == {0, 1, 2} and {p[2] for p in kept} == {0, 1}


def test_no_held_out_pixel_is_in_a_reduced_training_crop(tmp_path: Path) -> None:
    """Changing what is held out changes no training image, although resampling looks around."""
    folder = tmp_path / "set"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
    seen = []
    for changed in (False, True):
        if changed:
            picture[:, 76:] = 255 - picture[:, 76:]
        Image.fromarray(picture).save(folder / "a.png")
        data = random_crops(folder, scale=3, validation_fraction=0.2, epoch_images=60)
        assert data.validation is not None
        seen.append((torch.cat(batches(data)), data.validation[0][0]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_divided_picture_is_looked_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    np.save(tmp_path / "set" / "a.npy", np.arange(1200, dtype=np.uint16).reshape(30, 40))
    assert random_crops(tmp_path / "set").config.value_range == (0, 4095)
    assert "in the sample of 1 file of more than 8 bits" in capsys.readouterr().out


def test_one_picture_that_is_too_small(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", (15, 15))
    with pytest.raises(UserError, match=r"holds 1 image; at least 2 .*; shrunk by data\.scale=1, it is too small to"):
        random_crops(folder)
    with pytest.raises(UserError, match=r"holds 1 image; at least 2 .*, or one that is large with data\.crop=random"):
        set_up(config(folder))


# The cache


def test_few_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write(tmp_path / "set", (40, 60), (50, 44)), tmp_path / "decoded"
    first = set_up(config(folder, crop="random", scale=1, batch_size=6), seed=3, cache=cache)
    expected = batches(first)
    assert len(list(cache.glob("*.npy"))) == 2
    with monkeypatch.context() as patched:
        patched.setattr(ImageSource, "decode", lambda *_: pytest.fail("decoded again"))
        second = set_up(config(folder, crop="random", scale=1, batch_size=6), seed=3, cache=cache)
        set_up(config(folder, crop="tiles", scale=1), seed=3, cache=cache)  # of the same pictures
        assert all(torch.equal(a, b) for a, b in zip(batches(second), expected, strict=True))
    for settings in ({"scale": 2}, {"crop": "center"}, {"validation_fraction": 0.3}):
        before = len(list(cache.glob("*.npy")))
        set_up(config(folder, **{"crop": "random", "scale": 1, **settings}), seed=3, cache=cache)
        assert len(list(cache.glob("*.npy"))) == before + 2, settings


def test_pictures_that_are_many_are_said_to_be_decoded_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", *[(200, 200)] * 10)
    with pytest.warns(UserWarning, match=r"pictures of .* take 1 MiB, more than data\.cache_mb=1: each image decodes"):
        data = random_crops(folder, cache_mb=1)
    assert data.train is not None and data.train.decoded is None


@pytest.mark.parametrize("crop", ["random", "tiles"])
@pytest.mark.parametrize("cache_mb", [0, 1024])
@pytest.mark.filterwarnings("ignore:the pictures of")
def test_broken_pictures_are_left_out_or_replaced(crop: str, cache_mb: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", *[(20, 20)] * 12)
    (folder / "03.png").write_bytes(b"no picture")
    whole = (folder / "06.png").read_bytes()
    (folder / "06.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="row 3 of"):
        data = random_crops(folder, crop=crop, cache_mb=cache_mb)
    assert data.train is not None
    if cache_mb:
        samples = [data.train[i] for i in range(len(data.train))]
        assert [index for _, index in samples] == list(range(len(samples)))
    else:
        with pytest.warns(UserWarning, match="row 6 of"):
            samples = [data.train[i] for i in range(len(data.train))]
        replaced = [i for i, (_, index) in enumerate(samples) if index == dataset.PADDING_INDEX]
        assert {data.train.split_row(i) for i in replaced} == {6}
    assert all(corner(image)[0] not in (3, 6) for image, _ in samples)


def test_large_jpegs_are_cropped_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a picture that is fitted anyhow may be decoded at half its size."""
    monkeypatch.setattr("ilvr_lightning.data.images.DRAFT_PIXELS", 1000)
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "JPEG")
    source = ImageSource("x", lambda row: file.getvalue(), range(1))
    for scale, expected in ((1, (40, 60)), (2, (20, 30)), ("fit", (8, 12))):
        settings = config("x", scale=scale, crop="random")
        assert source.size(0, settings) == source.decode(0, file.getvalue(), settings).shape[:2] == expected


# Settings and whole runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "data.scale must be fit or a number from 1: got 0.5"),
        ({"streaming": True, "crop": "tiles"}, "data.streaming=true has an image per row: give data.crop=random"),
        ({"crop": "corner"}, "expected one of"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(DataConfig, settings)


def test_a_run_that_is_resumed(train_run: TrainRun, tmp_path: Path) -> None:
    """One picture; the epoch ends in the middle of the pass."""
    settings = [f"data.path={write(tmp_path / 'one', (60, 90))}", "data.crop=random", "data.scale=1", "data.flip=both",
                "data.rotate90=true", "data.epoch_images=20"]  # fmt: skip
    straight = train_run("crops_straight", *settings, "trainer.max_epochs=2")
    resumed = train_run("crops_resumed", *settings)
    train_run("crops_resumed", *settings, "trainer.max_epochs=2", "resume=auto")
    assert_same_training(resumed, straight)


def test_rows_of_shards_are_unchanged(tmp_path: Path) -> None:
    """A step's rows are the same for random crops of pictures that have the size of an image."""
    write_shards(tmp_path, [48])
    plain, cropped = (set_up(config(tmp_path, batch_size=6, crop=crop), seed=3) for crop in ("center", "random"))
    assert [plain.rows_of(step) for step in range(8)] == [cropped.rows_of(step) for step in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(batches(plain), batches(cropped), strict=True))
