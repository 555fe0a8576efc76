"""ImageDataModule: images from the Hugging Face Hub, a folder or Parquet, as (B, C, H, W) in [-1, 1]."""

import os
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.cache import decode_all, open_cache
from ilvr_lightning.data.images import BrokenImageError, Pixels, from_tensor, to_tensor
from ilvr_lightning.data.order import TrainBatchSampler, ValidationSampler, _too_large
from ilvr_lightning.data.references import Reference, find_images, read_references
from ilvr_lightning.data.shards import ParquetSource, open_shards
from ilvr_lightning.data.sources import Rows, decode_image_at, open_splits
from ilvr_lightning.data.streaming import StreamBatches, stream_order
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.signals import STATUS

Batch = dict[str, Tensor]


PADDING_INDEX = -1
"""Index of an image that counts for nothing in validation: it fills up a rank's share or replaces a broken one."""


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Rows of a split, decoded, fitted and, where they are few, kept: in a file of the cache folder, or in memory.

    A broken row gives the next good one in its place and is named, as its split counts, by the third value; -1 where
    nothing was broken.

    Args:
        rows: encoded images.
        config: how they are decoded.
        cache: folder for the decoded ones.
        keep: keep them if they are few.
    """

    def __init__(self, rows: Rows, config: DataConfig, cache: Path | None = None, keep: bool = True) -> None:
        self.rows = rows
        self.config = config
        self.broken: dict[int, str] = {}
        self.cache: Pixels | None = None
        if keep and len(rows) * config.size[0] * config.size[1] * config.channels <= config.cache_mb * 2**20:
            self._fill_cache(cache)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Image (C, H, W) in [-1, 1], its index (or PADDING_INDEX), the row that was broken (or -1)."""
        row = index if index >= 0 else -index - 1
        pixels, broken = self._pixels(row)
        return to_tensor(pixels), index if index >= 0 and broken < 0 else PADDING_INDEX, broken

    def _pixels(self, row: int) -> tuple[Pixels, int]:
        if self.cache is not None:
            return self.cache[row], -1
        for offset in range(len(self.rows)):
            candidate = (row + offset) % len(self.rows)
            try:
                return self._decode(candidate), self.rows.number(row) if offset else -1
            except BrokenImageError:
                if self.config.on_broken == "stop":
                    raise
        raise UserError(f"data.path={self.config.path}: no image in it can be read")

    def _decode(self, row: int) -> Pixels:
        return decode_image_at(self.rows, row, self.rows.image_bytes(row), self.config)

    def _fill_cache(self, folder: Path | None) -> None:
        """Decode everything once; broken rows leave the set here, named and counted."""
        shape = (*self.config.size, self.config.channels)
        skip = self.config.on_broken == "skip"
        made, fingerprint = None, self.rows.fingerprint
        if folder is not None and fingerprint is not None:
            try:
                made = open_cache(folder, fingerprint, len(self.rows), shape, self._decode, skip)
            except OSError as error:  # a full disk, or one that may not be written
                reason = f"{folder} cannot be written ({error.strerror})"
                warnings.warn(f"decoded images stay in memory: {reason}", stacklevel=2)
        if made is None:
            made = decode_all(len(self.rows), shape, self._decode, skip)
        if not made.good:
            raise UserError(f"data.path={self.config.path}: no image in it can be read")
        self.cache, self.broken = made.pixels, made.broken
        self.rows = self.rows.select(made.good)


