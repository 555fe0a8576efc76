"""The Lightning Trainers of the two commands."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy

from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.hardware import choose_device, number_of_devices

STEPS_PER_LINE = 1000
"""Where the progress bar goes to a file, it is written once per so many steps, and at each epoch's end."""


def make_trainer(settings: Mapping[str, Any], callbacks: list[Callback], **parts: Any) -> pl.Trainer:
    """A Trainer that trains.

    Args:
        settings: the user's trainer.* settings; null stands for Lightning's own default.
        callbacks: the project's own.
        parts: its logger and plugins.

    Raises:
        UserError: Lightning refuses the settings.
    """
    silence_lightning()
    if settings.get("accelerator") == "cpu":
        _check_cpu_processes(settings.get("devices"), "trainer.devices")
    given = {key: value for key, value in settings.items() if value is not None}
    if given.get("enable_progress_bar", True) and not sys.stdout.isatty():
        callbacks = [*callbacks, TQDMProgressBar(refresh_rate=STEPS_PER_LINE)]
    try:
        return pl.Trainer(**given, **parts, callbacks=callbacks, use_distributed_sampler=False)
    except (MisconfigurationException, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"invalid trainer.* setting: {first_line(error)}") from None


def make_predictor(device: str, devices: int, callbacks: list[Callback]) -> pl.Trainer:
    """A Trainer that samples and writes nothing of its own.

    Args:
        device: auto, cpu, cuda or mps.
        devices: how many; each rank samples its share of the images.
        callbacks: the project's own.

    Raises:
        UserError: there are fewer devices than asked for.
    """
    device = choose_device(device)
    available = number_of_devices()[device]
    if device == "cpu":
        _check_cpu_processes(devices, "--devices")
    elif available < devices:
        raise UserError(
            f"--devices {devices} --device {device}: this machine has {available}; give --devices {available}"
        )
    silence_lightning()
    torch.backends.cudnn.allow_tf32 = False  # --precision 32 means float32
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=devices,
        # A rank that has finished waits for the others for as long as they take.
        strategy=DDPStrategy(timeout=timedelta(days=365)) if devices > 1 else "auto",
        callbacks=callbacks,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def _check_cpu_processes(asked: Any, flag: str) -> None:
    """Raise a UserError for far more processes than CPUs, which would only fill the memory."""
    cpus = os.cpu_count() or 1
    if isinstance(asked, int) and asked > 4 * cpus:
        raise UserError(f"{flag}={asked}: this machine has {cpus} CPUs; give at most {4 * cpus}")
    if isinstance(asked, int) and asked > cpus:
        say(f"note         {flag}={asked}: this machine has {cpus} CPUs, so that more processes are no faster")


def silence_lightning() -> None:
    """Silence Lightning's tips and the warnings that do not apply here; errors still come through."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A profiler reports at this level, and so does what ends all ranks when one of them dies.
    for name in ("lightning.pytorch.profilers", "lightning.fabric.strategies.launchers.subprocess_script"):
        logging.getLogger(name).setLevel(logging.INFO)
    for pattern in (
        ".*does not have many workers.*",  # images are cached
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # the sampler starts at the step
        ".*is deprecated.*",  # between Lightning and torch
        ".*Total length of `DataLoader` across ranks is zero.*",  # every sample is there already
        ".*smaller than the logging interval.*",  # losses are logged at each epoch's last step, too
        ".*accelerator.*but not used.*",  # the user chose another
        ".*Previous log files in this directory will be deleted.*",  # metrics.csv is written again with its rows
        ".*not supported by the model summary.*",  # its size in MB is of no use in bf16
    ):
        warnings.filterwarnings("ignore", pattern)
