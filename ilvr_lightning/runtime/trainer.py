"""What sample.py finds and checks before it starts: checkpoint, references, sizes, devices."""

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import PEER_LOST_PATTERN, say
from ilvr_lightning.runtime.hardware import fast_bf16
from ilvr_lightning.training.memory import is_out_of_memory


def trainer_from(settings: dict[str, Any], **ours: Any) -> pl.Trainer:
    """A Trainer with a user's settings and the project's own.

    Raises:
        UserError: the Trainer refuses them.
    """
    asked = settings.get("devices", 1)
    if settings.get("accelerator") == "cpu" and isinstance(asked, int) and asked > most_processes():
        raise UserError(
            f"trainer.devices={asked} of the CPU: this machine has {os.cpu_count()} processors; give at most "
            f"{most_processes()}"
        )
    try:
        return pl.Trainer(**settings, **ours, use_distributed_sampler=False)
    except (MisconfigurationException, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"the Trainer refuses its settings (trainer.*): {error}") from None


KNOWN = (UserError, FloatingPointError)
"""What says for itself what is wrong."""


def most_processes() -> int:
    """Of one run on the CPU: more than processors gain nothing, but show that the result does not depend on them."""
    return 2 * (os.cpu_count() or 1)


def blamed_on_settings(error: Exception, resume: Path | None = None) -> Exception:
    """A UserError in place of what Lightning itself raised over the Trainer's settings; anything else as it is.

    Args:
        error: what ended the training.
        resume: the checkpoint that it went on from, if it made no step since.
    """
    elsewhere = PEER_LOST_PATTERN.search(str(error)) or is_out_of_memory(error)
    damage = ValueError | KeyError | TypeError | AttributeError | IndexError | RuntimeError | ArithmeticError
    if resume is not None and not elsewhere and isinstance(error, damage) and not isinstance(error, KNOWN):
        what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        return UserError(f"resume={resume}: its state of training is damaged, or does not fit the settings ({what})")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    if where.startswith("lightning.") and isinstance(error, ValueError | ZeroDivisionError):
        return UserError(f"the Trainer refuses its settings (trainer.*): {error}")
    return error


def make_trainer(device: str, devices: int, callbacks: list[Callback]) -> pl.Trainer:
    """A Trainer that predicts, and writes nothing of its own; a rank that is done waits for the others for as long.

    Raises:
        UserError: there are fewer devices than asked for.
    """
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device == "auto":
        device = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if device != "cpu" and available[device] < devices:
        raise UserError(
            f"{f'--devices {devices} ' if devices > 1 else ''}--device {device}: this machine has {available[device]}; "
            + (f"give --devices {available[device]}" if available[device] else "give --device cpu")
        )
    processors = os.cpu_count() or 1
    if device == "cpu" and devices > 4 * processors:
        raise UserError(f"--devices {devices} --device cpu: this machine has {processors} processors")
    if device == "cpu" and devices > processors:
        say(f"note         --devices {devices}: this machine has {processors} processors, more is no faster")
    quiet()
    torch.backends.cudnn.allow_tf32 = False  # --precision 32 means it
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=devices,
        strategy=DDPStrategy(timeout=timedelta(days=365)) if devices > 1 else "auto",
        callbacks=callbacks,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def use_bf16(precision: str, device: torch.device) -> bool:
    """auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and fast_bf16(device))


def quiet() -> None:
    """Silence what Lightning says of itself and warns of without need; faults still come through."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",  # images are cached
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # the sampler starts at the step
        ".*is deprecated.*",  # between Lightning and torch
        ".*Total length of `DataLoader` across ranks is zero.*",  # all is done already
        ".*smaller than the logging interval.*",  # losses are logged at each epoch's last step too
        ".*accelerator.*but not used.*",  # what was asked for is used
        ".*not supported by the model summary.*",  # its size in MB is of no use in bf16
    ):
        warnings.filterwarnings("ignore", pattern)
