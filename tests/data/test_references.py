"""References found in files, folders and data sets: their names, their faults, and when they are read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ilvr_lightning.data import references as module
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import BrokenImageError
from ilvr_lightning.data.references import Place, References, find_images, find_references
from ilvr_lightning.errors import UserError
from tests.support.image_sets import table

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()

    def names(*patterns: str) -> list[str]:
        return [p.name for p in find_images([str(tmp_path / p) for p in patterns])]

    assert names(".") == ["a.JPG", "b.png", "c.webp"]
    assert names("*.png", ".", "note.txt") == ["b.png", "a.JPG", "c.webp", "note.txt"]
    with pytest.raises(UserError, match=r"--ref: there is no file or folder .*nothing\.png"):
        names("nothing.png")
    for pattern in ("empty", "*.gif"):
        with pytest.raises(UserError, match=r"grid\.references: no images in .*known endings"):
            find_images([str(tmp_path / pattern)], "grid.references")


@pytest.fixture
def named_alike(tmp_path: Path) -> list[str]:
    """Four files called x.png, of which two are equal, and one called y.png."""
    for folder, colour in (("a", RED), ("b", RED), ("c", BLUE), ("d", (9, 9, 9))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / folder / "x.png")
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a" / "y.png")
    return [str(tmp_path / folder) for folder in "abcd"]


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two references for many."""
    monkeypatch.setattr(module, "EAGER_LIMIT", 2)


def find(given: Sequence[str], **options: Any) -> References:
    return find_references(given, (3, 4, 4), **options)


def colours(references: References) -> list[tuple[int, ...]]:
    return [tuple(reference.pixels[0, 0].tolist()) for reference in references]


def test_equal_references_are_kept_once(named_alike: list[str]) -> None:
    references = find(named_alike)
    assert references.all_validated
    assert [r.name for r in references] == ["x", "y", "x", "x"]
    assert colours(references) == [RED, RED, BLUE, (9, 9, 9)]
    assert [references.name_is_ambiguous(i) for i in range(4)] == [True, False, True, True]
    alone = find(named_alike[:2])
    assert [r.name for r in alone] == ["x", "y"]
    assert not any(map(alone.name_is_ambiguous, range(2)))  # the other x is this one


@pytest.mark.usefixtures("lazy")
def test_names_of_many_references_need_no_reading(named_alike: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    references = find(named_alike)
    with monkeypatch.context() as patched:
        patched.setattr(module, "open_image", lambda source: pytest.fail("it was read"))
        assert not references.all_validated
        assert [references.name(i) for i in range(len(references))] == ["x", "y", "x", "x", "x"]
        assert [references.name_is_ambiguous(i) for i in range(5)] == [True, False, True, True, True]
    assert colours(references) == [RED, RED, RED, BLUE, (9, 9, 9)]
    assert references[0].key == references[2].key  # equal noise and an equal name: one sample, written twice


@pytest.mark.usefixtures("lazy")
def test_many_references_are_read_when_they_are_needed(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (4, 4), RED).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    references = find([str(tmp_path)])
    assert [references[i].name for i in (0, 2)] == ["a", "c"]
    with pytest.raises(BrokenImageError, match=r"^\S*b\.png cannot be read as an image"):
        references[1]
    references = find([str(tmp_path)])
    (tmp_path / "c.png").unlink()
    with pytest.raises(BrokenImageError, match=r"c\.png cannot be read as an image: .*No such file"):
        references[2]


def test_faults_of_few_references_are_known_at_the_start(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match=r"b\.png cannot be read as an image"):
        find([str(tmp_path)])


def test_references_are_sequences(named_alike: list[str]) -> None:
    references = find(named_alike)
    assert [r.key for r in references[1:3]] == [references[i].key for i in (1, 2)]
    assert references[-1].key == references[3].key
    assert len(References()) == len(list(References())) == 0
    with pytest.raises(IndexError):
        references[4]


@pytest.mark.parametrize("limit", [2, 1000])
def test_several_sources_in_order(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EAGER_LIMIT", limit)
    table(9, first=100).to_parquet(tmp_path / "set" / "train.parquet")
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), BLUE).save(tmp_path / "b.png")
    references = find([str(tmp_path / "a.png"), f"{tmp_path / 'set'}:train[3:6]", str(tmp_path / "b.png")])
    assert [references.name(i) for i in range(5)] == ["a", "train_3", "train_4", "train_5", "b"]
    assert [colour[0] for colour in colours(references)] == [255, 103, 104, 105, 0]


