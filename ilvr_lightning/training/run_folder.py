"""RunFolder: where a run's files lie, which checkpoint it resumes, its loggers, and what it prints."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ilvr_lightning.atomic import check_writable, remove_partials, write_atomically
from ilvr_lightning.checkpoints.files import is_intact
from ilvr_lightning.checkpoints.find import newest_checkpoint, newest_first
from ilvr_lightning.checkpoints.load import read_run_config
from ilvr_lightning.config.load import to_yaml
from ilvr_lightning.config.schema import Config
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.runtime.command import (
    PEER_LOST_PATTERN,
    is_out_of_memory,
    launched_by_lightning,
    process_rank,
    report_errors_on_every_rank,
    say,
)
from ilvr_lightning.runtime.hardware import training_precision
from ilvr_lightning.training.checkpointing import AtomicCheckpointIO
from ilvr_lightning.training.loggers import make_loggers
from ilvr_lightning.training.module import DDPM
from ilvr_lightning.visual.pages import PAGE

RESUME_VARIABLE = "ILVR_RESUME"
"""Tells the ranks that Lightning launches which checkpoint the first rank has chosen."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """<trainer.default_root_dir>/<name>/<run.name>/{config.yaml, checkpoints, grids, events...}."""

    config: Config
    """As asked for, with trainer.precision filled in, and data.value_range as a resumed run found it."""
    folder: Path
    resume_from: Path | None
    """The checkpoint to resume, or None."""
    resumed_step: int | None
    """Its step."""

    @classmethod
    def open(cls, config: Config) -> "RunFolder":
        """The folder of a new run, or of the one to resume, with the precision that it began in.

        Raises:
            UserError: the checkpoint to resume is missing, or the folder holds another run or cannot be written.
        """
        checkpoint = _checkpoint_to_resume(config)
        before, step = read_run_config(checkpoint) if checkpoint else (None, None)
        if checkpoint is not None:
            say(f"resume       {checkpoint}, step {step}")
            config = replace(config, init_from=None)  # its weights began the run
        run = cls(
            config=_with_range(_with_precision(config, before), before),
            folder=_folder_of(config, checkpoint),
            resume_from=checkpoint,
            resumed_step=step,
        )
        if process_rank() == 0:  # the other ranks write nothing
            check_writable(run.root, "trainer.default_root_dir")
        return run

    @property
    def root(self) -> Path:
        """The folder of all runs."""
        return Path(self.config.trainer.default_root_dir)

    def parts(self) -> dict[str, Any]:
        """What the Trainer writes with: logs in this folder, and checkpoints that are complete or not there."""
        loggers = make_loggers(self.config, self.folder, self.resumed_step)
        return {"logger": loggers, "plugins": [AtomicCheckpointIO()]}

    def begin(self, trainer: pl.Trainer, data: ImageDataModule, model: DDPM) -> None:
        """On every rank: check the batch, prepare the model for its device, and report errors from here on.

        On the first rank: write config.yaml, remove what a killed run left half-written, and print a summary.

        Raises:
            UserError: the global batch cannot be divided among devices and accumulated batches.
        """
        data.check_batch_size(trainer)
        model.prepare(trainer)
        report_errors_on_every_rank()
        if not trainer.is_global_zero:
            return
        check_writable(self.folder / "checkpoints", "trainer.default_root_dir")
        config = to_yaml(replace(self.config, resume=None, init_from=None).plain())
        write_atomically(self.folder / "config.yaml", lambda partial: partial.write_text(config), durable=True)
        remove_partials(self.folder)
        height, width = self.config.data.size
        print(
            f"data         {self.config.data.path}: {data.counts}, {height}x{width} px\n"
            f"network      {sum(p.numel() for p in model.network.parameters()):,} parameters\n"
            f"devices      {trainer.world_size} ({trainer.strategy.root_device.type}), "
            f"global batch {self.config.data.batch_size}, precision {trainer.precision}\n"
            f"run          {self.folder}"
        )
        if "tensorboard" in self.config.loggers:
            print(f"tensorboard  tensorboard --logdir {self.folder} --samples_per_plugin images=1000")
        sys.stdout.flush()

    @contextmanager
    def explaining_errors(self, trainer: pl.Trainer) -> Iterator[None]:
        """Around the training: turn an error that a damaged checkpoint causes into one line.

        Raises:
            UserError: the run resumes a checkpoint, and failed before its first step.
        """
        try:
            yield
        except Exception as error:
            if trainer.global_step > (self.resumed_step or 0):
                say("")  # ends the line of the progress bar
            elif self.resume_from is not None and not (
                isinstance(error, UserError | FloatingPointError | OSError)
                or is_out_of_memory(error)
                or PEER_LOST_PATTERN.search(str(error))
            ):
                what = f"{type(error).__name__}: {first_line(error)}"
                raise UserError(
                    f"resume={self.resume_from}: its training state is damaged or does not fit the settings ({what}); "
                    "give an earlier checkpoint, or init_from= to take its weights alone"
                ) from None
            raise

    def summary(self, trainer: pl.Trainer) -> str:
        """The last lines of a run: its step, its loss, its grids, and how to sample."""
        loss = trainer.callback_metrics.get("val/loss")
        result = "not validated" if loss is None else f"val/loss {float(loss):.4f}"
        if trainer.global_step == self.resumed_step:
            result = "nothing was left to do"
        command = f"python sample.py --ref IMAGE --ckpt {self.folder / 'checkpoints' / 'last.ckpt'}"
        page = self.folder / "grids" / PAGE
        grids = f"grids        {page}\n" if page.is_file() else ""
        return f"done         step {trainer.global_step}, {result}\n{grids}sample       {command}"


def _with_range(config: Config, before: Config | None) -> Config:
    """data.value_range as it was given in numbers, else as the resumed run found it."""
    if before is None or config.data.known_range is not None:
        return config
    return replace(config, data=replace(config.data, value_range=before.data.value_range))


def _with_precision(config: Config, before: Config | None) -> Config:
    """trainer.precision as it was given, else as the resumed run had it, else the fastest."""
    precision = config.trainer.precision
    if precision is None and before is not None:
        precision = before.trainer.precision or "32-true"  # earlier versions knew no other default
    precision = precision or training_precision(config.trainer.accelerator)
    return replace(config, trainer=replace(config.trainer, precision=precision))


def _known_name(config: Config) -> str | None:
    """The name of the run's folder where it is known before the run starts; a requeued SLURM job keeps its own."""
    if config.run.name is not None:
        return config.run.name
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"slurm_{job}" if job.isdecimal() and "SLURM_PROCID" in os.environ else None


