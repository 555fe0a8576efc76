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
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, _imaging
from torch import Tensor

from ilvr_lightning.data.values import (
    Deep,
    Encoded,
    Page,
    Range,
    is_npy,
    is_tiff,
    npy_header,
    own_range,
    read_npy,
    read_png,
    read_tiff,
    scaled,
    tiff_size,
)
from ilvr_lightning.errors import UserError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy")
"""Files with these endings are taken for images where a folder is searched."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""These formats and arrays of NumPy are decoded, whatever a file is called. Pillow knows more, and starts Ghostscript
for some of them."""

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
    """Keep the decoders from writing about damaged files to standard error: the exception says what is wrong."""
    for library in ("PIL", "tifffile"):
        logging.getLogger(library).addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # They are found where Pillow links libtiff dynamically, as its wheels for Linux and macOS do.
        with contextlib.suppress(AttributeError, OSError):
            set_handler = getattr(ctypes.CDLL(_imaging.__file__), handler)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


silence_decoders()


@contextlib.contextmanager
def open_image(source: Encoded, value_range: Range | None = None, draft: bool = True) -> Iterator[Image.Image]:
    """Open an image, decoded and turned upright as its EXIF orientation says.

    Whatever the body of the with statement raises is taken for damage of the file, because some formats fail only when
    they are converted.

    Args:
        source: a file, its bytes, or a page of it.
        value_range: the values that become black and white in files of more than 8 bits; None leaves such an image as
            Pillow reads it, to be converted by its own largest value.
        draft: whether a large JPEG may be decoded at half its size.

    Raises:
        BrokenImageError: there is no such file, the image cannot be decoded, or it has too many pixels.
    """
    with explaining(source):
        yield _load(*_as_page(source), value_range, draft)


@contextlib.contextmanager
def explaining(source: Encoded) -> Iterator[None]:
    """Make whatever is raised while an image is read a BrokenImageError of one line that names it."""
    content, number = _as_page(source)
    try:
        if isinstance(content, Path) and content.exists() and not content.is_file():
            raise OSError("it is not a file")  # a pipe or a device may never end
        yield
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged files
        name = "an image" if isinstance(content, bytes) else str(content)
        name += f" (page {number + 1})" if number else ""
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"its format is none of {', '.join(FORMATS)}"
        raise BrokenImageError(f"{name} cannot be read as an image: {reason}") from error


def _as_page(source: Encoded) -> Page:
    return source if isinstance(source, Page) else Page(source, 0)


def _open(content: bytes | Path, number: int) -> ImageFile.ImageFile:
    """What Pillow says of an image, of which no pixel is decoded."""
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
    if number:
        image.seek(number)
    return image


def _load(content: bytes | Path, number: int, value_range: Range | None, draft: bool) -> Image.Image:
    try:
        deep = read_deep(Page(content, number)) if value_range is not None or is_npy(content) else None
        if deep is None:
            with _open(content, number) as image:
                _limit_size(image, draft)
                image.load()
                _turn_upright(image)
                return image
    except UnidentifiedImageError:
        if value_range is not None or (deep := read_deep(Page(content, number))) is None:
            raise
    converted = deep.image(value_range)
    _turn_upright(converted)
    return converted


def read_deep(source: Encoded) -> Deep | None:
    """The values of a file of more than 8 bits or of an array of NumPy; None for another image, which is not decoded.

    Raises:
        Exception: the image cannot be read.
    """
    content, number = _as_page(source)
    if is_npy(content):
        return read_npy(content)
    try:
        image = _open(content, number)
    except UnidentifiedImageError:
        if not is_tiff(content):
            raise
        return read_tiff(content, number)
    with image:
        if image.mode[0] in "IF":
            _limit_size(image)
            image.load()
            _turn_upright(image)
            return Deep(np.array(image)[:, :, None], None, 1)
        if image.format == "PNG" and "16" in str(image.tile[0][-1]):
            _limit_size(image, limit=MAX_PIXELS_WITH_COPIES)
            return read_png(content, int(image.getexif().get(0x0112, 1)))
        if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) > 8:  # type: ignore[attr-defined]
            return read_tiff(content, number)
    return None


def image_size(source: Encoded, draft: bool = True) -> tuple[int, int]:
    """Width and height of an image as `open_image` gives it; no pixel is decoded.

    Raises:
        BrokenImageError: as open_image, as far as the file's beginning says it.
    """
    content, number = _as_page(source)
    with explaining(source):
        if is_npy(content):
            return npy_header(content)[0][1], npy_header(content)[0][0]
        try:
            image = _open(content, number)
        except UnidentifiedImageError:
            if not is_tiff(content):
                raise
            return tiff_size(content, number)
        with image:
            _limit_size(image, draft)
            size = image.size
            if image.format == "TIFF":  # of which some versions of Pillow give it turned, others not
                size = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
            exif = Image.Image.getexif(image)  # that of a PNG would decode it
            return size[::-1] if exif.get(0x0112, 1) in range(5, 9) else size


def _limit_size(image: Image.Image, draft: bool = True, limit: int | None = None) -> None:
    """Have a large JPEG decoded at half its size, and refuse an image that has too many pixels; none is decoded yet."""
    size = image.size
    if draft and size[0] * size[1] > DRAFT_PIXELS:
        image.draft(None, (size[0] // 2, size[1] // 2))
    width, height = size if image.info.get("progressive") else image.size  # which is decoded whatever the draft is
    limit = limit or (MAX_PIXELS_WITH_COPIES if _needs_copies(image) else MAX_PIXELS)
    if width * height > limit:
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


def read_image(source: Encoded, channels: int = 3, value_range: Range | None = None, draft: bool = True) -> Image.Image:
    """Read an image as RGB or greyscale: upright, transparent parts over white, more than 8 bits scaled to 8.

    Args:
        source: a file, its bytes, or a page of it.
        channels: 3 or 1.
        value_range: what becomes black and white in files of more than 8 bits; None decides it by each file alone.
        draft: whether a large JPEG may be decoded at half its size.

    Raises:
        BrokenImageError: there is no such file, or the image cannot be decoded.
    """
    with open_image(source, value_range, draft) as image:
        return convert(image, channels)


def convert(image: Image.Image, channels: int = 3) -> Image.Image:
    """Convert an upright image of any mode to RGB (channels=3) or L (channels=1)."""
    if image.mode[0] in "IF":
        values = np.array(image)
        image = Image.fromarray(scaled(values, own_range(values)))
    if image.has_transparency_data:
        image = place_over(image, "white")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def place_over(image: Image.Image, colour: str) -> Image.Image:
    """Place an image with transparent parts over a plain background; the result is RGBA."""
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


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
