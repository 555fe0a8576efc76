"""The decoded images of a source as a data set of PyTorch."""

import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.cache import decode_once
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import Pixels, to_tensor
from ilvr_lightning.errors import UserError

Batch = dict[str, Tensor]
Sample = tuple[Tensor, int]
"""Image (C, H, W) in [-1, 1], and its index."""

PADDING_INDEX = -1
"""The index of an image that validation must not count: it fills up a rank's share or replaces a broken image."""

MAX_NAMED = 5
"""Up to so many broken images of a data set are named at the start; all of them are counted."""


class ImageDataset(Dataset[Sample]):
    """The images of a source, decoded and fitted.

    If they are few, all are decoded at the start and kept in a file of the cache, or in memory; then broken rows are
    left out. Otherwise a broken row is replaced by the next good one.

    Args:
        source: the encoded images.
        config: how they are decoded.
        cache: folder for decoded images.
        keep: whether they are kept if they are few.

    Raises:
        UserError: none of the images can be read.
    """

    def __init__(self, source: ImageSource, config: DataConfig, cache: Path | None = None, keep: bool = True) -> None:
        self.source = source
        self.config = config
        self.decoded: Pixels | None = None
        if not keep or len(source) * config.size[0] * config.size[1] * config.channels > config.cache_mb * 2**20:
            return
        self.decoded, broken = decode_once(source, config, cache)
        if not len(self.decoded):
            reason = next(iter(broken.values()), "it is empty")
            raise UserError(f"data.path={config.path}: no image in it can be read: {reason}")
        if broken:
            self.source = source.select([row for row in range(len(source)) if row not in broken])
            for message in islice(broken.values(), MAX_NAMED):
                warnings.warn(message, stacklevel=2)
            warnings.warn(f"{len(broken)} broken images skipped in {source.name}", stacklevel=2)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Image (C, H, W) in [-1, 1], and its index; a negative index counts from -1 and gives PADDING_INDEX."""
        row = index if index >= 0 else -index - 1
        if self.decoded is not None:
            return to_tensor(self.decoded[row]), max(index, PADDING_INDEX)
        rows = (other % len(self) for other in range(row, row + len(self)))
        pixels, found = self.source.decode_first(((r, self.source.image_bytes(r)) for r in rows), self.config)
        return to_tensor(pixels), index if found == index else PADDING_INDEX


def collate(samples: Sequence[Sample]) -> Batch:
    """image (B, C, H, W) float32, index (B,)."""
    images, indices = zip(*samples, strict=True)
    return {"image": torch.stack(images), "index": torch.tensor(indices)}


class ImageBatches(Dataset[Batch]):
    """An ImageDataset whose items are batches, so that a sampler may yield the indices of each."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return collate([self.images[index] for index in indices])
