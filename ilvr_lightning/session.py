"""What sample.py finds and checks before it starts: checkpoint, references, sizes, devices."""

import argparse
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from ilvr_lightning.arguments import in_flags
from ilvr_lightning.cli import LOST_RANK, announce
from ilvr_lightning.config import DataConfig
from ilvr_lightning.diffusion.factor import check_factor
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.hardware import fast_bf16
from ilvr_lightning.images import Fit
from ilvr_lightning.jobs import Setting, settings_of
from ilvr_lightning.memory import is_out_of_memory
from ilvr_lightning.pretrained.load import LoadedDenoiser
from ilvr_lightning.references import Files, Part, References, RowsOf, find_images
from ilvr_lightning.runs import newest_checkpoint

FROM_DATA_SET = re.compile(r"(?P<path>.+):(?P<split>\w+)(\[(?P<first>\d*):(?P<last>\d*)\])?")


SHIPPED = Path(__file__).parents[1] / "data" / "pretrained"
"""The models that come with a clone, a folder each."""
DEFAULT_SHIPPED = "toon64"


def shipped_models() -> list[str]:
    """Their names, which --ckpt takes too."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/model.safetensors"))


def _shipped(name: str) -> Path:
    """A shipped model's folder, by the short way where the working directory is above it."""
    folder, here = SHIPPED / name, Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def find_checkpoint(given: str | None) -> Path:
    """The checkpoint given, by its path or a shipped model's name; else the newest run's last one; else a shipped one.

    Raises:
        UserError: there is none.
    """
    if given == "":
        raise UserError("--ckpt is empty; give a checkpoint, or leave it out")
    if given is not None:
        if not re.fullmatch(r"\w{1,100}", given) or Path(given).exists():
            return Path(given)
        if given not in shipped_models():
            raise UserError(
                f"--ckpt {given}: there is no such file or folder, and the models that come with the project are "
                f"{' and '.join(shipped_models()) or 'not here'}"
            )
        return _shipped(given)
    found = newest_checkpoint(Path("runs"))
    if found is None and DEFAULT_SHIPPED in shipped_models():
        found = _shipped(DEFAULT_SHIPPED)
    if found is None:
        raise UserError(
            "--ckpt is missing, there is no run under runs/, and this installation has no data/pretrained: train a "
            "model with train.py, or give a checkpoint"
        )
    return found


def fitting_shape(
    loaded: LoadedDenoiser, size: tuple[int, int] | None, factors: Sequence[int], plan: SamplingPlan
) -> tuple[int, int, int]:
    """(C, H, W) of the pictures, once network, factors and plan are known to allow it.

    Raises:
        UserError: they do not.
    """
    channels, *trained = loaded.image_shape
    height, width = size or (trained[0], trained[1])
    try:
        loaded.network.config.check_size(height, width)
        for factor in factors:
            check_factor(factor, (height, width))
        plan.resolved(loaded.schedule.num_timesteps)
    except ValueError as error:
        raise UserError(in_flags(str(error))) from None
    if plan.variance == "learned" and not loaded.network.config.learn_sigma:
        raise UserError("--variance learned needs a network that learned its variance; give small, large or auto")
    return channels, height, width


SWEEP_FACTORS = (4, 8, 16, 32, 64)
SWEEP_RANGES = (1.0, 0.0), (1.0, 0.25), (1.0, 0.5), (1.0, 0.75)
"""Of T: the paper's figure 7 in four columns."""


def fitting_settings(
    loaded: LoadedDenoiser, args: argparse.Namespace, plan: SamplingPlan
) -> tuple[tuple[int, int, int], SamplingPlan, list[Setting]]:
    """The pictures' shape, the plan with T filled in, and what is swept: factors, ranges, or both.

    Raises:
        UserError: network, factors, ranges or plan do not fit each other.
    """
    factors, ranges, T = args.factor, args.range or [], loaded.schedule.num_timesteps
    if args.sweep:
        side = min(args.image_size or loaded.image_shape[1:])
        factors = factors or [n for n in SWEEP_FACTORS if side % n == 0 and n < side]
        ranges = ranges or [(round(a * T), round(b * T)) for a, b in SWEEP_RANGES]
    factors = factors or [8]
    shape = fitting_shape(loaded, args.image_size, factors if args.ref else [], plan)
    try:
        plan = plan.resolved(T)
        gains = loaded.gains(args.preset, plan) if args.octave_gains is None and args.image_size is None else {}
        settings = settings_of(plan, factors, ranges, gains)
        for setting in settings:
            replace(plan, **asdict(setting)).resolved(T)
    except ValueError as error:
        raise UserError(in_flags(str(error))) from None
    return shape, plan, settings


def find_references(
    given: Sequence[str], shape: tuple[int, int, int], fit: Fit, masks: Sequence[str] = (), setting: str = "--ref"
) -> References:
    """References from files, folders and globs, or from a data set's split written DATASET:SPLIT[A:B].

    More than a thousand are read when they are asked for.

    Args:
        given: their names.
        shape: (C, H, W) that they are fitted to.
        fit: how.
        masks: one picture for all of them, or one for each in order.
        setting: the flag, for messages.

    Raises:
        UserError: a path is missing, a file is no image, or there is another number of masks.
    """
    channels, height, width = shape
    parts: list[Part] = []
    for pattern in given:
        match = FROM_DATA_SET.fullmatch(pattern)
        if match and not Path(pattern).exists():
            parts.append(_rows_of(match))
        else:
            parts.append(Files(find_images([pattern], setting)))
    paths = [path for pattern in masks for path in find_images([pattern], "--mask")]
    return References(parts, (height, width), channels, fit, paths)


def _rows_of(match: re.Match[str]) -> RowsOf:
    from ilvr_lightning.source import open_splits

    try:
        config = DataConfig(path=match["path"], split=match["split"])
        rows, _ = open_splits(config, seed=0, hold_out=False)
    except ValueError as error:
        raise UserError(f"--ref {match[0]}: {error}") from None
    first, last = int(match["first"] or 0), min(int(match["last"] or len(rows)), len(rows))
    if first >= last:
        raise UserError(f"--ref {match[0]}: it holds {len(rows)} images; the part asked for is empty")
    return RowsOf(rows.image_bytes, match["path"], match["split"], first, last - first)


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
    elsewhere = LOST_RANK.search(str(error)) or is_out_of_memory(error)
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
        announce(f"note         --devices {devices}: this machine has {processors} processors, more is no faster")
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