def _folder_of(config: Config, checkpoint: Path | None) -> Path:
    root = Path(config.trainer.default_root_dir) / config.name
    name = _known_name(config)
    if name is not None:
        if checkpoint is None and (root / name / "checkpoints" / "last.ckpt").exists():
            raise UserError(f"run.name={name}: {root / name} holds a run; give another name, or resume=auto")
        return root / name
    if checkpoint is not None and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    return root / _timestamped_name(root)


def _timestamped_name(root: Path) -> str:
    """The time, with a number if a run began in the same second. Only the first rank's choice is used."""
    stem = name = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while (root / name).exists():
        number += 1
        name = f"{stem}_{number}"
    return name


def _checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that `resume` names; for auto the newest intact one, of this run if its name is known.

    Raises:
        UserError: it is missing, or auto finds none and the run has no name to start under.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not path.is_file():
            newest = newest_checkpoint(path) if path.is_dir() else None
            instead = "a .ckpt file, or auto" if newest is None else f"the newest in that folder, {newest}"
            raise UserError(f"resume={config.resume}: there is no such checkpoint; give {instead}")
        return path
    if launched_by_lightning() and process_rank():
        chosen = os.environ.get(RESUME_VARIABLE, "")
        return Path(chosen) if chosen else None
    name = _known_name(config)
    if name is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("resume=auto: processes that torchrun starts must agree on the run; give run.name=NAME")
    root = Path(config.trainer.default_root_dir) / config.name / (name or "")
    found = _newest_intact_checkpoint(root)
    os.environ[RESUME_VARIABLE] = str(found or "")
    if found is None and name is None:
        raise UserError(f"resume=auto: there is no checkpoint under {root}; leave resume out to start a run")
    if found is None:
        say(f"resume       auto: {root} has no checkpoint yet, so the run starts from the beginning")
    return found


def _newest_intact_checkpoint(root: Path) -> Path | None:
    """The newest run's last.ckpt, or its best.ckpt if that one is damaged, then the next run's, and so on."""
    folders = dict.fromkeys(path.parent for path in newest_first(root, "*.ckpt"))
    for path in (folder / name for folder in folders for name in ("last.ckpt", "best.ckpt")):
        if is_intact(path):
            return path
        if path.exists():
            say(f"resume       auto: {path} is damaged; an earlier one is used")
    return None
