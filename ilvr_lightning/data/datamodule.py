"""ImageDataModule: images from a folder, Parquet files or the Hugging Face Hub, as (B, C, H, W) in [-1, 1]."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from ilvr_lightning.config.load import from_dict
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.dataset import Batch, ImageBatches, ImageDataset
from ilvr_lightning.data.images import from_tensor
from ilvr_lightning.data.order import ShuffledOrder, WindowedOrder, rank_share
from ilvr_lightning.data.references import Reference, find_references
from ilvr_lightning.data.shards import ParquetSource
from ilvr_lightning.data.splits import open_splits
from ilvr_lightning.data.streaming import StreamBatches, stream_order
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.signals import STATUS


class TrainBatchSampler(DistributedSampler[list[tuple[int, int]]]):
    """The rows of this rank's micro-batches with the seeds of their crops, from the current step on.

    Like ValidationSampler it is a DistributedSampler in name alone, so that Lightning knows that ranks have shares
    already and does not divide them again.

    Args:
        order: which row stands at which index of which step's batch.
        shares: the indices of each global batch that this rank computes, one range per micro-batch.
        position: the number of optimizer steps done so far.
        steps: optimizer steps of an epoch.
    """

    def __init__(self, order: ShuffledOrder, shares: Sequence[range], position: Callable[[], int], steps: int) -> None:
        self.order, self.shares, self.position, self.steps = order, shares, position, steps

    def __len__(self) -> int:
        return self.steps * len(self.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.position()
        for step in range(first, first + self.steps):
            rows = self.order.batch(step).tolist()
            for share in self.shares:
                yield [(rows[index], derive_seed(self.order.seed, "train", step, index)) for index in share]


class ValidationSampler(DistributedSampler[list[int]]):
    """Batches of every world_size-th image; negative indices, which count for nothing, make all shares equally long.

    Args:
        length: number of images.
        batch_size: images per batch of this rank.
        rank: of this process, from 0.
        world_size: number of processes.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        padded = -(-length // world_size) * world_size
        indices = [i if i < length else -(i % length) - 1 for i in range(rank, padded, world_size)]
        self.batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _ignore_signals(worker: int) -> None:
    """Leave a signal to the group of processes to the main process, which ends its workers itself."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)


class ImageDataModule(pl.LightningDataModule):
    """Training and validation images, for any Trainer and any LightningModule.

        data = ImageDataModule(path="images", image_size=64, batch_size=32)
        Trainer(max_steps=1000).fit(module, datamodule=data)

    A batch is a dict: "image" (B, C, H, W) float32 in [-1, 1] and "index" (B,), the number of each image in its part,
    which is negative for images that validation must not count. `batch_size` is the number of images of one optimizer
    step, over all devices and accumulated micro-batches. The order follows from the seed and Trainer.global_step, so
    that a resumed run sees the images that it would have seen.

    Args:
        config: what to read and how; or give its fields as keyword arguments, or both to change some. `setup` replaces
            its value_range by what it finds.
        seed: of the order, and of which images are held out.
        cache: folder for decoded images, which ranks and later runs share; without one they are decoded in memory.
        settings: fields of DataConfig.

    Raises:
        UserError: a setting is unknown or out of its range; by `setup`, if the data set does not exist, is gated or
            empty, or has no image column.
    """

    def __init__(
        self, config: DataConfig | None = None, seed: int = 0, cache: Path | None = None, **settings: Any
    ) -> None:
        super().__init__()
        config = config or DataConfig()
        self.config = from_dict(DataConfig, {**dataclasses.asdict(config), **settings}) if settings else config
        self.seed = seed
        self.cache = cache
        self.train: ImageDataset | None = None
        self.validation: ImageDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the data set once; every rank reads the same rows."""
        if self.train is not None:
            return
        self.config, self.train, self.validation = open_splits(self.config, self.seed, self.cache)

    @property
    def counts(self) -> str:
        """How many images there are, in words."""
        assert self.train is not None and self.validation is not None
        source = self.train.source
        streamed = f" (streamed from {len(source.files):,} Parquet shards)" if isinstance(source, ParquetSource) else ""
        crops = {"center": "", "random": "random crops of ", "tiles": "tiles of "}[self.config.crop]
        pictures = f"{len(source):,} picture{'s' * (len(source) != 1)}"
        parts = f" ({crops}{pictures})" if crops and not streamed else ""
        return f"{len(self.train):,} images to train on{streamed}{parts}, {len(self.validation):,} to validate on"

    def references(self, given: Sequence[str] = ()) -> list[Reference]:
        """Reference images for grids: those named, as `find_references` finds them, or the first four that validate."""
        self.setup()
        if given:
            shape, value_range = (self.config.channels, *self.config.size), self.config.known_range
            return list(find_references(given, shape, flag="grid.references", value_range=value_range))
        assert self.validation is not None
        images = (self.validation[row][0] for row in self.validation.some(4))
        return [Reference(name=f"validation_{i}", pixels=from_tensor(image)) for i, image in enumerate(images)]

    @property
    def order(self) -> ShuffledOrder | WindowedOrder:
        """Which row stands at which index of which step's global batch.

        Raises:
            UserError: the batch is larger than the data set.
        """
        assert self.train is not None
        source = self.train.source
        if isinstance(source, ParquetSource):
            return stream_order(source, self.config, self.seed)
        return ShuffledOrder(len(self.train), self.config.batch_size, self.seed)

    def rows_of(self, step: int) -> list[int]:
        """The rows (B,) of a step's global batch, by their indices in it, as the training split counts them."""
        assert self.train is not None
        return [self.train.split_row(row) for row in self.order.batch(step).tolist()]

    def check_batch_size(self, trainer: pl.Trainer) -> int:
        """The number of micro-batches that a global batch is divided into: devices x nodes x accumulation.

        Raises:
            UserError: the batch is not a multiple of it, or the data set is smaller than the batch.
        """
        self.setup()
        micro_batches = trainer.world_size * trainer.accumulate_grad_batches
        batch_size = self.config.batch_size
        if batch_size % micro_batches:
            raise UserError(
                "data.batch_size is the global batch, and must be a multiple of devices x nodes x accumulation: got "
                f"{batch_size} for {trainer.world_size} x {trainer.accumulate_grad_batches}; give "
                f"{max(micro_batches, batch_size // micro_batches * micro_batches)}"
            )
        _ = self.order  # which refuses a batch that is larger than the data set
        return micro_batches

    def train_dataloader(self) -> DataLoader[Batch] | StreamBatches:
        assert self.train is not None and self.trainer is not None
        trainer, source, micro_batches = self.trainer, self.train.source, self.check_batch_size(self.trainer)
        shares = rank_share(self.config.batch_size, micro_batches, trainer.global_rank, trainer.world_size)
        steps = self.config.steps_per_epoch(len(self.train))
        position, order = (lambda: trainer.global_step), self.order
        if isinstance(order, ShuffledOrder):
            return self._loader(self.train, TrainBatchSampler(order, shares, position, steps))
        assert isinstance(source, ParquetSource)
        return StreamBatches(source, order, self.config, shares, position, steps, max(1, self._workers()))

    def val_dataloader(self) -> DataLoader[Batch]:
        assert self.validation is not None and self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        batch_size = max(1, self.config.batch_size // world_size)
        return self._loader(self.validation, ValidationSampler(len(self.validation), batch_size, rank, world_size))

    def _loader(self, images: ImageDataset, sampler: DistributedSampler[Any]) -> DataLoader[Batch]:
        # A worker would be forked amid the threads of a stream.
        idle = self.config.streaming or (self.config.num_workers is None and images.decoded is not None)
        workers = 0 if idle else self._workers()
        return DataLoader(
            ImageBatches(images),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )

    def _workers(self) -> int:
        """The number of processes or threads that decode."""
        if self.config.num_workers is not None:
            return self.config.num_workers
        local = self.trainer.num_devices if self.trainer is not None else 1
        return min(8, max(1, (os.cpu_count() or 2) // local - 1))
