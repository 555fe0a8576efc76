"""When a run saves and what it can go on from; a checkpoint is whole or not there."""

import errno
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.errors import StopRequested
from ilvr_lightning.runtime.signals import is_last_step_of_epoch, validates
from ilvr_lightning.training.ema import is_optimizer_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under another name, flushes, reads back and renames.

    A disk that refuses is remembered rather than raised: only one rank writes, and the others must hear of it too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        def write(partial: Path) -> None:
            try:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer hides the reason
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            if not is_intact(partial):
                raise OSError(None, "what was written does not read back", str(path))

        self.failure = None
        try:
            write_atomically(Path(path), write, durable=True)
        except OSError as error:
            self.failure = error


def is_intact(path: Path) -> bool:
    """Whether a checkpoint's every byte is as its checksums say."""
    if not path.is_file():  # a pipe may never end
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError):
        return False


class SaveCheckpoints(Checkpoint):
    """last.ckpt every so many steps and at each epoch's end, best.ckpt by val/loss.

    Args:
        folder: where they go.
        every_n_steps: optimizer steps between saves.
        on_full_disk: what a checkpoint that cannot be written does.
    """

    def __init__(self, folder: Path, every_n_steps: int, on_full_disk: Literal["stop", "continue"] = "stop") -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.on_full_disk = on_full_disk
        self.best: float | None = None
        self.last: float | None = None
        self._last_step = -1
        self._written: tuple[Path, int] | None = None
        self._validated_step = -1
        self._has_validated = False
        self._epoch_end_due = False
        self._overdue = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "last": self.last, "epoch_end_due": self._epoch_end_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.last = state_dict["best"], state_dict.get("last")

    @property
    def saved(self) -> str:
        """Which checkpoint is the last that was written, in words."""
        if self._written is None:
            return "nothing was saved yet"
        path, step = self._written
        return f"{path} holds step {step}"

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have what was stopped halfway begin anew: an accumulated step, or a validation with the end of its epoch."""
        self._last_step = checkpoint["global_step"]
        self._written = (Path(trainer.ckpt_path or self.folder / "last.ckpt"), self._last_step)
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        before = checkpoint["hyper_parameters"]["config"]["trainer"].get("accumulate_grad_batches") or 1
        parts, current = trainer.accumulate_grad_batches, batches["current"]
        if current["processed"] % before or before != parts:
            behind = 0 if current["processed"] % before else current["processed"] - current["completed"]
            done = current["processed"] // before * parts
            current.update({**dict.fromkeys(current, done), "completed": done - behind})
        if checkpoint["callbacks"].get(self.state_key, {}).get("epoch_end_due"):
            # As Lightning leaves them where the first batch of a validation fails: it then validates, and goes on.
            validation = loops["epoch_loop.val_loop.batch_progress"]
            for part in ("total", "current"):
                batches[part]["completed"] = batches[part]["processed"]
                validation[part].update(ready=1, started=1, processed=0, completed=0)
                if batches["is_last_batch"]:
                    epochs[part].update(dict.fromkeys(("processed", "completed"), epochs[part]["started"] - 1))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_optimizer_step(trainer, batch_idx) or is_last_step_of_epoch(trainer):  # where the epoch's end saves
            return
        due = self._overdue or trainer.global_step % self.every_n_steps == 0
        # Lightning would take a validation that follows for done: the next step saves.
        self._overdue = due and validates(trainer, batch_idx)
        if due and not self._overdue and trainer.global_step != self._last_step:
            self._save(trainer, "last.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_step = trainer.global_step
        self._has_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = math.nan
        if self._has_validated:
            loss = float(trainer.callback_metrics.get("val/loss", math.nan))
            self.last = loss if math.isfinite(loss) else None
        self._validated_step, self._has_validated = -1, False
        # The best one first: a run that is killed between the two goes on from before, and saves it again.
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run must not end as if all were well where its last checkpoint could not be written."""
        if self._last_step != trainer.global_step and trainer.global_step > 0:
            self._give_up(trainer, errno.ENOSPC)

    def _give_up(self, trainer: pl.Trainer, number: int | None) -> NoReturn:
        raise OSError(number, f"step {trainer.global_step} could not be saved; {self.saved}", str(self.folder))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not isinstance(exception, StopRequested) or not fitting or trainer.global_step == 0:
            return
        self._epoch_end_due = trainer.validating or self._validated_step == trainer.global_step
        if self._epoch_end_due or self._last_step != trainer.global_step:
            self._save(trainer, "last.ckpt")
        if trainer.is_global_zero and self._last_step == trainer.global_step:
            print(
                f"\nstopped at step {trainer.global_step} and saved; go on with: "
                f"python train.py {self.folder.parent / 'config.yaml'} resume={self.folder / 'last.ckpt'}"
            )
        elif trainer.is_global_zero:
            print(f"\nstopped at step {trainer.global_step}, which could not be saved; {self.saved}")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        for name_of_check in ("assert_finite_losses", "assert_finite_weights"):
            if (check := getattr(trainer.lightning_module, name_of_check, None)) is not None:
                check()
        for logger in trainer.loggers:
            logger.save()  # what is logged must not be behind what is saved
        trainer.save_checkpoint(self.folder / name)
        io = trainer.strategy.checkpoint_io
        failure: OSError | None = trainer.strategy.broadcast(io.failure if isinstance(io, AtomicCheckpointIO) else None)
        if failure is None:
            self._written = (self.folder / name, trainer.global_step)
            self._last_step = trainer.global_step if name == "last.ckpt" else self._last_step
        elif self.on_full_disk == "stop":
            self._give_up(trainer, failure.errno)
        elif trainer.is_global_zero:
            reason = f"{name} could not be written at step {trainer.global_step} ({failure.strerror}); {self.saved}"
            warnings.warn(reason, stacklevel=2)
