"""Images of any kind read with known colours and fitted to a size; 8 bits to [-1, 1] and back."""

import contextlib
import ctypes
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, _imaging
from torch import Tensor

from ilvr_lightning.errors import UserError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Files with these endings are taken for images where a folder is searched."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""These formats are decoded, whatever a file is called. Pillow knows more, and starts Ghostscript for some of them."""

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused. Pillow warns of decompression bombs from this size on."""

MAX_PIXELS_WITH_COPIES = 27_000_000
"""The same limit for images whose decoding or conversion needs copies, so that one image takes about 500 MB at most."""

DRAFT_PIXELS = 24_000_000
"""JPEG files with more pixels are decoded at half their height and width, which costs a quarter of the memory."""

Fit = Literal["crop", "pad"]
Pixels = NDArray[np.uint8]


class BrokenImageError(UserError):
    """A file cannot be decoded as an image."""


def silence_decoders() -> None:
    """Keep Pillow and libtiff from writing about damaged files to standard error: the exception says what is wrong."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # They are found where Pillow links libtiff dynamically, as its wheels for Linux and macOS do.
        with contextlib.suppress(AttributeError, OSError):
            set_handler = getattr(ctypes.CDLL(_imaging.__file__), handler)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


silence_decoders()


@contextlib.contextmanager
def open_image(source: Path | bytes) -> Iterator[Image.Image]:
    """Open an image, decoded and turned upright as its EXIF orientation says.

    Whatever the body of the with statement raises is taken for damage of the file, because some formats fail only when
    they are converted.

    Args:
        source: a file, or its bytes.

    Raises:
        BrokenImageError: there is no such file, the image cannot be decoded, or it has too many pixels.
    """
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise OSError("it is not a file")  # a pipe or a device may never end
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _limit_size(image)
            image.load()
            _turn_upright(image)
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged files
        name = "an image" if isinstance(source, bytes) else str(source)
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"its format is none of {', '.join(FORMATS)}"
        raise BrokenImageError(f"{name} cannot be read as an image: {reason}") from error


def _limit_size(image: Image.Image) -> None:
    """Have a large JPEG decoded at half its size, and refuse an image that has too many pixels; none is decoded yet."""
    size = image.size
    if size[0] * size[1] > DRAFT_PIXELS:
        image.draft(None, (size[0] // 2, size[1] // 2))
    width, height = size if image.info.get("progressive") else image.size  # which is decoded whatever the draft is
    if width * height > (limit := MAX_PIXELS_WITH_COPIES if _needs_copies(image) else MAX_PIXELS):
        raise ValueError(
            f"it has {width}x{height} pixels, and an image of its kind may have {limit // 10**6} million; make it "
            "smaller"
        )


def _needs_copies(image: Image.Image) -> bool:
    """Whether decoding or converting an image takes several times the memory of its pixels."""
    if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info or image.info.get("progressive"):
        return True
    return image.mode == "RGB" and image.format in ("TIFF", "WEBP")


def _turn_upright(image: Image.Image) -> None:
    """Turn an image as its EXIF orientation says, if that can be read; the rest of its EXIF may be damaged."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def read_image(source: Path | bytes, channels: int = 3) -> Image.Image:
    """Read an image as RGB or greyscale: upright, transparent parts over white, 16 bits scaled to 8.

    Args:
        source: a file, or its bytes.
        channels: 3 or 1.

    Raises:
        BrokenImageError: there is no such file, or the image cannot be decoded.
    """
    with open_image(source) as image:
        return convert(image, channels)


def convert(image: Image.Image, channels: int = 3) -> Image.Image:
    """Convert an upright image of any mode to RGB (channels=3) or L (channels=1)."""
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = place_over(image, "white")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def place_over(image: Image.Image, colour: str) -> Image.Image:
    """Place an image with transparent parts over a plain background; the result is RGBA."""
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale integers or floats to greyscale of 8 bits.

    White is 65535 for 16 bits, otherwise the first of 1, 255 and 65535 that no value exceeds. NaN is black.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = np.array(image, dtype=np.float64)
    values[np.isnan(values)] = 0
    whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    white = next((white for white in whites if values.max() <= white), 65535)
    values *= 255 / white  # in place from here on: a large image is held once
    np.clip(np.rint(values, out=values), 0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8))


def fit_image(
    image: Image.Image,
    size: tuple[int, int],
    fit: Fit = "crop",
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    margin: str = "white",
) -> Image.Image:
    """Resize with antialias to (height, width): cover and crop to the centre, or fit inside margins."""
    width_height = (size[1], size[0])
    if fit == "crop":
        return ImageOps.fit(image, width_height, resampling)
    return ImageOps.pad(image, width_height, resampling, color=margin)


def fit_mask(mask: Image.Image, size: tuple[int, int], fit: Fit = "crop") -> Image.Image:
    """Fit a mask as its image is fitted, but without overshoot, and with black margins: they belong to no image."""
    return fit_image(mask, size, fit, Image.Resampling.BILINEAR, "black")


def to_pixels(image: Image.Image) -> Pixels:
    """Convert an image to an (H, W, C) 8-bit array."""
    pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def to_tensor(pixels: Pixels) -> Tensor:
    """Convert (..., H, W, C) 8-bit values to (..., C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(np.moveaxis(pixels, -1, -3), order="C")).float() / 127.5 - 1


def from_tensor(x: Tensor) -> Pixels:
    """Convert (..., C, H, W) in [-1, 1] to (..., H, W, C) 8-bit values, clipped and rounded."""
    scaled = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.moveaxis(scaled.cpu().numpy(), -3, -1)


def to_image(pixels: Pixels) -> Image.Image:
    """Convert an (H, W, C) 8-bit array to an image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
