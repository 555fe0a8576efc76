"""Small data sets are decoded once, into a file of 8-bit pixels that every rank, worker and later run maps."""

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from filelock import FileLock

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.crops import Size
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import BrokenImageError, Pixels

FORMAT = 3
"""The version of the files. Any change of how images are decoded or fitted raises it."""

MAX_BYTES_AT_ONCE = 2**29
"""Large pictures are decoded by so few threads that they take no more than this together."""

Pictures = Pixels | list[Pixels]
"""Images of one size (N, H, W, C), or of several sizes, (H, W, C) each."""
Decoded = tuple[Pictures, dict[int, str]]
"""The images that could be read, in the order of their rows, and what is wrong with each other row."""


def decode_once(source: ImageSource, config: DataConfig, sizes: Sequence[Size], folder: Path | None) -> Decoded:
    """All images of a source: from a file in the folder, which the first process that asks for it writes.

    The images stay in memory where there is no folder, where it cannot be written, and where a row is broken, because
    the next run may find it mended.

    Args:
        source: the encoded images.
        config: how they are decoded.
        sizes: of the decoded image of each row.
        folder: of the files.
    """
    if folder is None or source.fingerprint is None:
        return _good(*_decode_all(source, config, sizes), sizes, config)
    settings = [config.size, config.channels, config.known_range, config.scale, config.crop == "center"]
    key = [FORMAT, source.fingerprint, len(source), *settings]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return _open_or_write(folder / f"{name}.npy", source, config, sizes)
    except OSError as error:  # a full disk, or one that may not be written
        reason = f"{folder} cannot be written ({error.strerror})"
        warnings.warn(f"decoded images stay in memory: {reason}", stacklevel=2)
        return _good(*_decode_all(source, config, sizes), sizes, config)


def _open_or_write(path: Path, source: ImageSource, config: DataConfig, sizes: Sequence[Size]) -> Decoded:
    with contextlib.suppress(OSError, ValueError, EOFError):  # it is not there yet, or damaged
        return _pictures(np.load(path, mmap_mode="r"), sizes, config.channels), {}
    flat, broken = _decode_all(source, config, sizes)
    if not broken:

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.save(file, flat)

        write_atomically(path, write, durable=True)
        flat = np.load(path, mmap_mode="r")
    return _good(flat, broken, sizes, config)


def _decode_all(source: ImageSource, config: DataConfig, sizes: Sequence[Size]) -> tuple[Pixels, dict[int, str]]:
    """The pixels of all good images one behind the other, and what is wrong with the others."""

    def attempt(row: int) -> Pixels | BrokenImageError:
        try:
            pixels = source.decode(row, source.image_bytes(row), config)
        except BrokenImageError as error:
            return error
        return pixels if pixels.shape[:2] == sizes[row] else BrokenImageError("its size is not what its header says")

    flat = np.empty(sum(map(math.prod, sizes)) * config.channels, dtype=np.uint8)
    end, broken = 0, {}
    largest = max(map(math.prod, sizes), default=1) * config.channels
    with ThreadPool(max(1, min(os.cpu_count() or 1, MAX_BYTES_AT_ONCE // largest))) as pool:
        for row, result in enumerate(pool.imap(attempt, range(len(source)))):
            if isinstance(result, BrokenImageError):
                broken[row] = str(result)
            else:
                flat[end : end + result.size] = result.reshape(-1)
                end += result.size
    return flat[:end], broken


def _good(flat: Pixels, broken: dict[int, str], sizes: Sequence[Size], config: DataConfig) -> Decoded:
    return _pictures(flat, [size for row, size in enumerate(sizes) if row not in broken], config.channels), broken


def _pictures(flat: Pixels, sizes: Sequence[Size], channels: int) -> Pictures:
    """The images whose pixels stand one behind the other.

    Raises:
        ValueError: there are more pixels, or fewer.
    """
    if len(set(sizes)) == 1:
        return flat.reshape(len(sizes), *sizes[0], channels)
    ends = np.cumsum([math.prod(size) * channels for size in sizes], dtype=int).tolist()
    if len(flat) != (ends[-1] if ends else 0):
        raise ValueError("these are not the pixels of these images")
    return [
        flat[end - math.prod(size) * channels : end].reshape(*size, channels)
        for size, end in zip(sizes, ends, strict=True)
    ]
