"""Small data sets are decoded once, into a file of 8-bit pixels that every rank, worker and later run maps."""

import contextlib
import hashlib
import json
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from filelock import FileLock

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import BrokenImageError, Pixels

FORMAT = 3
"""The version of the files. Any change of how images are decoded or fitted raises it."""

Decoded = tuple[Pixels, dict[int, str]]
"""The images (N, H, W, C) that could be read, in the order of their rows, and what is wrong with each other row."""


def decode_once(source: ImageSource, config: DataConfig, folder: Path | None) -> Decoded:
    """All images of a source: from a file in the folder, which the first process that asks for it writes.

    The images stay in memory where there is no folder, where it cannot be written, and where a row is broken, because
    the next run may find it mended.
    """
    if folder is None or source.fingerprint is None:
        return _decode_all(source, config)
    shape = (len(source), *config.size, config.channels)
    name = hashlib.sha256(json.dumps([FORMAT, source.fingerprint, shape, config.known_range]).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return _open_or_write(folder / f"{name}.npy", source, config)
    except OSError as error:  # a full disk, or one that may not be written
        reason = f"{folder} cannot be written ({error.strerror})"
        warnings.warn(f"decoded images stay in memory: {reason}", stacklevel=2)
        return _decode_all(source, config)


def _open_or_write(path: Path, source: ImageSource, config: DataConfig) -> Decoded:
    with contextlib.suppress(OSError, ValueError, EOFError):  # it is not there yet, or damaged
        return np.load(path, mmap_mode="r"), {}
    pixels, broken = _decode_all(source, config)
    if broken:
        return pixels, broken

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, pixels)

    write_atomically(path, write, durable=True)
    return np.load(path, mmap_mode="r"), {}


def _decode_all(source: ImageSource, config: DataConfig) -> Decoded:
    def attempt(row: int) -> Pixels | BrokenImageError:
        try:
            return source.decode(row, source.image_bytes(row), config)
        except BrokenImageError as error:
            return error

    pixels = np.empty((len(source), *config.size, config.channels), dtype=np.uint8)
    broken: dict[int, str] = {}
    with ThreadPool() as pool:
        for row, result in enumerate(pool.imap(attempt, range(len(source)))):
            if isinstance(result, BrokenImageError):
                broken[row] = str(result)
            else:
                pixels[row - len(broken)] = result
    return pixels[: len(source) - len(broken)], broken
