"""The images in data/: complete and without duplicates. data/tools has the test that the scripts draw them."""

import hashlib
import io
import json
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.paths import ROOT

DATA = ROOT / "data"
COUNTS = {
    ("toon", "train"): 5000,
    ("toon", "test"): 500,
    ("animals", "train"): 4000,
    ("animals", "test"): 400,
}
SPLITS = list(COUNTS)
CHECKSUMS = json.loads((DATA / "checksums.json").read_text())
REFERENCES = [(folder, name) for folder in ("references", "maps") for name in sorted(CHECKSUMS[folder])]


def parquet(name: str, split: str) -> Path:
    return DATA / name / f"{split}-00000-of-00001.parquet"


@cache
def pixels(name: str, split: str) -> list[bytes]:
    """The decoded pictures of one split; each has to be RGB of 64 by 64."""
    result = []
    for row in pq.read_table(parquet(name, split))["image"].to_pylist():
        picture = Image.open(io.BytesIO(row["bytes"]))
        assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (64, 64)), row["path"]
        result.append(picture.tobytes())
    return result


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_split_has_the_hubs_layout(name: str, split: str) -> None:
    schema = pq.read_schema(parquet(name, split))
    assert schema.names == ["image"]
    assert {field.name: str(field.type) for field in schema.field("image").type} == {
        "bytes": "binary",
        "path": "string",
    }
    assert json.loads(schema.metadata[b"huggingface"]) == {"info": {"features": {"image": {"_type": "Image"}}}}


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_split_is_complete(name: str, split: str) -> None:
    stored = pixels(name, split)
    assert len(stored) == COUNTS[name, split]
    digest = hashlib.sha256(b"".join(stored)).hexdigest()
    assert CHECKSUMS[name][split] == {"count": len(stored), "sha256": digest}


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_image_has_attributes(name: str, split: str) -> None:
    file = DATA / name / "attributes.json"
    assert file.stat().st_size < 100e3
    content = json.loads(file.read_text())
    assert set(content) == {"shapes", "train", "test"}
    for part, shapes in content["shapes"].items():
        codes = content[split][part]
        assert len(codes) == COUNTS[name, split]
        assert set(codes) <= set(range(len(shapes)))


def test_sets_are_small() -> None:
    assert sum(parquet(name, split).stat().st_size for name, split in SPLITS) < 13e6


def test_no_picture_comes_twice() -> None:
    stored = [picture for name, split in SPLITS for picture in pixels(name, split)]
    assert len(set(stored)) == sum(COUNTS.values())


def test_references_are_those_listed() -> None:
    assert sorted((p.parent.name, p.stem) for f in ("references", "maps") for p in (DATA / f).iterdir()) == sorted(
        REFERENCES
    )


@pytest.mark.parametrize(("folder", "name"), REFERENCES)
def test_reference_is_what_was_drawn(folder: str, name: str) -> None:
    with Image.open(DATA / folder / f"{name}.png") as stored:
        assert (stored.mode, stored.size) == ("RGB", (256, 256))
        assert hashlib.sha256(stored.tobytes()).hexdigest() == CHECKSUMS[folder][name]


def test_the_map_is_whole() -> None:
    with Image.open(DATA / "relief" / "relief.jpg") as image:
        assert (image.mode, image.size) == ("RGB", (5400, 2080))
        assert hashlib.sha256(image.tobytes()).hexdigest() == CHECKSUMS["relief"]
