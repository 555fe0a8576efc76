"""Decoded images as a data set of PyTorch: their shape, and what takes the place of a broken one."""

from pathlib import Path

import datasets
import pytest
import torch

from ilvr_lightning.data.dataset import PADDING_INDEX, ImageDataset, collate
from ilvr_lightning.data.sources import open_source, open_split
from ilvr_lightning.errors import UserError
from tests.support.image_sets import data_config as config
from tests.support.image_sets import png, set_up, table
from tests.support.image_sets import reds as values


def test_broken_image_leaves_the_cache(one_broken: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        assert values(config(one_broken)) == ([0, 1, 3, 4], [50, 51])
    messages = "\n".join(str(w.message) for w in caught)
    assert "row 2 of" in messages
    assert "/train is skipped: an image cannot be read as an image" in messages
    assert "1 broken images skipped in" in messages


def test_broken_image_is_replaced_and_named_without_a_cache(one_broken: Path) -> None:
    data = set_up(config(one_broken, cache_mb=0))
    assert data.train is not None
    assert data.train.decoded is None
    with pytest.warns(
        UserWarning, match=r"row 2 of .*/train is skipped: an image cannot be read as an image"
    ) as caught:
        batch = collate([data.train[i] for i in range(5)])
    assert len(caught) == 1
    assert ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 1, 3, 3, 4]
    assert batch["index"].tolist() == [0, 1, PADDING_INDEX, 3, 4]


@pytest.mark.filterwarnings("ignore:row")
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
    rows = ImageDataset(open_source(settings, 0)[0], settings)
    image = collate([rows[0], rows[1]])["image"]
    assert (image.shape, image.dtype) == ((2, 1, 4, 6), torch.float32)
    assert -1 <= image.min() <= image.max() <= 1


def test_padding_is_an_image_that_counts_for_nothing(tmp_path: Path) -> None:
    table(3).to_parquet(tmp_path / "x.parquet")
    settings = config(tmp_path / "x.parquet")
    rows = ImageDataset(open_split(settings), settings)
    image, index = rows[-1]  # ValidationSampler's padding by image 0
    assert index == PADDING_INDEX
    assert torch.equal(image, rows[0][0])


def test_missing_file_of_a_row_counts_as_broken(tmp_path: Path) -> None:
    """A column of paths."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for split, rows in (("train", paths), ("test", paths[:1])):
        datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "set" / f"{split}.parquet")
    with (
        pytest.warns(UserWarning, match="1 broken images skipped in set/train"),
        pytest.warns(UserWarning, match="row 2 of set/train is skipped: .* No such file"),
    ):
        assert values(config(tmp_path / "set", image_column="image")) == ([0, 1], [0])
