"""Files of more than 8 bits per value: how they are read, and which of their values are black and white."""

import io
import math
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[Any]
Range = tuple[float, float]
"""The values that are black and white."""

MAX_BYTES = 216_000_000
"""Values that take more memory are refused: 27 million of 8 bytes."""

BLOCK = 256
"""So many rows of pixels are converted at a time, which bounds the memory for it."""

READABLE_COMPRESSIONS = ("NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS")
"""The compressions of TIFF that are read in files of more than 8 bits in colour, and in float files."""


class Page(NamedTuple):
    """A page of a TIFF, counted from 0."""

    content: bytes | Path
    number: int


Encoded = bytes | Path | Page
"""An encoded image, the file that holds it, or one of its pages."""


class Deep(NamedTuple):
    """The values of a file of more than 8 bits, or of an array."""

    colours: Values
    """(H, W, 1 or 3), as the file stores them."""
    alpha: Values | None
    """(H, W, 1)."""
    orientation: int
    """How they are to be turned upright, as EXIF counts it."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright."""
        height, width = self.colours.shape[:2]
        return (height, width) if self.orientation >= 5 else (width, height)

    def image(self, value_range: Range | None) -> Image.Image:
        """An 8-bit image: upright, in mode L, LA, RGB or RGBA.

        Args:
            value_range: what becomes black and white; None decides it for this file alone, by `own_range`.
        """
        parts = [scaled(self.colours, value_range or own_range(self.colours))]
        if self.alpha is not None:
            kind = self.alpha.dtype
            parts.append(scaled(self.alpha, (0, float(np.iinfo(kind).max) if kind.kind in "iu" else 1.0)))
        pixels = np.concatenate(parts, axis=2)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        image.getexif()[0x0112] = self.orientation
        return image


def scaled(values: Values, value_range: Range) -> NDArray[np.uint8]:
    """Values of any shape in 8 bits: a range of them from black to white, those beyond it clipped; NaN is black.

    Values of 8 bits stay as they are, and of bool, false is black.
    """
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    low, high = value_range
    pixels = np.empty(values.shape, dtype=np.uint8)
    for start, block in _blocks(values, low):
        block -= low
        block *= 255 / (high - low)  # in place: a large image is held once
        pixels[start : start + BLOCK] = np.clip(np.rint(block, out=block), 0, 255, out=block)
    return pixels


def own_range(values: Values) -> Range:
    """The range of a file where nothing is known of others like it: 0 to 65535 for 16 bits, otherwise to the first of
    1, 255 and 65535 that no value exceeds."""
    if values.dtype == np.uint16 or not values.size:
        return 0, 65535
    highest = max(float(block.max()) for _, block in _blocks(values, 0))
    return 0, next((white for white in (1, 255, 65535) if highest <= white), 65535)


def _blocks(values: Values, nan: float) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(first row, some rows in float64, without NaN)."""
    for start in range(0, len(values), BLOCK):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            block = values[start : start + BLOCK].astype(np.float64)
        block[np.isnan(block)] = nan
        yield start, block


def begins_with(content: bytes | Path, *beginnings: bytes) -> bool:
    """Whether a file begins with one of some bytes."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return file.read(8).startswith(beginnings)
    return content.startswith(beginnings)


def is_npy(content: bytes | Path) -> bool:
    """Whether a file is an array of NumPy."""
    return begins_with(content, b"\x93NUMPY")


