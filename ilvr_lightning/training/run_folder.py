"""Run folders: <root>/<config name>/<run name>/{config.yaml, checkpoints, grids}, over all ranks and restarts."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from ilvr_lightning.checkpoints.find import newest_checkpoint, newest_first
from ilvr_lightning.config.schema import Config
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.hardware import training_precision


def resolve_precision(config: Config, before: Config | None) -> Config:
    """A run's configuration with its trainer.precision: the one given, else the one that it began in, else the fastest.

    Args:
        config: as asked for.
        before: of the checkpoint that is resumed.
    """
    if config.trainer.get("precision") is not None:
        return config
    begun = None if before is None else before.trainer.get("precision", "32-true")
    fastest = training_precision(str(config.trainer.get("accelerator", "auto")))
    return replace(config, trainer={**config.trainer, "precision": begun or fastest})


SEVERAL = ("WORLD_SIZE", "SLURM_NTASKS")
"""What tells of several processes that Lightning did not start."""


def root_of(config: Config) -> Path:
    """The folder of all runs."""
    return Path(str(config.trainer.get("default_root_dir", "runs")))


def run_folder(config: Config, name: str, resume: Path | None) -> Path:
    """This run's folder: the one that run.name names, the resumed run's own, its SLURM job's, or a new one by the time.

    Raises:
        UserError: run.name names a folder that holds a run, and nothing says that it is to go on.
    """
    known = run_name(config)
    if known is not None:
        folder = root_of(config) / name / known
        if resume is None and (folder / "checkpoints" / "last.ckpt").exists():
            raise UserError(f"run.name={known}: {folder} holds a run; give another name, or resume=auto")
        return folder
    if resume is not None and resume.parent.name == "checkpoints":
        return resume.parent.parent
    root = root_of(config) / name
    return root / agreed("run.name", lambda: _fresh(root), config)


def run_name(config: Config) -> str | None:
    """The name that is known before the run starts; a SLURM job keeps its own when it is requeued."""
    if config.run.name is not None:
        return config.run.name
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"slurm_{job}" if job.isdecimal() and "SLURM_PROCID" in os.environ else None


def agreed(what: str, choose: Callable[[], str], config: Config) -> str:
    """What the first process of a run chooses, on all of them.

    Lightning's launcher starts the script again for each process and hands down the environment; torchrun's processes
    meet at the store that its agent keeps.

    Raises:
        UserError: there are several, and nowhere to meet.
    """
    key = "ILVR_" + re.sub(r"\W", "_", what).upper()
    if key in os.environ:
        return os.environ[key]
    outside = max(config.trainer.get("num_nodes") or 1, *(int(os.environ.get(n, "1")) for n in SEVERAL)) > 1
    if not outside:
        chosen = choose()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=600))
        entry = f"{key}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if os.environ.get("RANK") == "0":
            store.set(entry, choose())
        chosen = store.get(entry).decode()
    else:
        raise UserError(
            f"{what}: processes that were started apart have nowhere to agree on it; give {what.partition('=')[0]}"
        )
    os.environ[key] = chosen
    return chosen


def forget_agreements() -> None:
    """Another run in this process chooses anew."""
    for key in [key for key in os.environ if key.startswith("ILVR_")]:
        del os.environ[key]


def _fresh(root: Path) -> str:
    stem = fresh = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while (root / fresh).exists():
        number += 1
        fresh = f"{stem}_{number}"
    return fresh


def resume_checkpoint(config: Config, name: str) -> Path | None:
    """The checkpoint that `resume` names; for auto the newest that is whole, of this run if its name is known.

    Raises:
        UserError: it is missing, or auto finds none and the run has no name to start under.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not path.is_file():
            newest = newest_checkpoint(path) if path.is_dir() else None
            raise UserError(
                f"resume={config.resume}: there is no such checkpoint; give "
                + ("a .ckpt file, or auto" if newest is None else f"the newest in that folder, {newest}")
            )
        return path
    known = run_name(config)
    root = root_of(config) / name / (known or "")
    if known is not None:
        found = newest_intact_checkpoint(root)
    else:  # another run may save meanwhile
        found = (
            Path(chosen)
            if (chosen := agreed("resume", lambda: str(newest_intact_checkpoint(root) or ""), config))
            else None
        )
    if found is None and known is None:
        forget_agreements()
        raise UserError(f"resume=auto: there is no checkpoint under {root}; leave resume out to start a run")
    if found is None:
        say(f"resume       auto: {root} has no checkpoint yet, the run starts")
    return found


def newest_intact_checkpoint(root: Path) -> Path | None:
    """The newest run's last.ckpt under a folder, its best.ckpt where that does not read back whole, and so on."""
    from ilvr_lightning.training.checkpointing import is_intact

    folders = dict.fromkeys(path.parent for path in newest_first(root, "checkpoints/*.ckpt"))
    for path in (folder / name for folder in folders for name in ("last.ckpt", "best.ckpt")):
        if is_intact(path):
            return path
        if path.exists():
            say(f"resume       auto: {path} is damaged; an earlier one is taken")
    return None
