"""How a signal stops a run: between two optimizer steps, on every rank at once. A second Control-C leaves at once."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ilvr_lightning.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, StopRequested
from ilvr_lightning.runtime.command import launched_by_lightning, process_rank

STATUS = {
    getattr(signal, name): status
    for name, status in (("SIGINT", EXIT_INTERRUPTED), ("SIGTERM", EXIT_REQUEUE), ("SIGUSR1", EXIT_REQUEUE))
    if hasattr(signal, name)
}
"""The exit status that goes with each signal."""
GRACE_SECONDS = 3.0
"""A rank whose launcher has died may take this long to report an error of its own."""


class StopOnSignal(Callback):
    """SIGTERM, SIGUSR1 (a scheduler's notice) and Control-C end a run.

    Training stops between two optimizer steps, never inside validation, a grid or the calibration: what follows the
    last step of an epoch is finished first. (Lightning would raise wherever the signal finds a process, on one rank
    alone.) Sampling stops at once, since every image is kept as soon as it is made.
    """

    def __init__(self) -> None:
        self._status = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; the former handlers come back after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in STATUS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._status:
            if number == signal.SIGINT:
                os._exit(EXIT_INTERRUPTED)
            return
        self._status = STATUS[signal.Signals(number)]
        if self._at_once:
            raise StopRequested(self._status)
        if not process_rank():
            name = signal.Signals(number).name
            what = "saving a checkpoint after this step, then exiting (Ctrl-C again exits without saving)"
            os.write(2, f"\n{name}: {what}\n".encode())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if launched_by_lightning() and trainer.local_rank > 0:
            threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()  # Lightning has just installed handlers of its own

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_optimizer_step(trainer, batch_idx) and not is_last_step_of_epoch(trainer):
            self._stop_if_requested(trainer)
        if reached_max_steps(trainer):
            trainer.should_stop = True  # Lightning validates then, although the epoch has not ended

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        status = self._status
        if trainer.world_size > 1:  # a signal may have reached some of the ranks alone
            own = torch.tensor(status, device=trainer.strategy.root_device)
            status = int(trainer.strategy.all_gather(own).max())
        if status:
            raise StopRequested(status, all_ranks=True)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()
        self._at_once = True
        if self._status:
            raise StopRequested(self._status)


def is_optimizer_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of an optimizer step."""
    return is_last_step_of_epoch(trainer) or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_last_step_of_epoch(trainer: pl.Trainer) -> bool:
    """Whether the present step ends its epoch, because the data end or trainer.max_steps are done."""
    last: bool = trainer.is_last_batch
    return last or reached_max_steps(trainer)


def reached_max_steps(trainer: pl.Trainer) -> bool:
    """Whether trainer.max_steps optimizer steps are done."""
    return trainer.global_step == trainer.max_steps


def last_step(trainer: pl.Trainer) -> float:
    """The optimizer step at which trainer.max_steps or max_epochs ends the run; infinite where neither does."""
    last = trainer.estimated_stepping_batches
    return last if last > 0 else math.inf


def _exit_with_parent(parent: int) -> None:
    """End this rank when the process that launched it has died, which no one else would do: it would keep its GPU."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
