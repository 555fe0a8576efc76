"""Run folders: <root>/<config name>/<run name>/{config.yaml, checkpoints, grids}."""

import os
import time
from pathlib import Path

from ilvr_lightning.config import Config
from ilvr_lightning.errors import UserError

RUN_NAME = "ILVR_RUN_NAME"


def run_folder(config: Config, name: str, resume: Path | None) -> Path:
    """This run's folder: the resumed run's own, the one that run.name names, or a new one by the time.

    Lightning's launcher starts the script again for each process; the environment hands them the first one's choice.

    Raises:
        UserError: processes started elsewhere (torchrun, SLURM) have no name to agree on.
    """
    root = Path(str(config.trainer.get("default_root_dir", "runs"))) / name
    if config.run.name is not None:
        folder = root / config.run.name
        if resume is None and (folder / "checkpoints" / "last.ckpt").exists() and "LOCAL_RANK" not in os.environ:
            raise UserError(f"run.name={config.run.name}: {folder} holds a run; give another name, or resume=auto")
        return folder
    if resume is not None and resume.parent.name == "checkpoints":
        return resume.parent.parent
    if RUN_NAME not in os.environ:
        nodes = config.trainer.get("num_nodes") or 1
        if nodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise UserError(
                "run.name must be given when several processes are started from outside, so that they agree"
            )
        stem = fresh = time.strftime("%Y-%m-%d_%H-%M-%S")
        number = 1
        while (root / fresh).exists():
            number += 1
            fresh = f"{stem}_{number}"
        os.environ[RUN_NAME] = fresh
    return root / os.environ[RUN_NAME]


def resume_checkpoint(config: Config, name: str) -> Path | None:
    """The checkpoint that `resume` names.

    Raises:
        UserError: it is missing, or auto finds none.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not path.is_file():
            raise UserError(f"resume={config.resume}: there is no such checkpoint; give a .ckpt file, or auto")
        return path
    root = Path(str(config.trainer.get("default_root_dir", "runs"))) / name / (config.run.name or "")
    found = newest_checkpoint(root)
    if found is None:
        raise UserError(f"resume=auto: there is no checkpoint under {root}; leave resume out to start a run")
    return found


def newest_checkpoint(root: Path) -> Path | None:
    """The last.ckpt under a folder that was written last."""
    found = sorted(root.rglob("checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def make_writable(folder: Path, setting: str) -> None:
    """Create a folder and write into it, before any work starts; asking for permission is not enough for root.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{setting}: cannot write to {str(folder)[:200]!r} ({reason}); give another folder") from None
