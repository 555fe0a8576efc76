"""The pictures in data/: complete, without duplicates, and what the scripts beside them draw.

Needs the packages of data/requirements.txt.
"""

import hashlib
import importlib.util
import io
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

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
REFERENCES = sorted(CHECKSUMS["references"])


@cache
def script(name: str) -> ModuleType:
    """A script of data/, under the name by which the scripts import each other."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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


def test_sets_are_small() -> None:
    assert sum(parquet(name, split).stat().st_size for name, split in SPLITS) < 13e6


def test_no_picture_comes_twice() -> None:
    stored = [picture for name, split in SPLITS for picture in pixels(name, split)]
    assert len(set(stored)) == sum(COUNTS.values())


@pytest.mark.parametrize("name", ["toon", "animals"])
def test_no_shape_is_in_both_splits(name: str) -> None:
    drawing = script("make_sets").drawing
    train, test = (
        {tuple(drawing(name, split, index).parts.items()) for index in range(0, COUNTS[name, split], step)}
        for split, step in (("train", 20), ("test", 4))
    )
    assert min(len(train), len(test)) > 50
    assert not train & test


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_script_draws_the_stored_pictures(name: str, split: str) -> None:
    sets, count = script("make_sets"), COUNTS[name, split]
    for index in (0, 1, count // 3, count // 2, count - 2, count - 1):
        assert sets.decoded(sets.encoded(sets.draw(name, split, index))) == pixels(name, split)[index], index


def test_references_are_those_listed() -> None:
    script("make_sets")
    assert sorted(path.stem for path in (DATA / "references").glob("*.png")) == REFERENCES
    assert sorted(script("make_references").REFERENCES) == REFERENCES


@pytest.mark.parametrize("name", REFERENCES)
def test_script_draws_the_stored_reference(name: str) -> None:
    script("make_sets")
    with Image.open(DATA / "references" / f"{name}.png") as stored:
        assert (stored.mode, stored.size) == ("RGB", (256, 256))
        kept = stored.tobytes()
    assert hashlib.sha256(kept).hexdigest() == CHECKSUMS["references"][name]
    assert script("make_references").REFERENCES[name]().tobytes() == kept
