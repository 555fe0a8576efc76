"""Drawings become references whose transparency is the mask."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.app.drawings import save_drawing
from ilvr_lightning.errors import UserError

Layer = Callable[[str, tuple[int, int, int, int], str], str]


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    """Saves a transparent layer of 8 by 8 pixels with a box of a colour in it."""

    def save(name: str, box: tuple[int, int, int, int], colour: str) -> str:
        image = Image.new("RGBA", (8, 8))
        if box[2]:
            image.paste(colour, box)
        image.save(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_paint_mask_and_paper(layer: Layer, tmp_path: Path) -> None:
    paint, mask = layer("a.png", (0, 0, 4, 8), "red"), layer("b.png", (0, 0, 8, 2), "black")
    pixels = np.asarray(Image.open(save_drawing(None, [paint, mask], tmp_path)))
    assert pixels[5, 1].tolist() == [255, 0, 0, 255]
    assert pixels[5, 6].tolist() == [255, 255, 255, 255]
    assert (pixels[:2, :, 3] == 0).all() and (pixels[2:, :, 3] == 255).all()


def test_a_picture_under_it(layer: Layer, tmp_path: Path) -> None:
    under, paint = layer("a.png", (0, 0, 8, 8), "blue"), layer("b.png", (0, 0, 2, 8), "red")
    pixels = np.asarray(Image.open(save_drawing(under, [paint], tmp_path)))
    assert pixels[0, 0].tolist() == [255, 0, 0, 255] and pixels[0, 7].tolist() == [0, 0, 255, 255]


def test_what_cannot_be_used(layer: Layer, tmp_path: Path) -> None:
    empty, other = layer("a.png", (0, 0, 0, 0), "red"), tmp_path / "other.png"
    Image.new("RGBA", (9, 9), "red").save(other)
    for background, layers in ((None, []), (None, [empty, empty]), (str(other), [empty])):
        with pytest.raises(UserError, match="nothing is drawn"):
            save_drawing(background, layers, tmp_path)
    with pytest.raises(UserError, match="9 layers"):
        save_drawing(None, [empty] * 9, tmp_path)
    Image.new("1", (2049, 1)).save(other)
    with pytest.raises(UserError, match="2049x1"):
        save_drawing(str(other), [], tmp_path)
