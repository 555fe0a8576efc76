"""How a run is stopped from outside: a signal asks, the end of a step answers, on every rank at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ilvr_lightning.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, StopRequested
from ilvr_lightning.runtime.command import process_rank

STATUS = {
    getattr(signal, name): status
    for name, status in (("SIGINT", EXIT_INTERRUPTED), ("SIGTERM", EXIT_REQUEUE), ("SIGUSR1", EXIT_REQUEUE))
    if hasattr(signal, name)
}


class StopOnSignal(Callback):
    """SIGTERM and SIGUSR1 (a scheduler's notice) and Control-C end training after the step; a second Control-C at once.

    Lightning raises out of wherever the signal finds a process: amid an optimizer's step, or on one rank alone. Here
    ranks agree at the end of a step, and of a batch of validation; a single process also leaves a grid at once, as
    everyone does sample.py.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._at_once = False
        self._validated_step = -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over; give them back at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STATUS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        if self._asked:
            return
        self._asked = STATUS[signal.Signals(number)]
        if self._at_once:
            raise StopRequested(self._asked)
        if not process_rank():
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saves and ends (a second Control-C leaves at once)\n".encode())

    @contextmanager
    def at_once(self, trainer: pl.Trainer) -> Iterator[None]:
        """A stretch that changes nothing: a single process need not wait for its end, if it is done again on resume."""
        self._listen()
        again = not is_last_step_of_epoch(trainer) or self._validated_step == trainer.global_step
        self._at_once = trainer.world_size == 1 and again and not reached_max_steps(trainer)
        try:
            if self._at_once and self._asked:
                raise StopRequested(self._asked)
            yield
        finally:
            self._at_once = False

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()  # Lightning has put handlers of its own, which speak to other ranks from within

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A step before a validation is answered in it; the last one there, or with the epoch whole.
        done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if done and not is_last_step_of_epoch(trainer) and not validates(trainer, batch_idx):
            self._stop_if_requested(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not trainer.sanity_checking and not reached_max_steps(trainer):
            self._stop_if_requested(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_requested(trainer)

    @property
    def asked(self) -> bool:
        """Whether this process was."""
        return self._asked > 0

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            mine = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.all_gather(mine).max())
        if asked:
            raise StopRequested(asked, all_ranks=True)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every picture is kept as soon as it is made: nothing need be waited for."""
        self._listen()
        self._at_once = True
        if self._asked:
            raise StopRequested(self._asked)


def is_last_step_of_epoch(trainer: pl.Trainer) -> bool:
    """Whether the step that is done is its epoch's last, by the data or by trainer.max_steps."""
    last: bool = trainer.is_last_batch
    return last or reached_max_steps(trainer)


def reached_max_steps(trainer: pl.Trainer) -> bool:
    """Whether trainer.max_steps are done; a run that is resumed from there does nothing any more."""
    return trainer.global_step == trainer.max_steps


def validates(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this micro-batch (trainer.val_check_interval)."""
    every = trainer.val_check_batch
    return isinstance(every, int) and (batch_idx + 1) % every == 0


def stop_callback(trainer: pl.Trainer) -> StopOnSignal | None:
    """The trainer's, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, StopOnSignal)), None)  # type: ignore[attr-defined]