def is_tiff(content: bytes | Path) -> bool:
    """Whether a file is a TIFF, BigTIFF included."""
    return begins_with(content, b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _opened(content: bytes | Path) -> IO[bytes]:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def npy_header(content: bytes | Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of an array of NumPy, of which nothing else is read.

    Raises:
        ValueError: it is damaged, too large, or no image.
    """
    with _opened(content) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.kind not in "biuf" or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))) or 0 in shape:
        raise ValueError(
            f"it is an array of {dtype}, {shape}; an image is (H, W) or (H, W, 1 or 3), of integers or floats"
        )
    _check_bytes(shape, dtype.itemsize)
    return shape, dtype


def read_npy(content: bytes | Path) -> Deep:
    """An image as an array of NumPy: (H, W) or (H, W, 1 or 3).

    Raises:
        ValueError: it is damaged, too large, or no image.
    """
    shape, _ = npy_header(content)
    with _opened(content) as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
    return Deep(values.reshape(*shape[:2], -1), None, 1)


def read_png(content: bytes | Path, orientation: int) -> Deep:
    """A PNG of 16 bits, of which Pillow would keep 8 in colour."""
    import torch
    from torchvision.io import ImageReadMode, decode_image  # takes seconds to import, and is seldom needed

    data = content.read_bytes() if isinstance(content, Path) else content
    decoded = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return _split(np.moveaxis(decoded.numpy(), 0, -1), len(decoded) in (2, 4), orientation)


def read_tiff(content: bytes | Path, number: int) -> Deep:
    """A page of a TIFF that Pillow does not read or of which it would keep 8 bits.

    Raises:
        ValueError: it has other numbers of channels, is too large, or is compressed in an unknown way.
    """
    with _opened(content) as file, tifffile.TiffFile(file) as tiff:
        page = tiff.pages[number]
        assert isinstance(page, tifffile.TiffPage)
        _check_page(page)
        values = page.asarray()
        if page.planarconfig == 2 and page.samplesperpixel > 1:  # channel after channel
            values = np.moveaxis(values, 0, -1)
        orientation = page.tags.get(274)
        turned = int(orientation.value) if orientation is not None and orientation.value in range(1, 9) else 1
        return _split(values.reshape(page.imagelength, page.imagewidth, -1), _has_alpha(page), turned)


def tiff_size(content: bytes | Path, number: int) -> tuple[int, int]:
    """Width and height of such a page, upright; no pixel is read.

    Raises:
        ValueError: as read_tiff.
    """
    with _opened(content) as file, tifffile.TiffFile(file) as tiff:
        page = tiff.pages[number]
        assert isinstance(page, tifffile.TiffPage)
        _check_page(page)
        orientation = page.tags.get(274)
        size = page.imagewidth, page.imagelength
        return size[::-1] if orientation is not None and orientation.value in range(5, 9) else size


def pages(content: bytes | Path) -> list[int]:
    """The numbers of a TIFF's pages that are images of their own: no thumbnails, and no masks.

    Raises:
        Exception: it is damaged.
    """
    with _opened(content) as file, tifffile.TiffFile(file) as tiff:
        numbers, seen = [], set[int]()
        for number in count():
            try:
                page = tiff.pages[number]
            except IndexError:
                break
            if page.offset in seen:  # a damaged file may lead back to an earlier page, over and over
                break
            seen.add(page.offset)
            if not int(getattr(page, "subfiletype", 0)) & 5:
                numbers.append(number)
        return numbers or [0]


def _has_alpha(page: tifffile.TiffPage) -> bool:
    return page.samplesperpixel in (2, 4) and [int(kind) in (1, 2) for kind in page.extrasamples] == [True]


def _check_page(page: tifffile.TiffPage) -> None:
    """Raise a ValueError for a page that is not read, before its pixels are."""
    channels = page.samplesperpixel - _has_alpha(page)
    if channels not in (1, 3):
        raise ValueError(f"it has {channels} channels; images of 1 or 3 are read, and alpha beside them")
    if page.imagedepth > 1:
        raise ValueError(f"its page is a volume of {page.imagedepth} planes; save each as a page of its own")
    if page.dtype is None or page.dtype.kind not in "biuf":
        raise ValueError(f"its values are of the type {page.dtype}; give integers or floats")
    _check_bytes(page.shape, page.dtype.itemsize)
    _check_bytes(page.chunks, page.dtype.itemsize)
    compression = getattr(page.compression, "name", str(page.compression))
    if compression not in READABLE_COMPRESSIONS:
        known = ", ".join(READABLE_COMPRESSIONS)
        raise ValueError(f"its compression is {compression}, and in a TIFF of this kind it may be {known}")
    if "DEFLATE" in compression:
        _check_segments(page, math.prod(page.chunks) * page.dtype.itemsize)


def _check_segments(page: tifffile.TiffPage, most: int) -> None:
    """Raise a ValueError if a part of a page is larger than it says; tifffile would take the memory for it."""
    file = page.parent.filehandle
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(offset)
        if len(zlib.decompressobj().decompress(file.read(length), most + 1)) > most:
            raise ValueError("a part of it is larger than it says")


def _check_bytes(shape: tuple[int, ...], itemsize: int) -> None:
    """Raise a ValueError if values would take too much memory."""
    if math.prod(shape) * itemsize > MAX_BYTES:
        written = "x".join(map(str, shape))
        raise ValueError(
            f"it has {written} values of {8 * itemsize} bits, and {MAX_BYTES // 10**6} MB are read; make it smaller"
        )


def _split(values: Values, has_alpha: bool, orientation: int) -> Deep:
    alpha = values[:, :, -1:] if has_alpha else None
    return Deep(values[:, :, :-1] if has_alpha else values, alpha, orientation)
