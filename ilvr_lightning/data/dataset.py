"""The decoded images of a source as a data set of PyTorch."""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.cache import Pictures, decode_once
from ilvr_lightning.data.crops import Corner, Size, covering, random_window, tiles, window
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import BrokenImageError, Pixels, to_tensor
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError

Batch = dict[str, Tensor]
Sample = tuple[Tensor, int]
"""Image (C, H, W) in [-1, 1], and its index."""

PADDING_INDEX = -1
"""The index of an image that validation must not count: it fills up a rank's share or replaces a broken image."""

MAX_NAMED = 5
"""Up to so many broken images of a data set are named at the start; all of them are counted."""


class ImageDataset(Dataset[Sample]):
    """The images of a source: its pictures, decoded and fitted, or windows of them as data.crop says.

    If they are few, all are decoded at the start and kept in a file of the cache, or in memory; then broken rows are
    left out. Otherwise a broken row is replaced by the next good one.

    Args:
        source: the encoded images.
        config: how they are decoded.
        cache: folder for decoded images.
        keep: whether they are kept if they are few; if not, none is looked at before it is asked for.

    Raises:
        UserError: none of the images can be read.
    """

    def __init__(self, source: ImageSource, config: DataConfig, cache: Path | None = None, keep: bool = True) -> None:
        self.source = source
        self.config = config
        self.decoded: Pictures | None = None
        self._pictures: Sequence[int] | NDArray[np.int64] = range(len(source))
        """The row of the source that each image is cropped from."""
        self._last: tuple[int, Pixels, int] | None = None
        """The picture that was decoded last, of which the next image is often another part: its number, its pixels, and
        the number of the picture that they are of."""
        self._corners: list[Corner] = []
        """Where each tile begins."""
        if not keep:
            return
        sizes = [config.size] * len(source) if config.crop == "center" else self._measure()
        needed = sum(map(math.prod, sizes)) * config.channels
        if needed <= config.cache_mb * 2**20:
            self.decoded, broken = decode_once(self.source, config, sizes, cache)
            self._leave_out(broken)
            sizes = [size for row, size in enumerate(sizes) if row not in broken]
        elif config.cache_mb and config.crop != "center":
            warnings.warn(
                f"the pictures of {source.name} take {needed >> 20:,} MiB, more than data.cache_mb={config.cache_mb}: "
                "each image decodes a picture anew; raise data.cache_mb or data.scale if this is slow",
                stacklevel=2,
            )
        self._lay_out(sizes)

    def _measure(self) -> list[Size]:
        """The sizes of all pictures; those that have none are left out."""
        sizes, broken = [], {}
        for row in range(len(self.source)):
            try:
                sizes.append(self.source.size(row, self.config))
            except BrokenImageError as error:
                broken[row] = str(error)
        self._leave_out(broken)
        return sizes

    def _leave_out(self, broken: Mapping[int, str]) -> None:
        if not broken and len(self.source):
            return
        good = [row for row in range(len(self.source)) if row not in broken]
        if not good:
            reason = next(iter(broken.values()), "it is empty")
            raise UserError(f"data.path={self.config.path}: no image in it can be read: {reason}")
        for message in islice(broken.values(), MAX_NAMED):
            warnings.warn(message, stacklevel=4)
        warnings.warn(f"{len(broken)} broken images skipped in {self.source.name}", stacklevel=4)
        self.source = self.source.select(good)

    def _lay_out(self, sizes: Sequence[Size]) -> None:
        """Say which picture each image is cropped from: as many random windows as cover it, or all of its tiles."""
        config = self.config
        if config.crop == "center":
            self._pictures = range(len(sizes))
            return
        corners = [tiles(size, config) if config.crop == "tiles" else [] for size in sizes]
        counts = [len(each) or covering(size, config) for each, size in zip(corners, sizes, strict=True)]
        if config.crop == "random":  # an epoch has a batch at least
            counts = [count * -(-config.batch_size // sum(counts)) for count in counts]
        self._corners = [corner for each in corners for corner in each]
        self._pictures = np.repeat(np.arange(len(sizes)), counts)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Sample:
        """Image (C, H, W) in [-1, 1], and its index; a negative index counts from -1 and gives PADDING_INDEX.

        Where images are cropped at random, the same part each time.
        """
        return self.image(index, derive_seed(0, "crop", index))

    def image(self, index: int, seed: int) -> Sample:
        """The same; a seed chooses the part where images are cropped at random."""
        row = index if index >= 0 else -index - 1
        picture = found = int(self._pictures[row])
        last = self._last
        if self.decoded is not None:
            pixels = self.decoded[picture]
        elif last is not None and last[0] == picture:
            pixels, found = last[1:]
        else:
            count = len(self.source)
            rows = (other % count for other in range(picture, picture + count))
            candidates = ((other, self.source.image_bytes(other)) for other in rows)
            pixels, found = self.source.decode_first(candidates, self.config)
            if self.config.crop != "center":
                self._last = picture, pixels, found
        if self._corners and found == picture:
            pixels = window(pixels, self.config, self._corners[row])
        else:
            pixels = random_window(pixels, self.config, seed)
        return to_tensor(pixels), index if found == picture and index >= 0 else PADDING_INDEX

    def split_row(self, index: int) -> int:
        """The row of the split that an image is from."""
        return self.source.split_rows[int(self._pictures[index])]

    def some(self, count: int) -> Sequence[int]:
        """The first so many images; where they are parts of pictures, from all over the data set."""
        count = min(count, len(self))
        return range(count) if self.config.crop == "center" else [i * len(self) // count for i in range(count)]


def collate(samples: Sequence[Sample]) -> Batch:
    """image (B, C, H, W) float32, index (B,)."""
    images, indices = zip(*samples, strict=True)
    return {"image": torch.stack(images), "index": torch.tensor(indices)}


class ImageBatches(Dataset[Batch]):
    """An ImageDataset whose items are batches, so that a sampler may yield the indices, or (index, seed), of each."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int] | Sequence[tuple[int, int]]) -> Batch:
        return collate([self.images.image(*i) if isinstance(i, tuple) else self.images[i] for i in indices])
