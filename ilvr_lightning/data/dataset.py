"""The decoded images of a source as a data set of PyTorch."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.cache import decode_all, open_cache
from ilvr_lightning.data.image_source import ImageSource, decode_image_at
from ilvr_lightning.data.images import BrokenImageError, Pixels, to_tensor
from ilvr_lightning.errors import UserError

Batch = dict[str, Tensor]
Sample = tuple[Tensor, int, int]
"""Image (C, H, W) in [-1, 1], its index, and the row that was broken in its place or -1."""

PADDING_INDEX = -1
"""The index of an image that validation must not count: it fills up a rank's share or replaces a broken image."""


class ImageDataset(Dataset[Sample]):
    """The images of a source, decoded and fitted; if they are few, they are kept in a file of the cache, or in memory.

    A broken row is replaced by the next good one and named, as its split counts, by the third value of a sample; the
    value is -1 where nothing was broken.

    Args:
        source: the encoded images.
        config: how they are decoded.
        cache: folder for decoded images.
        keep: whether they are kept if they are few.
    """

    def __init__(self, source: ImageSource, config: DataConfig, cache: Path | None = None, keep: bool = True) -> None:
        self.source = source
        self.config = config
        self.broken: dict[int, str] = {}
        """What was wrong with the rows that were left out at the start."""
        self.decoded: Pixels | None = None
        if keep and len(source) * config.size[0] * config.size[1] * config.channels <= config.cache_mb * 2**20:
            self._decode_all(cache)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Image (C, H, W) in [-1, 1], its index (or PADDING_INDEX), and the row that was broken (or -1)."""
        row = index if index >= 0 else -index - 1
        pixels, broken = self._pixels(row)
        return to_tensor(pixels), index if index >= 0 and broken < 0 else PADDING_INDEX, broken

    def _pixels(self, row: int) -> tuple[Pixels, int]:
        if self.decoded is not None:
            return self.decoded[row], -1
        for offset in range(len(self.source)):
            try:
                pixels = self._decode((row + offset) % len(self.source))
            except BrokenImageError:
                if self.config.on_broken == "stop":
                    raise
                continue
            return pixels, self.source.split_rows[row] if offset else -1
        raise UserError(f"data.path={self.config.path}: no image in it can be read")

    def _decode(self, row: int) -> Pixels:
        return decode_image_at(self.source, row, self.source.image_bytes(row), self.config)

    def _decode_all(self, folder: Path | None) -> None:
        """Decode every image once; broken rows are left out."""
        shape = (len(self.source), *self.config.size, self.config.channels)
        skip = self.config.on_broken == "skip"
        images, fingerprint = None, self.source.fingerprint
        if folder is not None and fingerprint is not None:
            try:
                images = open_cache(folder, fingerprint, shape, self._decode, skip)
            except OSError as error:  # a full disk, or one that may not be written
                reason = f"{folder} cannot be written ({error.strerror})"
                warnings.warn(f"decoded images stay in memory: {reason}", stacklevel=2)
        if images is None:
            images = decode_all(np.empty(shape, dtype=np.uint8), self._decode, skip)
        if not images.good:
            raise UserError(f"data.path={self.config.path}: no image in it can be read")
        self.decoded, self.broken = images.pixels, images.broken
        self.source = self.source.select(images.good)


def collate(samples: Sequence[Sample]) -> Batch:
    """image (B, C, H, W) float32, index (B,), broken (B,)."""
    images, indices, broken = zip(*samples, strict=True)
    return {"image": torch.stack(images), "index": torch.tensor(indices), "broken": torch.tensor(broken)}


def collate_pinned(samples: Sequence[Sample]) -> Batch:
    """The same in memory that a GPU copies from."""
    return {name: value.pin_memory() for name, value in collate(samples).items()}


class ImageBatches(Dataset[Batch]):
    """An ImageDataset whose items are batches, so that a sampler may yield the indices of each."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return collate([self.images[index] for index in indices])
