"""What hooks into the Trainer: EMA and logs; grids are in grid.py, checkpoints in checkpoints.py."""

import time
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils.tensorboard.summary import hparams

from ilvr_lightning.config.load import flatten, to_yaml
from ilvr_lightning.config.schema import Config
from ilvr_lightning.runtime.signals import is_last_step_of_epoch
from ilvr_lightning.training.events import Events

if TYPE_CHECKING:
    from ilvr_lightning.training.module import DDPM
from ilvr_lightning.training.ema import is_optimizer_step


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
            text = "\n".join("    " + line for line in to_yaml(config.without_local_paths()).splitlines())
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
        due = is_last_step_of_epoch(trainer) or step % getattr(trainer, "log_every_n_steps", 1) == 0
        if not due or step == self._logged_step or not is_optimizer_step(trainer, batch_idx):
            return
        self._logged_step = step
        module = _ddpm(pl_module)
        module.assert_finite_losses()
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
    settings = {
        key: value
        for key, value in flatten(config.without_local_paths())
        if isinstance(value, bool | int | float | str)
    }
    for summary in hparams(settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary)


def _ddpm(pl_module: pl.LightningModule) -> "DDPM":
    """Lightning types a callback for any module; TrainingLog is DDPM's."""
    return cast("DDPM", pl_module)
