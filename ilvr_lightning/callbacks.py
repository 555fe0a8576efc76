"""What hooks into the Trainer: EMA and logs; grids are in grid.py, checkpoints in checkpoints.py."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from ilvr_lightning.config import Config
from ilvr_lightning.configure import flatten, to_yaml
from ilvr_lightning.events import Events
from ilvr_lightning.stopping import ends_epoch, stop_callback

if TYPE_CHECKING:
    from ilvr_lightning.module import DDPM


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
def sampling_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[bool]:
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


def images_at_once(trainer: pl.Trainer, batch_size: int, most: int) -> int:
    """How many pictures a rank samples at once: without gradients several times its share of a training batch fits."""
    return min(most, max(1, 4 * batch_size // trainer.world_size // trainer.accumulate_grad_batches))


def step_done(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of its step."""
    return ends_epoch(trainer) or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class TrainingLog(Callback):
    """train/* and val/loss in TensorBoard, the loss in the progress bar; the checkpoint keeps how long it took."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._since_step = 0
        self._logged_step = -1
        self._validated_step = -1
        self._started = time.perf_counter()
        self._before = 0.0

    def state_dict(self) -> dict[str, Any]:
        seconds = self._before + time.perf_counter() - self._started
        return {"training_seconds": seconds, "validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict.get("training_seconds", 0.0)
        self._validated_step = state_dict.get("validated_step", -1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if isinstance(trainer.logger, Events):
            config, step = _ddpm(pl_module).config, trainer.logger.first_step
            text = "\n".join("    " + line for line in to_yaml(config.portable()).splitlines())
            trainer.logger.write(lambda writer: writer.add_text("config", text, step))
            trainer.logger.write(lambda writer: _add_hyper_parameters(writer, config))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since, self._since_step = time.perf_counter(), trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            _ddpm(pl_module).reset_step_loss()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = ends_epoch(trainer) or step % getattr(trainer, "log_every_n_steps", 1) == 0
        if not due or step == self._logged_step or not step_done(trainer, batch_idx):
            return
        self._logged_step = step
        module = _ddpm(pl_module)
        module.check_finite()
        metrics = module.pop_losses()
        pl_module.log("loss", metrics.get("train/loss", float("nan")), prog_bar=True, logger=False)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        images = (step - self._since_step) * module.config.data.global_batch
        metrics |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": float(module.grad_norm),
            "train/images_per_second": float(images) / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        self._since, self._since_step = time.perf_counter(), step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that was stopped between its validation and the epoch's end validates again.
        if not trainer.sanity_checking and trainer.global_step != self._validated_step:
            self._validated_step = trainer.global_step
            for logger in trainer.loggers:
                logger.log_metrics({"val/loss": float(trainer.callback_metrics["val/loss"])}, step=trainer.global_step)


def _add_hyper_parameters(writer: Any, config: Config) -> None:
    """The settings as TensorBoard's hyper-parameters, judged by val/loss, without a value that was never measured."""
    settings = {key: value for key, value in flatten(config.portable()) if isinstance(value, bool | int | float | str)}
    for summary in hparams(settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary)


def _ddpm(pl_module: pl.LightningModule) -> "DDPM":
    """Lightning types a callback for any module; TrainingLog is DDPM's."""
    return cast("DDPM", pl_module)
