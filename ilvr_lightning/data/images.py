"""Pictures in and out: reading with care, [-1, 1] <-> 8 bits, labelled grids."""

import contextlib
import io
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from torch import Tensor

from ilvr_lightning.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded, whatever a file is called; Pillow knows more, and starts Ghostscript for some."""


MOST_PIXELS = 89_478_485
"""Of a picture; Pillow warns from there on."""


MOST_BYTES = 400_000_000
"""That decoding a picture may take."""


LARGE = 24_000_000
"""A picture of more pixels is made smaller before it is converted: to a quarter of so many at most."""


LARGE_WITH_ALPHA, LARGE_TRANSPARENT = 12_000_000, 4_000_000
"""The same with an alpha channel that says nothing, and with one that does, whose transparent parts are filled."""


Fit = Literal["crop", "pad"]


Pixels = NDArray[np.uint8]


Decoded = TypeVar("Decoded")


class BrokenImageError(UserError):
    """A file that claims to be an image and is none."""


class _NoWords:
    """libtiff, which writes what it dislikes to the process's standard error, silenced; for one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = -1

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._kept = os.dup(2)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        except OSError:  # there is none
            self._kept = -1

    def __exit__(self, *error: object) -> None:
        if self._kept >= 0:
            os.dup2(self._kept, 2)
            os.close(self._kept)
        self._lock.release()


_no_words = _NoWords()


logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of a file is in the exception


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
    """What is made of a picture once it is decoded; a very large one is given to it smaller.

    Raises:
        BrokenImageError: it cannot be decoded, or would take too much memory.
    """
    _ignore_pillow_warnings()
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise OSError("it is no file")  # a pipe or a device, which may never end
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_size(image)
            pixels = image.width * image.height
            with _one_large if pixels > LARGE else contextlib.nullcontext():
                if pixels > LARGE:
                    image.draft(None, (image.width // 2, image.height // 2))  # a JPEG
                with _no_words if isinstance(image, TiffImageFile) else contextlib.nullcontext():
                    image.load()
                return use(_upright(_reduced(image)))
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged files
        name = "an image" if isinstance(source, bytes) else str(source)
        reason = "it is none, or of another format than " + ", ".join(FORMATS)
        if not isinstance(error, UnidentifiedImageError):
            reason = str(error).partition("\n")[0] or type(error).__name__
        raise BrokenImageError(f"{name} cannot be read as an image: {reason}") from error


PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _ignore_pillow_warnings() -> None:
    """Ignore what Pillow warns of (odd metadata, sizes that are no bomb yet), in all threads and from now on.

    catch_warnings would lose the warnings of the other threads meanwhile, and put back their filters.
    """
    if tuple(warnings.filters[:1]) != (PILLOWS_WARNINGS,):
        warnings.filterwarnings("ignore", module=PILLOWS_WARNINGS[3].pattern)


_one_large = threading.Lock()
"""Threads decode large pictures one after another."""


def _check_size(image: Image.Image) -> None:
    """Raise a ValueError for a picture that would take too much memory; nothing of it is decoded yet."""
    each = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}.get(image.mode, 4)
    if image.format == "WEBP":
        each = 16  # two canvases, a frame and the picture
    elif isinstance(image, TiffImageFile):
        # A strip may be all of it, and turning it takes another.
        each = 2 * each + sum(image.tag_v2.get(BITSPERSAMPLE, (1,))) // 8
    elif isinstance(image, JpegImageFile) and image.info.get("progressive"):
        each += 2 * image.layers  # all coefficients
    pixels = min(MOST_PIXELS, MOST_BYTES // each)
    if image.width * image.height > pixels:
        raise ValueError(
            f"it is of {image.width}x{image.height} pixels, which would take too much memory; give one of at most "
            f"{pixels // 1_000_000} million"
        )


def _reduction(image: Image.Image) -> int:
    """The whole number by which a very large picture's sides are divided; 1 leaves it as it is."""
    pixels, most = image.width * image.height, LARGE
    if image.has_transparency_data:
        most = LARGE_WITH_ALPHA
        is_opaque = image.getbands()[-1] == "A" and pixels <= most and image.getchannel("A").getextrema()[0] == 255
        most = most if is_opaque else LARGE_TRANSPARENT
    return 1 if pixels <= most else math.ceil(math.sqrt(4 * pixels / most))


def _reduced(image: Image.Image) -> Image.Image:
    """A picture of ordinary size as it is; a larger one averaged over squares, strip by strip, in 8 bits."""
    if (by := _reduction(image)) == 1:
        return image
    made = "L" if len(image.getbands()) == 1 and image.mode != "P" else "RGB"
    made = "RGBA" if image.has_transparency_data else made
    info = {name: value for name, value in image.info.items() if name != "transparency"}  # orientation above all
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    small = Image.new(made, (-(-image.width // by), -(-image.height // by)))
    rows = by * max(1, STRIP // (image.width * by))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        small.paste(strip.convert(made).reduce(by), (0, top // by))
    small.info = info
    return small


def _upright(image: Image.Image) -> Image.Image:
    """The picture, turned as its EXIF says, if that can be read; what else is in it may be broken, and is dropped."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("exif", None)
    return image


STRIP = 2**20
"""Pixels that are converted at once."""


def convert(image: Image.Image, channels: int = 3) -> Image.Image:
    """Any mode to RGB (channels=3) or L (channels=1), EXIF rotation applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Integers or floats as greyscale of 8 bits; white is 65535, or the least of 1 and 255 that no value is above.

    NaN is black.
    """
    highest = 65535
    if not image.mode.startswith("I;16"):
        most = max(values.max() for _, values in _strips(image))
        highest = next((white for white in (1, 255) if most <= white), 65535)
    made = Image.new("L", image.size)
    for top, values in _strips(image):
        made.paste(Image.fromarray(np.clip(np.rint(values * (255 / highest)), 0, 255).astype(np.uint8)), (0, top))
    return made


def _strips(image: Image.Image) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The values of one band, NaN as 0, some rows at a time; the first of them."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        with np.errstate(invalid="ignore"):  # a signalling NaN
            values = np.asarray(strip, dtype=np.float64)
        yield top, np.where(np.isnan(values), 0, values)


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
