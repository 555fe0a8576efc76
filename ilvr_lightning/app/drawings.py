"""Drawings of the page's editor, made a reference whose transparency is the mask."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from ilvr_lightning.data.images import open_image
from ilvr_lightning.errors import UserError

MAX_SIDE = 2048
"""A drawing has at most this many pixels per side."""
MAX_LAYERS = 8
"""It has at most this many layers."""
LAYERS = ("Paint", "Mask")
"""The layers of the editor: what is painted, and what the model may change freely."""


def save_drawing(background: str | None, layers: Sequence[str | None], folder: Path) -> Path:
    """Write a drawing as a PNG: white paper, the background, the paint on it, and nothing where it is masked.

    Args:
        background: a picture, if there is one.
        layers: as in LAYERS, all of the background's size; layers that are absent are empty.
        folder: where the file goes.

    Returns:
        The file, whose name begins with "drawing".

    Raises:
        UserError: nothing is drawn, everything is masked, or a layer cannot be read or is too large.
    """
    if len(layers) > MAX_LAYERS:
        raise UserError(f"the drawing has {len(layers)} layers; draw on at most {MAX_LAYERS}")
    parts = [None if layer is None else _read(Path(layer)) for layer in (background, *layers)]
    sizes = {part.size for part in parts if part is not None}
    if len(sizes) != 1 or not any(part and part.getchannel("A").getbbox() for part in parts):
        raise UserError("nothing is drawn yet; paint something, or put a picture under it")
    paper = Image.new("RGBA", sizes.pop(), "white")
    for part in (*parts[:2], *parts[3:]):
        if part is not None:
            paper.alpha_composite(part)
    for mask in filter(None, parts[2:3]):
        paper.putalpha(ImageChops.invert(mask.getchannel("A")))
    with tempfile.NamedTemporaryFile(dir=folder, prefix="drawing_", suffix=".png", delete=False) as file:
        paper.save(file, "PNG")
    return Path(file.name)


def _read(source: Path) -> Image.Image:
    with open_image(source) as image:
        if max(image.size) > MAX_SIDE:
            raise UserError(f"the drawing has {image.width}x{image.height} pixels; draw on at most {MAX_SIDE}")
        return image.convert("RGBA")
