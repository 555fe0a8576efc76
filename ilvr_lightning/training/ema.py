"""What hooks into the Trainer: EMA and logs; grids are in grid.py, checkpoints in checkpoints.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from ilvr_lightning.runtime.signals import is_last_step_of_epoch, stop_callback

if TYPE_CHECKING:
    pass


class EMA(WeightAveraging):
    """Exponential moving average of the weights, min(decay, (1 + n) / (10 + n)) after n steps.

    A checkpoint holds the average under `state_dict` and the raw weights under `current_model_state`.

    Args:
        decay: the limit of the warm-up, in [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # Compared with 0 at every step: on the GPU that would wait for it.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _average(self, averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(list(averages), list(weights), 1 - min(self.decay, (1 + n) / (10 + n)))

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """The module with the average for weights; the raw ones come back whatever happens."""
        if self._average_model is None or self._swapped:
            yield
            return
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False


@contextmanager
def ema_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[bool]:
    """The module ready to sample from amid training: in eval mode, with the average if one is kept; whether it is."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    stop = stop_callback(trainer)
    training = pl_module.training
    pl_module.eval()
    try:
        with ema.averaged(pl_module) if ema else nullcontext(), stop.at_once(trainer) if stop else nullcontext():
            yield ema is not None
    finally:
        pl_module.train(training)


def sampling_batch_size(trainer: pl.Trainer, batch_size: int, most: int) -> int:
    """How many pictures a rank samples at once: without gradients several times its share of a training batch fits."""
    return min(most, max(1, 4 * batch_size // trainer.world_size // trainer.accumulate_grad_batches))


def is_optimizer_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of its step."""
    return is_last_step_of_epoch(trainer) or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
