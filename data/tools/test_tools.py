"""The scripts of this folder draw the images of data/. Needs requirements.txt; run by make test-data."""

import io
import json
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import make_references
import make_relief
import make_sets

DATA = Path(__file__).resolve().parents[1]
COUNTS = {
    ("toon", "train"): 5000,
    ("toon", "test"): 500,
    ("animals", "train"): 4000,
    ("animals", "test"): 400,
}


@cache
def pixels(name: str, split: str) -> list[bytes]:
    """The decoded images of one split."""
    table = pq.read_table(DATA / name / f"{split}-00000-of-00001.parquet")
    return [Image.open(io.BytesIO(row["bytes"])).tobytes() for row in table["image"].to_pylist()]


@pytest.mark.parametrize("name", ["toon", "animals"])
def test_no_shape_is_in_both_splits(name: str) -> None:
    train, test = (
        {tuple(make_sets.drawing(name, split, index).parts.items()) for index in range(0, COUNTS[name, split], step)}
        for split, step in (("train", 20), ("test", 4))
    )
    assert min(len(train), len(test)) > 50
    assert not train & test


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_script_draws_the_stored_images(name: str, split: str) -> None:
    count = COUNTS[name, split]
    for index in (0, 1, count // 3, count // 2, count - 2, count - 1):
        drawn = make_sets.decoded(make_sets.encoded(make_sets.draw(name, split, index)))
        assert drawn == pixels(name, split)[index], index


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_attributes_are_those_of_the_drawings(name: str, split: str) -> None:
    stored = json.loads((DATA / name / "attributes.json").read_text())
    for index in range(0, COUNTS[name, split], 20):
        parts = {part: shapes[stored[split][part][index]] for part, shapes in stored["shapes"].items()}
        assert parts == make_sets.drawing(name, split, index).parts, index


@pytest.mark.parametrize(("folder", "name"), [(f, n) for f, names in make_references.PICTURES.items() for n in names])
def test_script_draws_the_stored_reference(folder: str, name: str) -> None:
    with Image.open(DATA / folder / f"{name}.png") as stored:
        assert make_references.PICTURES[folder][name]().tobytes() == stored.tobytes()


def test_script_crops_the_stored_map() -> None:
    with Image.open(io.BytesIO(make_relief.relief())) as made, Image.open(make_relief.TARGET) as stored:
        assert made.tobytes() == stored.tobytes()