@pytest.mark.parametrize(
    ("rows", "names"),
    [("", range(4)), ("[:]", range(4)), ("[2:]", (2, 3)), ("[:1]", (0,)), ("[1:99]", (1, 2, 3))],
)
def test_rows_of_a_data_set(rows: str, names: Sequence[int], tmp_path: Path) -> None:
    """No row is held out of a split that is the only one."""
    table(4).to_parquet(tmp_path / "train.parquet")
    references = find([f"{tmp_path}:train{rows}"])
    assert [references.name(i) for i in range(len(references))] == [f"train_{row}" for row in names]
    assert [colour[0] for colour in colours(references)] == list(names)


def test_images_of_a_config_are_those_of_its_training(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    config = tmp_path / "config.yaml"
    settings: dict[str, Any] = {"path": str(tmp_path), "image_size": 8, "scale": 2, "crop": "random", "batch_size": 1}
    config.write_text(f"data: {json.dumps(settings)}\ngrid: {{factors: [4]}}\nmodel: {{attention_resolutions: []}}")
    data = ImageDataModule(**settings)
    data.setup()
    assert data.train is not None and data.validation is not None
    for split, images in (("train", data.train), ("validation", data.validation)):
        found = find_references([f"{config}:{split}"], (3, 8, 8))
        assert [r.name for r in found[:2]] == [f"{split}_0", f"{split}_1"]
        expected = torch.stack([images[i][0] for i in range(len(images))])
        assert torch.equal(torch.stack([r.tensor for r in found]), expected)
    with pytest.raises(UserError, match=r"^--ref \S+:test: the splits of a config are train and validation$"):
        find_references([f"{config}:test"], (3, 8, 8))


def test_data_sets_that_give_no_reference(tmp_path: Path) -> None:
    values = [{"bytes": b"no image", "path": None}] * 3
    broken = datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image())
    broken.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(BrokenImageError, match=r"^row 1 of .*/train: an image cannot be read as an image"):
        find([f"{tmp_path}:train[1:]"])
    with pytest.raises(UserError, match=r"^--ref \S+:train\[3:\]: it holds 3 images, and the range asked for is empty"):
        find([f"{tmp_path}:train[3:]"])
    with pytest.raises(UserError, match=r"^--calibrate \S+:dev: data\.split='dev' is not in .*: it has train"):
        find([f"{tmp_path}:dev"], flag="--calibrate")
    with pytest.raises(UserError, match=r"^--ref nothing:here/at:all: data\.path=nothing:here/at: there is no such"):
        find(["nothing:here/at:all"])


def test_masks_of_references(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (4, 4), RED).save(tmp_path / f"{name}.png")
    left, right = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    left[:, :2] = right[:, 2:] = 255
    for name, mask in (("left", left), ("right", right)):
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")

    def masked(*masks: str) -> list[bool]:
        given = [str(tmp_path / "masks" / mask) for mask in masks]
        references = find([str(tmp_path / f"{name}.png") for name in "ab"], masks=given)
        return [r.mask is not None and (r.mask[:, :, 0] == left).all() for r in references]

    assert masked("left.png") == [True, True]
    assert masked("left.png", "right.png") == [True, False]
    assert masked() == [False, False]
    with pytest.raises(UserError, match=r"--mask: got 2 masks for 3 references; give one for all, or one for each"):
        find([str(tmp_path / "?.png"), str(tmp_path / "masks" / "left.png")], masks=[str(tmp_path / "masks")])
    with pytest.raises(UserError, match="--mask: there is no file or folder"):
        masked("nothing.png")


@pytest.mark.parametrize("name", ["x" * 201, "a\x1bb", "a\nb"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError, match=r"--ref: the file name .* is too long, or has characters that cannot be"):
        References([Place(name, ImageSource("files", lambda row: b"", [0]), 0)])