def collate(samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
    """image (B, C, H, W) float32, index (B,), broken (B,)."""
    images, indices, broken = zip(*samples, strict=True)
    return {"image": torch.stack(images), "index": torch.tensor(indices), "broken": torch.tensor(broken)}


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group is the main process's to answer: it ends its workers itself."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)


def collate_pinned(samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
    """The same in memory that a GPU copies from."""
    return {name: value.pin_memory() for name, value in collate(samples).items()}


class ImageDataModule(pl.LightningDataModule):
    """Training and validation images.

    Args:
        config: what to read and how.
        seed: of the order and of what is held out.
        cache: folder for decoded images that ranks and later runs share; without one they are decoded in memory.

    Raises:
        UserError: the data set is missing, gated, empty, or has no image column.
    """

    def __init__(self, config: DataConfig, seed: int = 0, cache: Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.cache = cache
        self.train: ImageDataset | None = None
        self.validation: ImageDataset | None = None
        self._seen_broken: set[tuple[str, int]] = set()

    def setup(self, stage: str | None = None) -> None:
        """Open the splits once; every rank reads the same rows."""
        if self.train is not None:
            return
        train, validation = open_shards(self.config) if self.config.streaming else open_splits(self.config, self.seed)
        self.train = ImageDataset(train, self.config, self.cache, keep=not self.config.streaming)
        self.validation = ImageDataset(validation, self.config, self.cache)
        for part, rows in (("train", self.train), ("validation", self.validation)):
            for message in list(rows.broken.values())[:5]:
                warnings.warn(message, stacklevel=2)
            if rows.broken:
                warnings.warn(f"{len(rows.broken)} broken images skipped in {part}", stacklevel=2)

    @property
    def counts(self) -> str:
        """How many images there are, in words."""
        assert self.train is not None and self.validation is not None
        rows = self.train.rows
        streamed = f" (streamed from {len(rows.files):,} Parquet shards)" if isinstance(rows, ParquetSource) else ""
        return f"{len(self.train):,} images to train on{streamed}, {len(self.validation):,} to validate on"

    def references(self, patterns: Sequence[str]) -> list[Reference]:
        """Reference pictures for grids: the files named, else the first four validation images."""
        if patterns:
            paths = find_images(patterns, "grid.references")
            return read_references(paths, self.config.size, self.config.channels)
        assert self.validation is not None
        rows = range(min(4, len(self.validation)))
        return [Reference(name=f"validation_{i}", pixels=from_tensor(self.validation[i][0])) for i in rows]

    def check_batch_size(self, trainer: pl.Trainer) -> int:
        """The number of parts that a global batch is shared out in.

        Raises:
            UserError: the batch does not divide by it, or the set is smaller than the batch.
        """
        parts = trainer.world_size * trainer.accumulate_grad_batches
        if self.config.batch_size % parts:
            raise UserError(
                "data.batch_size is the global batch, and must be a multiple of devices x nodes x accumulation: got "
                f"{self.config.batch_size} for {trainer.world_size} x {trainer.accumulate_grad_batches}; give "
                f"{max(parts, self.config.batch_size // parts * parts)}"
            )
        if self.train is not None and self.config.batch_size > len(self.train):
            raise UserError(_too_large(self.config.batch_size, len(self.train)))
        return parts

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step's global batch (B,), in the order of their places, as the training split counts them."""
        assert self.train is not None
        rows = self.train.rows
        order = (
            stream_order(rows, self.config, self.seed) if isinstance(rows, ParquetSource) else self._batches(len(rows))
        )
        return [rows.number(row) for row in order.batch(step).tolist()]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int, int]] | StreamBatches:
        assert self.train is not None and self.trainer is not None
        trainer, rows = self.trainer, self.train.rows
        shares = (self.check_batch_size(trainer), trainer.global_rank, trainer.world_size, lambda: trainer.global_step)
        if not isinstance(rows, ParquetSource):
            return self._loader(self.train, batch_sampler=self._batches(len(rows), *shares))
        order, steps = stream_order(rows, self.config, self.seed), self.config.steps_per_epoch(len(rows))
        return StreamBatches(
            rows, order, self.config, *shares, steps=steps, threads=max(1, self._workers()),
            collate=collate_pinned if torch.cuda.is_available() else collate,
        )  # fmt: skip

    def _batches(
        self, length: int, parts: int = 1, rank: int = 0, world: int = 1, position: Callable[[], int] = int
    ) -> TrainBatchSampler:
        config = self.config
        steps = config.steps_per_epoch(length)
        return TrainBatchSampler(length, config.batch_size, parts, rank, world, self.seed, position, steps)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int, int]]:
        assert self.validation is not None and self.trainer is not None
        share = ValidationSampler(len(self.validation), self.trainer.global_rank, self.trainer.world_size)
        batch_size = max(1, self.config.batch_size // self.trainer.world_size)
        return self._loader(self.validation, sampler=share, batch_size=batch_size)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Report rows that a worker found broken, each once; on the CPU still, so that nothing waits for the device."""
        if "broken" in batch and not self._cached:
            part = "train" if self.trainer is not None and self.trainer.training else "validation"
            for row in batch.pop("broken").tolist():
                if row >= 0 and (part, row) not in self._seen_broken:
                    self._seen_broken.add((part, row))
                    count = len(self._seen_broken)
                    warnings.warn(f"row {row} of {part} is broken and skipped ({count} so far)", stacklevel=2)
        return batch

    @property
    def _cached(self) -> bool:
        return all(rows is not None and rows.cache is not None for rows in (self.train, self.validation))

    def _loader(self, rows: ImageDataset, **options: Any) -> DataLoader[tuple[Tensor, int, int]]:
        # A worker would be forked off amid the threads of a stream.
        idle = self.config.streaming or (self.config.num_workers is None and rows.cache is not None)
        workers = 0 if idle else self._workers()
        return DataLoader(
            rows,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _workers(self) -> int:
        """Processes or threads that decode."""
        if self.config.num_workers is not None:
            return self.config.num_workers
        local = self.trainer.num_devices if self.trainer is not None else 1
        return min(8, max(1, (os.cpu_count() or 2) // local - 1))
