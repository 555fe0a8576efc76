"""What the tests of sample.py share: running it, and reading what it left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample

Images = dict[str, NDArray[np.int64]]
"""Images (H, W, C) or (H, W) by their names."""


def flags(checkpoint: Path, out: Path, *argv: object) -> list[str]:
    """sample.py's flags for four steps on the CPU, and more."""
    return [str(word) for word in ("--ckpt", checkpoint, "--steps", 4, "--device", "cpu", "--out", out, *argv)]


def sample_into(checkpoint: Path, out: Path, *argv: object, status: int = 0) -> Path:
    """Run sample.py in this process; returns the folder."""
    assert sample.main(flags(checkpoint, out, *argv)) == status
    return out


def index(folder: Path) -> list[dict[str, Any]]:
    """The lines of metadata.jsonl, the recipe of each read as JSON."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [{**line, "recipe": json.loads(line["recipe"])} for line in lines]


def listed(folder: Path) -> list[str]:
    """The files that metadata.jsonl lists."""
    return [line["file_name"] for line in index(folder)]


def pixels(path: Path) -> NDArray[np.int64]:
    """An image's values."""
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int64)


def images(folder: Path) -> Images:
    """Every image that metadata.jsonl lists, by its name without subfolder and ending; no two have one name."""
    found = {Path(name).stem: pixels(folder / name) for name in listed(folder)}
    assert len(found) == len(listed(folder))
    return found


def difference(a: Images, b: Images) -> int:
    """The most that two runs differ, in 255ths; they have the same images."""
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


def leftovers(folder: Path) -> list[str]:
    """Hidden files below a folder, which a finished run leaves none of."""
    return [str(path) for path in folder.rglob(".*")]


def with_recipe(image: Path, target: Path, text: str) -> Path:
    """A copy of an image that holds another text in place of its recipe."""
    info = PngInfo()
    info.add_text("ilvr_lightning", text)
    with Image.open(image) as opened:
        opened.save(target, pnginfo=info)
    return target


def recipe_text(image: Path) -> dict[str, Any]:
    """The recipe in a PNG."""
    with Image.open(image) as opened:
        recipe: dict[str, Any] = json.loads(opened.info["ilvr_lightning"])
    return recipe
