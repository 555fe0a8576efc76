"""The images of a Hugging Face split: their column, their class, and what is said of a row that cannot be read."""

from pathlib import Path

import datasets
import pytest

from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import BrokenImageError
from ilvr_lightning.errors import UserError
from tests.support.image_sets import data_config as config
from tests.support.image_sets import png, table
from tests.support.image_sets import reds as values


def test_folders_of_classes(classes: Path) -> None:
    train, validation = values(config(classes))
    assert sorted(train + validation) == [*range(5), *range(100, 105)]
    train, validation = values(config(classes, label="dog"))
    assert sorted(train + validation) == [*range(100, 105)]
    with pytest.raises(UserError, match=r"data\.label='fox' is not in .*: its classes are cat, dog"):
        values(config(classes, label="fox"))


def test_label_without_classes(tmp_path: Path) -> None:
    table(3, title=["a", "b", "c"]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"data\.label='dog' is not in .*: its classes are none"):
        values(config(tmp_path / "x.parquet", label="dog"))


def test_image_columns(tmp_path: Path) -> None:
    rows = [{"bytes": png(100 + i), "path": None} for i in range(3)]
    both = table(3, mask=rows, title=["a", "b", "c"]).cast_column("mask", datasets.Image())
    both.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"must name .*: got None; .* has image, mask, title, and images in image, mask"
    ):
        values(config(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"data\.image_column must name the column of the images: got 'msk'"):
        values(config(tmp_path / "x.parquet", image_column="msk"))
    assert sorted(sum(values(config(tmp_path / "x.parquet", image_column="mask")), [])) == [100, 101, 102]


def test_column_of_another_kind(tmp_path: Path) -> None:
    table(3, title=["a", "b", "c"], number=[1, 2, 3]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"got 'number'; .* has image, title, number, and images in image"):
        values(config(tmp_path / "x.parquet", image_column="number"))
    with pytest.raises(UserError, match="no image in it can be read"):  # texts may be paths
        values(config(tmp_path / "x.parquet", image_column="title"))


def test_selections_of_selections_keep_the_numbers_of_their_split(tmp_path: Path) -> None:
    source = ImageSource("x/train", lambda row: bytes([row]), range(10), "fingerprint")
    selected = source.select([1, 3, 5, 7, 9]).select([4, 0, 2])
    assert list(selected.split_rows) == [9, 1, 5]
    assert [selected.image_bytes(row) for row in range(len(selected))] == [b"\x09", b"\x01", b"\x05"]
    with pytest.raises(BrokenImageError, match=r"row 1 of x/train is skipped: an image cannot be read"):
        selected.decode(1, selected.image_bytes(1), config(tmp_path))


def test_fingerprints_are_equal_for_equal_rows_alone() -> None:
    source = ImageSource("x/train", lambda row: b"", range(10), "fingerprint")
    known = [
        s.fingerprint for s in (source, source.select([1, 2]), source.select([2, 1]), source.select([1]).select([0]))
    ]
    assert len(set(known)) == len(known)
    assert source.select([1, 2]).fingerprint == source.select([1, 2]).fingerprint
    assert ImageSource("x/train", lambda row: b"", range(10)).select([1]).fingerprint is None
