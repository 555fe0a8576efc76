"""What a run logs to TensorBoard: losses, learning rate, gradient norm, speed and its config."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from ilvr_lightning.config.load import flatten, to_yaml
from ilvr_lightning.config.schema import Config
from ilvr_lightning.runtime.signals import is_last_step_of_epoch, is_optimizer_step
from ilvr_lightning.training.module import DDPM


class RunLogger(TensorBoardLogger):
    """TensorBoard in the run's own folder; config.yaml, which lies there, takes the place of Lightning's hparams.yaml.

    Args:
        folder: the run's.
        resumed_step: the step that the run resumes from, or None. What was logged after it is purged, since it is
            logged again.
    """

    NAME_HPARAMS_FILE = "config.yaml"

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        # TensorBoard drops what was logged at the step given and after it.
        purge_step = 0 if resumed_step is None else resumed_step + 1
        has_events = any(folder.glob("events.out.tfevents.*"))
        super().__init__(
            folder, name="", version="", default_hp_metric=False, purge_step=purge_step if has_events else None
        )


class TrainingLog(Callback):
    """Logs DDPM's train/* and val/loss, shows the loss in the progress bar, and keeps the training time."""

    def __init__(self) -> None:
        self._since, self._since_step = time.perf_counter(), 0
        self._started = time.perf_counter()
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self._seconds_before + time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict.get("training_seconds", 0.0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            config = _ddpm(pl_module).config
            text = "\n".join("    " + line for line in to_yaml(config.without_local_paths()).splitlines())
            trainer.logger.experiment.add_text("config", text, trainer.global_step)
            _add_hyper_parameters(trainer.logger, config)

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
        step, every = trainer.global_step, getattr(trainer, "log_every_n_steps", 1)
        due = is_last_step_of_epoch(trainer) or step % every == 0
        if not due or not is_optimizer_step(trainer, batch_idx):
            return
        module = _ddpm(pl_module)
        module.assert_finite_losses()
        metrics = module.pop_losses()
        pl_module.log("loss", metrics.get("train/loss", float("nan")), prog_bar=True, logger=False)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        metrics |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": float(module.grad_norm),
            "train/images_per_second": (step - self._since_step) * module.config.data.batch_size / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        self._since, self._since_step = time.perf_counter(), step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics({"val/loss": float(trainer.callback_metrics["val/loss"])}, step=trainer.global_step)


def _add_hyper_parameters(logger: TensorBoardLogger, config: Config) -> None:
    """Add the settings to TensorBoard's HPARAMS page; its metric, val/loss, is logged as a scalar."""
    values = flatten(config.without_local_paths())
    settings = {key: value for key, value in values if isinstance(value, bool | int | float | str)}
    for summary in hparams(settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
        logger.experiment.file_writer.add_summary(summary)


def _ddpm(pl_module: pl.LightningModule) -> DDPM:
    """Lightning types a callback for any module; TrainingLog is made for DDPM."""
    assert isinstance(pl_module, DDPM)
    return pl_module
