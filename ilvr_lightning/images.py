"""Pictures in and out: reading with care, [-1, 1] <-> 8 bits, labelled grids."""

import io
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ilvr_lightning.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
Fit = Literal["crop", "pad"]
Pixels = NDArray[np.uint8]
Decoded = TypeVar("Decoded")


class BrokenImageError(UserError):
    """A file that claims to be an image and is none."""


class _NoWarnings:
    """Pillow's warnings (of odd metadata, of sizes that are no bomb yet) ignored, by any number of threads at once.

    warnings.catch_warnings is one thread's: two that overlap leave the filters of the one to the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_no_warnings = _NoWarnings()


def read_image(source: Path | bytes, channels: int = 3) -> Image.Image:
    """Read a picture as RGB or greyscale, upright, transparent parts over white, 16 bits scaled to 8.

    Args:
        source: a file, or its bytes.
        channels: 3 or 1.

    Raises:
        BrokenImageError: it cannot be decoded.
    """
    return decoded(source, lambda image: convert(image, channels))


def decoded(source: Path | bytes, use: Callable[[Image.Image], Decoded]) -> Decoded:
    """What is made of a picture once it is decoded.

    Raises:
        BrokenImageError: it cannot be decoded.
    """
    try:
        with (
            _no_warnings,
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image,
        ):
            image.load()
            return use(image)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged files
        name = "an image" if isinstance(source, bytes) else str(source)
        raise BrokenImageError(f"{name} cannot be read as an image: {str(error).partition(chr(10))[0]}") from error


def convert(image: Image.Image, channels: int = 3) -> Image.Image:
    """Any mode to RGB (channels=3) or L (channels=1), EXIF rotation applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        highest = 65535 if image.mode.startswith("I;16") else None
        image = Image.fromarray(_to_eight_bits(np.asarray(image, dtype=np.float64), highest))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _to_eight_bits(values: NDArray[np.float64], highest: int | None) -> Pixels:
    """Greyscale whose white is known, or the least of the usual ones that all values are below."""
    if highest is None:
        highest = next((white for white in (1, 255) if values.max(initial=0) <= white), 65535)
    return np.clip(np.rint(values * (255 / highest)), 0, 255).astype(np.uint8)


def fit_image(image: Image.Image, size: tuple[int, int], fit: Fit = "crop") -> Image.Image:
    """Resize with antialias to (height, width): cover and crop to the centre, or fit inside white margins."""
    width_height = (size[1], size[0])
    if fit == "crop":
        return ImageOps.fit(image, width_height, Image.Resampling.LANCZOS)
    return ImageOps.pad(image, width_height, Image.Resampling.LANCZOS, color="white")


def fit_mask(mask: Image.Image, size: tuple[int, int], fit: Fit = "crop") -> Image.Image:
    """The same for a mask: without overshoot, and with black margins, which are no part of the picture."""
    width_height = (size[1], size[0])
    if fit == "crop":
        return ImageOps.fit(mask, width_height, Image.Resampling.BILINEAR)
    return ImageOps.pad(mask, width_height, Image.Resampling.BILINEAR, color="black")


def to_pixels(image: Image.Image) -> Pixels:
    """(H, W, C) 8-bit array."""
    pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def to_tensor(pixels: Pixels) -> Tensor:
    """(..., H, W, C) 8-bit to (..., C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(np.moveaxis(pixels, -1, -3), order="C")).float() / 127.5 - 1


def from_tensor(x: Tensor) -> Pixels:
    """(..., C, H, W) in [-1, 1] to (..., H, W, C) 8-bit, clipped and rounded."""
    scaled = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.moveaxis(scaled.cpu().numpy(), -3, -1)


def to_image(pixels: Pixels) -> Image.Image:
    """(H, W, C) 8-bit array to a picture."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A labelled group of tiles, one list of pictures a row."""

    label: str
    rows: Sequence[Sequence[Pixels]]


def draw_grid(columns: Sequence[Column], title: str, min_tile: int = 96) -> Image.Image:
    """A labelled grid: groups of columns side by side, a reference a row.

    Args:
        columns: the groups; every one has as many rows.
        title: drawn above all.
        min_tile: tiles of fewer pixels are enlarged by a whole number, pixel by pixel.
    """
    height, width, _ = next(tile for column in columns for row in column.rows for tile in row).shape
    zoom = max(1, -(-min_tile // min(height, width)))
    tile_h, tile_w, gap, margin = height * zoom, width * zoom, 2, 12
    font = ImageFont.load_default(14)
    header = 44
    widths = [
        max(max((len(row) for row in c.rows), default=0) * (tile_w + gap) - gap, math.ceil(font.getlength(c.label)))
        for c in columns
    ]
    total = (2 * margin + sum(widths) + margin * (len(widths) - 1), header + margin)
    rows = max(len(c.rows) for c in columns)
    title_width = int(font.getlength(title)) + 2 * margin
    sheet = Image.new("RGB", (max(total[0], title_width), total[1] + rows * (tile_h + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 4), title, fill="black", font=font)
    left = margin
    for column, column_width in zip(columns, widths, strict=True):
        draw.text((left, 24), column.label, fill="black", font=font)
        for i, row in enumerate(column.rows):
            for j, pixels in enumerate(row):
                tile = to_image(pixels).convert("RGB").resize((tile_w, tile_h), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + j * (tile_w + gap), header + i * (tile_h + gap)))
        left += column_width + margin
    return sheet
