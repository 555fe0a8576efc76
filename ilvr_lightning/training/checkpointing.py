"""When a run saves, and how: a checkpoint is complete or not there."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.checkpoints.files import is_intact
from ilvr_lightning.errors import StopRequested
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.signals import is_last_step_of_epoch, is_optimizer_step
from ilvr_lightning.training.module import DDPM


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it, reads it back, and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        def write(partial: Path) -> None:
            try:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer hides the reason
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            if not is_intact(partial):
                raise OSError(None, "the checkpoint that was written does not read back", str(path))

        write_atomically(Path(path), write, durable=True)


class SaveCheckpoints(Checkpoint):
    """Saves last.ckpt at fixed steps, at each epoch's end and when a signal stops the run; best.ckpt by val/loss.

    It comes last among the callbacks, so that it saves what the others did.

    Args:
        folder: where they go.
        every_n_steps: optimizer steps between saves.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.best: float | None = None
        self.last: float | None = None
        self._saved_step = -1
        self._saved_path: Path | None = None

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: the name that the class had in earlier versions."""
        return "Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.last = state_dict["best"], state_dict.get("last")

    @property
    def saved(self) -> str:
        """Which checkpoint was saved last, in words."""
        if self._saved_path is None:
            return "nothing has been saved yet"
        return f"{self._saved_path} holds step {self._saved_step}"

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the epoch's batches again where the run resumes with another trainer.accumulate_grad_batches.

        This edits the loop counters that Lightning (2.5 and 2.6) keeps in a checkpoint.
        """
        self._saved_step = checkpoint["global_step"]
        self._saved_path = Path(trainer.ckpt_path or self.folder / "last.ckpt")
        before = checkpoint["hyper_parameters"]["config"]["trainer"].get("accumulate_grad_batches") or 1
        now = trainer.accumulate_grad_batches
        if before != now:
            batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            under_way = batches["processed"] - batches["completed"]
            processed = batches["processed"] // before * now
            batches.update({**dict.fromkeys(batches, processed), "completed": processed - under_way})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.every_n_steps == 0
        if due and is_optimizer_step(trainer, batch_idx) and not is_last_step_of_epoch(trainer):
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        if math.isfinite(loss):
            self.last = loss
            # The best one first: a run that is killed between the two resumes from before, and saves it again.
            if self.best is None or loss < self.best:
                self.best = loss
                self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not isinstance(exception, StopRequested) or not fitting or trainer.global_step == 0:
            return
        if self._saved_step != trainer.global_step:
            self._save(trainer, "last.ckpt")
        config, last = self.folder.parent / "config.yaml", self.folder / "last.ckpt"
        say(f"\nstopped at step {trainer.global_step}; a checkpoint is saved. To resume: "
            f"python train.py {config} resume={last}")  # fmt: skip

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        module = trainer.lightning_module
        if isinstance(module, DDPM):
            module.assert_finite_losses()
            module.assert_finite_weights()
        for logger in trainer.loggers:
            logger.save()  # the log must not be behind the checkpoint
        trainer.save_checkpoint(self.folder / name)
        if name == "last.ckpt":
            self._saved_step, self._saved_path = trainer.global_step, self.folder / name
