"""Small data sets are decoded once, into a file of 8-bit pixels that every rank, worker and later run maps."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from ilvr_lightning.data.images import BrokenImageError, Pixels

FORMAT = 2
"""The version of the files. Any change of how images are decoded or fitted raises it."""

Decode = Callable[[int], Pixels]
"""Gives the image of a row, (H, W, C) 8-bit; raises BrokenImageError."""


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """The rows of a split that could be decoded."""

    pixels: Pixels
    """(number of good rows, H, W, C) 8-bit."""
    good: list[int]
    """Which rows of the split they are."""
    broken: dict[int, str]
    """What is wrong with each of the other rows."""


def decode_all(pixels: Pixels, decode: Decode, skip_broken: bool) -> DecodedImages:
    """Decode a split into an array.

    Args:
        pixels: (number of rows, H, W, C) 8-bit; it is filled.
        decode: gives the image of a row.
        skip_broken: leave out rows that cannot be read instead of stopping.

    Raises:
        BrokenImageError: a row cannot be read, and is not to be left out.
    """

    def attempt(row: int) -> Pixels | BrokenImageError:
        try:
            return decode(row)
        except BrokenImageError as error:
            return error

    good: list[int] = []
    broken: dict[int, str] = {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for row, result in enumerate(pool.map(attempt, range(len(pixels)))):
            if not isinstance(result, BrokenImageError):
                pixels[len(good)] = result
                good.append(row)
            elif skip_broken:
                broken[row] = str(result)
            else:
                raise result
    finally:
        pool.shutdown(cancel_futures=True)
    return DecodedImages(pixels=pixels[: len(good)], good=good, broken=broken)


def open_cache(
    folder: Path, fingerprint: str, shape: tuple[int, int, int, int], decode: Decode, skip_broken: bool
) -> DecodedImages:
    """Decode a split into a file, once: the first process writes it, the others wait, and all of them map it read-only.

    A split with broken rows is kept in memory, because the next run may find them mended.

    Args:
        folder: where the files are.
        fingerprint: equal for equal rows.
        shape: (number of rows, H, W, C).
        decode: gives the image of a row.
        skip_broken: leave out rows that cannot be read instead of stopping.

    Raises:
        BrokenImageError: a row cannot be read, and is not to be left out.
        OSError: the folder cannot be written.
    """
    name = hashlib.sha256(json.dumps([FORMAT, fingerprint, shape]).encode()).hexdigest()[:32]
    path, partial = folder / f"{name}.npy", folder / f".{name}.partial.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if _open_existing(path, shape) is None:
            try:
                decoded = decode_all(_allocate(partial, shape), decode, skip_broken)
                if decoded.broken:
                    return replace(decoded, pixels=np.array(decoded.pixels))
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return DecodedImages(pixels=np.load(path, mmap_mode="r"), good=list(range(shape[0])), broken={})


def _open_existing(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """The pixels in a complete file of this shape, or None."""
    try:
        pixels: Pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def _allocate(path: Path, shape: tuple[int, ...]) -> Pixels:
    """A new array in a file whose blocks are reserved: writing to a mapped page without one would kill the process."""
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return pixels
