"""Small data sets decoded once: an array of 8-bit pixels in a file that every rank, worker and later run maps."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from ilvr_lightning.images import BrokenImageError, Pixels

Decode = Callable[[int], Pixels]


@dataclass(frozen=True, kw_only=True)
class DecodedRows:
    """The good rows of a split."""

    pixels: Pixels
    """(number of good rows, H, W, C) 8-bit."""
    good: list[int]
    """Which rows of the split they are."""
    broken: dict[int, str]
    """What is wrong with each of the others."""


def decode_rows(count: int, shape: tuple[int, int, int], decode: Decode, skip_broken: bool) -> DecodedRows:
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


def map_rows(
    folder: Path, fingerprint: str, count: int, shape: tuple[int, int, int], decode: Decode, skip_broken: bool
) -> DecodedRows:
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
    name = hashlib.sha256(json.dumps([FORMAT, fingerprint, count, shape, skip_broken]).encode()).hexdigest()[:32]
    array, about = folder / f"{name}.npy", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not about.exists():
            partial = folder / f".{name}.partial.npy"
            pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, *shape))
            try:
                made = _fill(pixels, count, decode, skip_broken)
                pixels.flush()
                os.replace(partial, array)
            finally:
                partial.unlink(missing_ok=True)
            # Written last: where it is, the array is whole.
            text = json.dumps({"good": made.good, "broken": list(made.broken.items())})
            partial_about = about.with_suffix(".partial")
            partial_about.write_text(text)
            os.replace(partial_about, about)
    values = json.loads(about.read_text())
    mapped = np.load(array, mmap_mode="r")
    return DecodedRows(pixels=mapped[: len(values["good"])], good=values["good"], broken=dict(values["broken"]))


FORMAT = 1
"""Of the files; a change of how pictures are decoded or fitted raises it."""


def _fill(pixels: Pixels, count: int, decode: Decode, skip_broken: bool) -> DecodedRows:
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
    return DecodedRows(pixels=pixels[: len(good)], good=good, broken=broken)


def _in_threads(decode: Decode, rows: Iterable[int]) -> Iterable[Pixels | BrokenImageError]:
    def attempt(row: int) -> Pixels | BrokenImageError:
        try:
            return decode(row)
        except BrokenImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(attempt, rows)
