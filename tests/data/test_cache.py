"""Images that are decoded once: into a file that later runs map, or into memory."""

import errno
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ilvr_lightning.data.dataset import ImageDataset
from ilvr_lightning.data.image_source import ImageSource
from tests.support.image_sets import data_config as config
from tests.support.image_sets import set_up


def test_decoded_once_and_mapped(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to come decodes nothing and sees the same; another size is another file."""
    cache = tmp_path / "decoded"

    def rows(image_size: int = 8) -> tuple[ImageDataset, ImageDataset]:
        data = set_up(config(classes, image_size=image_size), cache=cache)
        assert data.train is not None and data.validation is not None
        return data.train, data.validation

    plain = set_up(config(classes))
    first = rows()
    with monkeypatch.context() as patched:
        patched.setattr(ImageSource, "decode", lambda *_: pytest.fail("decoded again"))
        second = rows()
    assert plain.train is not None and plain.validation is not None
    for a, b, c in zip((plain.train, plain.validation), first, second, strict=True):
        assert a.decoded is not None and b.decoded is not None and c.decoded is not None
        assert isinstance(c.decoded, np.memmap)
        np.testing.assert_array_equal(a.decoded, b.decoded)
        np.testing.assert_array_equal(a.decoded, c.decoded)
        torch.testing.assert_close(a[0][0], c[0][0], rtol=0, atol=0)
    assert len(list(cache.glob("*.npy"))) == 2
    rows(image_size=4)
    assert len(list(cache.glob("*.npy"))) == 4
    assert not list(cache.glob("*partial*"))


def test_what_was_broken_is_tried_again(one_broken: Path, tmp_path: Path) -> None:
    """Nothing that may be mended is kept."""
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 broken images skipped in .*/train"):
            data = set_up(config(one_broken), cache=tmp_path / "decoded")
        assert data.train is not None
        assert len(data.train) == 4
        assert data.train.source.split_rows == [0, 1, 3, 4]
    assert len(list((tmp_path / "decoded").glob("*.npy"))) == 1  # of the validation images


def test_files_behind_a_column_of_paths_are_read_each_time(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"image": paths}).to_parquet(tmp_path / "set" / f"{split}.parquet")
    seen = []
    for shade in (10, 200):
        for path in paths:
            Image.new("RGB", (8, 8), (shade,) * 3).save(path)
        data = set_up(config(tmp_path / "set", image_column="image"), cache=tmp_path / "decoded")
        assert data.train is not None and data.train.decoded is not None
        seen.append(int(np.max(data.train.decoded)))
    assert seen == [10, 200]


def test_full_disk(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match=r"stay in memory: .* cannot be written \(No space left on device\)"):
        data = set_up(config(classes), cache=tmp_path / "decoded")
    assert data.train is not None and data.train.decoded is not None
    assert {path.suffix for path in (tmp_path / "decoded").iterdir()} == {".lock"}


def test_decoded_stay_in_memory_where_nothing_can_be_written(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="decoded images stay in memory"):
        data = set_up(config(classes), cache=tmp_path / "file")
    assert data.train is not None
    assert data.train.decoded is not None and not isinstance(data.train.decoded, np.memmap)


@pytest.mark.parametrize("harm", ["truncated", "empty", "deleted"])
def test_harmed_file_is_made_again(harm: str, classes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "decoded"

    def first() -> Tensor:
        data = set_up(config(classes), cache=cache)
        assert data.train is not None and isinstance(data.train.decoded, np.memmap)
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
    torch.testing.assert_close(first(), expected, rtol=0, atol=0)


def test_another_range_of_values_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(3):
        np.save(tmp_path / "set" / f"{i}.npy", np.full((8, 8), 1000 + i, np.uint16))
    seen = []
    for value_range in ((0, 2000), (0, 4000), (0, 2000)):
        data = set_up(config(tmp_path / "set", value_range=value_range), cache=tmp_path / "decoded")
        assert data.train is not None
        seen.append(float(data.train[0][0].mean()))
    assert seen[0] == seen[2] > seen[1]
    assert len(list((tmp_path / "decoded").glob("*.npy"))) == 4
