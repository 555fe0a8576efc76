"""The rows of Parquet shards: what is trained on, what is held out, and what cannot be streamed."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import read_image, to_pixels
from ilvr_lightning.data.shards import open_shards
from ilvr_lightning.errors import UserError
from tests.support.image_sets import ROWS, Hub, png, red, set_up, write_shards
from tests.support.image_sets import stream_config as config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


def row_at(source: ImageSource, row: int) -> int:
    return int(to_pixels(read_image(source.image_bytes(row)))[0, 0, 0])


def held_out(settings: DataConfig) -> list[int]:
    """The red of each image that is validated on."""
    validation = open_shards(settings)[1]
    return [row_at(validation, row) for row in range(len(validation))]


def trained_rows(data: ImageDataModule, steps: int) -> set[int]:
    return {row for step in range(steps) for row in data.rows_of(step)}


def test_last_rows_are_held_out_whatever_the_seed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(shards, validation_fraction=0.1)
    for seed in (0, 1):
        data = set_up(settings, seed)
        assert data.counts == "45 images to train on (streamed from 5 Parquet shards), 5 to validate on"
        assert not {45, 46, 47, 48, 49} & trained_rows(data, 14)
    assert held_out(settings) == list(open_shards(settings)[1].split_rows) == [45, 46, 47, 48, 49]
    reference = data.references([])[0]
    assert (reference.name, int(reference.pixels[0, 0, 0])) == ("validation_0", 45)
    monkeypatch.setattr("ilvr_lightning.data.shards.MAX_VALIDATION_ROWS", 2)
    assert held_out(settings) == [48, 49]
    assert len(open_shards(settings)[0]) == 48


def test_held_out_rows_over_several_shards(shards: Path) -> None:
    settings = config(shards, validation_fraction=0.7)
    assert held_out(settings) == list(range(15, 50))
    data = set_up(settings)
    assert len(data.rows_of(0) + data.rows_of(1)) == len(trained_rows(data, 2)) == 12
    assert max(trained_rows(data, 2)) < 15


def test_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)
    write_shards(tmp_path, [0, 3, 4], "validation")
    assert held_out(config(tmp_path)) == [0, 1, 2, 3, 4, 5, 6]
    assert len(open_shards(config(tmp_path))[0]) == ROWS
    monkeypatch.setattr("ilvr_lightning.data.shards.MAX_VALIDATION_ROWS", 4)
    assert held_out(config(tmp_path)) == [0, 1, 2, 3]
    assert held_out(config(tmp_path, split="validation", validation_split="train", batch_size=2)) == [0, 1, 2, 3]


def test_file_and_glob(shards: Path) -> None:
    settings = config(shards / "train-00004-of-00005.parquet")
    assert (len(open_shards(settings)[0]), held_out(settings)) == (28, [49])  # its rows are 21 to 49
    assert len(open_shards(config(shards / "*-0000[24]-*.parquet"))[0]) == 40


def test_rows_at_random(shards: Path) -> None:
    """The benchmarks take them so."""
    rows = (0, 7, 8, 20, 21, 46)
    data = set_up(config(shards))
    assert data.train is not None
    assert tuple(red(data.train[row][0]) for row in rows) == rows
    source = open_shards(config(shards))[0]
    assert tuple(row_at(source.select(rows), i) for i in range(6)) == rows


def test_columns_of_other_kinds(tmp_path: Path) -> None:
    """Bytes alone, and structs that no data set's metadata calls images."""
    values = [png(row) for row in range(8)]
    pq.write_table(pa.table({"jpg": values, "text": ["x"] * 8}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"picture": [{"bytes": v, "path": "x"} for v in values]}), tmp_path / "b.parquet")
    for name, column in (("a", "jpg"), ("b", None)):
        source = open_shards(config(tmp_path / f"{name}.parquet", image_column=column, batch_size=2))[0]
        assert [row_at(source, row) for row in range(7)] == list(range(7))
    with pytest.raises(
        UserError, match=r"data\.image_column must name .*: got None; .* has jpg, text, and images in none"
    ):
        open_shards(config(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"data\.image_column must name "):
        open_shards(config(tmp_path / "*.parquet"))


def test_columns_that_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        column = f"image_{name}"
        pq.write_table(pa.table({column: [{"bytes": png(1), "path": "x"}] * 4}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"data\.image_column=image_a is in .*a\.parquet, but not in .*b\.parq"):
        open_shards(config(tmp_path / "*.parquet"))


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "arrow")
    for path in (tmp_path, tmp_path / "arrow"):
        with pytest.raises(UserError, match=r"data\.streaming=true needs Parquet files, and .* none; leave out data"):
            open_shards(config(path))
    for name in ("*.png", "x.png"):
        with pytest.raises(UserError, match="give Parquet or Arrow files"):
            open_shards(config(tmp_path / name))
    with pytest.raises(ValueError, match=r"data\.streaming=true reads every row.* leave out data\.label \(got 'cat'\)"):
        config(tmp_path, label="cat")
    (tmp_path / "x.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as a Parquet file: "):
        open_shards(config(tmp_path / "x.parquet"))
    for missing in ("missing/folder/of", "/no/such", "./missing", "x.parquet"):
        with pytest.raises(UserError, match="there is no such folder or file"):
            open_shards(config(missing))


def test_splits_and_columns_that_do_not_exist(shards: Path, tmp_path: Path) -> None:
    for setting in ("split", "validation_split"):
        with pytest.raises(UserError, match=rf"data\.{setting}='dev' is not in .*: it has train"):
            open_shards(config(shards, **{setting: "dev"}))
    with pytest.raises(UserError, match=r"data\.image_column must name .*: got 'msk'; .* has image, caption,"):
        open_shards(config(shards, image_column="msk"))
    write_shards(tmp_path, [1, 0])
    with pytest.raises(UserError, match="holds 1 image; at least 2"):
        open_shards(config(tmp_path))


# The Hub


def test_set_that_is_no_parquet(hub: Hub) -> None:
    hub({"train": ["hf://datasets/someone/pictures@main/train.tar"]})
    with pytest.raises(UserError, match=r"needs Parquet files, .* or give the Hub's conversion of the data set"):
        open_shards(config("someone/pictures"))


def test_address_of_a_conversion(on_hub: list[str]) -> None:
    path = "hf://datasets/someone/pictures@refs/convert/parquet/default/train/*.parquet"
    assert open_shards(config(path))[0].files == on_hub


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing .*the Hub cannot be reached"):
        open_shards(config("nobody/nothing"))
