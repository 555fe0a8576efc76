"""What a run logs: losses, learning rate, gradient norm, speed and its config; what it will cost."""

import math
import statistics
import time
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ilvr_lightning.runtime.hardware import peak_memory
from ilvr_lightning.runtime.signals import is_last_step_of_epoch, is_optimizer_step, last_step
from ilvr_lightning.training.loggers import log_config
from ilvr_lightning.training.module import DDPM

COSTED = 20
"""The cost of a run is measured over so many steps after each start."""


class TrainingLog(Callback):
    """Logs DDPM's train/* and val/loss, shows the loss in the progress bar, and keeps the training time.

    After the first COSTED steps of a start it says how fast they are, when the run will end, and the memory they took.
    """

    def __init__(self) -> None:
        self._step_ends: list[float] = []
        self._since, self._since_step = 0.0, 0
        self._started = time.perf_counter()
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self._seconds_before + time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict.get("training_seconds", 0.0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                log_config(logger, _ddpm(pl_module).config, trainer.global_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that is resumed within an epoch does not start one.
        self._since, self._since_step = time.perf_counter(), trainer.global_step

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
        if not is_optimizer_step(trainer, batch_idx):
            return
        module = _ddpm(pl_module)
        self._note_cost(trainer, module)
        if not is_last_step_of_epoch(trainer) and step % every:
            return
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

    def _note_cost(self, trainer: pl.Trainer, module: DDPM) -> None:
        """Take the time of one of the first steps; print the cost of the run after the last of them."""
        if len(self._step_ends) == COSTED:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        self._step_ends.append(time.perf_counter())
        if len(self._step_ends) == COSTED:
            # The median leaves out what happens between two epochs, and the first steps are slower.
            seconds = statistics.median(b - a for a, b in pairwise(self._step_ends[COSTED // 2 :]))
            speed = module.config.data.batch_size / max(seconds, 1e-9)
            left = last_step(trainer) - trainer.global_step
            memory = f"{peak_memory(module.device) / 1e9:.1f} GB of memory"
            module.print(f"cost         {speed:,.1f} images/s, {memory}; {_end(left, seconds)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics({"val/loss": float(trainer.callback_metrics["val/loss"])}, step=trainer.global_step)


def _end(steps: float, seconds: float) -> str:
    """When so many steps of so many seconds each will be done, in words."""
    if math.isinf(steps):
        return "the run has no last step"
    left = timedelta(seconds=round(steps * seconds))
    at = (datetime.now() + left).strftime("%H:%M" if left < timedelta(hours=12) else "%Y-%m-%d %H:%M")
    return f"the {steps:,.0f} steps left take {left} h, until {at}, without validation, grids and calibration"


def _ddpm(pl_module: pl.LightningModule) -> DDPM:
    """Lightning types a callback for any module; TrainingLog is made for DDPM."""
    assert isinstance(pl_module, DDPM)
    return pl_module
