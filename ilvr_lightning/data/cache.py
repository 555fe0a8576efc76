"""Small data sets decoded once: an array of 8-bit pixels in a file that every rank, worker and later run maps."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from ilvr_lightning.data.images import BrokenImageError, Pixels

Decode = Callable[[int], Pixels]


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """The good rows of a split."""

    pixels: Pixels
    """(number of good rows, H, W, C) 8-bit."""
    good: list[int]
    """Which rows of the split they are."""
    broken: dict[int, str]
    """What is wrong with each of the others."""


def decode_all(count: int, shape: tuple[int, int, int], decode: Decode, skip_broken: bool) -> DecodedImages:
    """Decode a split into memory.

    Args:
        count: rows of the split.
        shape: (H, W, C) of each.
        decode: row -> (H, W, C) 8-bit.
        skip_broken: leave out what cannot be read, rather than stop.

    Raises:
        BrokenImageError: a row cannot be read and is not to be skipped.
    """
    return _fill(np.empty((count, *shape), dtype=np.uint8), count, decode, skip_broken)


def open_cache(
    folder: Path, fingerprint: str, count: int, shape: tuple[int, int, int], decode: Decode, skip_broken: bool
) -> DecodedImages:
    """The same through a file, made by whoever comes first and mapped read-only by everyone.

    Args:
        folder: where the files are.
        fingerprint: equal for equal rows.
        count: rows of the split.
        shape: (H, W, C) of each.
        decode: row -> (H, W, C) 8-bit.
        skip_broken: leave out what cannot be read, rather than stop.

    Raises:
        BrokenImageError: a row cannot be read and is not to be skipped.
        OSError: the folder cannot be written.
    """
    name = hashlib.sha256(json.dumps([FORMAT, fingerprint, count, shape]).encode()).hexdigest()[:32]
    path = folder / f"{name}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        pixels = _open_existing(path, (count, *shape))
        if pixels is None:
            partial = folder / f".{name}.partial.npy"
            try:
                made = _fill(_allocate(partial, (count, *shape)), count, decode, skip_broken)
                if made.broken:  # which may be mended by the next run
                    return replace(made, pixels=np.array(made.pixels))
                _flush(partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            pixels = np.load(path, mmap_mode="r")
    return DecodedImages(pixels=pixels, good=list(range(count)), broken={})


def _open_existing(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """A whole file of this shape, or None."""
    try:
        pixels: Pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def _allocate(path: Path, shape: tuple[int, ...]) -> Pixels:
    """A new array in a file whose blocks are taken: to run out of them in the mapped pages would kill the process."""
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return pixels


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


FORMAT = 1
"""Of the files; a change of how pictures are decoded or fitted raises it."""


def _fill(pixels: Pixels, count: int, decode: Decode, skip_broken: bool) -> DecodedImages:
    good: list[int] = []
    broken: dict[int, str] = {}
    for row, result in enumerate(_in_threads(decode, range(count))):
        if not isinstance(result, BrokenImageError):
            pixels[len(good)] = result
            good.append(row)
        elif skip_broken:
            broken[row] = str(result)
        else:
            raise result
    return DecodedImages(pixels=pixels[: len(good)], good=good, broken=broken)


def _in_threads(decode: Decode, rows: Iterable[int]) -> Iterable[Pixels | BrokenImageError]:
    def attempt(row: int) -> Pixels | BrokenImageError:
        try:
            return decode(row)
        except BrokenImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(attempt, rows)
