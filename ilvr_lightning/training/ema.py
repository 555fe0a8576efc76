"""EMA: the exponential moving average of the weights, which validation, grids and sampling use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Averages the weights of any LightningModule, with a warm-up: min(decay, (1 + n) / (10 + n)) after n steps.

    A checkpoint holds the average under `state_dict` and the raw weights under `current_model_state`.

    Args:
        decay: limit of the decay after the warm-up, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # It is compared with 0 at every step, for which the CPU would wait for the GPU.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _average(self, averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(self._average_model.n_averaged) if self._average_model is not None else int(updates)  # on the CPU
        torch._foreach_lerp_(list(averages), list(weights), 1 - min(self.decay, (1 + n) / (10 + n)))

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Give the module the average for its weights inside the block; the raw weights come back whatever happens."""
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
    """Make a module in training ready to sample: in eval mode, with the average if EMA is among the callbacks.

    Yields:
        Whether the weights are an average.
    """
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    training = pl_module.training
    pl_module.eval()
    try:
        with ema.averaged(pl_module) if ema else nullcontext():
            yield ema is not None
    finally:
        pl_module.train(training)


def sampling_batch_size(trainer: pl.Trainer, batch_size: int, most: int) -> int:
    """How many images a rank samples at once: without gradients, several times its share of a training batch fits."""
    return min(most, max(1, 4 * batch_size // trainer.world_size // trainer.accumulate_grad_batches))
