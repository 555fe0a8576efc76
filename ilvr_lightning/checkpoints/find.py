"""Run folders: <root>/<config name>/<run name>/{config.yaml, checkpoints, grids}, over all ranks and restarts."""

import re
from pathlib import Path

from ilvr_lightning.errors import UserError


def newest_checkpoint(root: Path) -> Path | None:
    """The last.ckpt under a folder that was written last."""
    return next(iter(checkpoints_below(root, "checkpoints/last.ckpt")), None)


def checkpoints_below(root: Path, pattern: str) -> list[Path]:
    """The files that match, the newest first."""
    found: list[tuple[float, Path]] = []
    for path in root.rglob(pattern):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue  # another run removes its own
    return [path for _, path in sorted(found, reverse=True)]


SHIPPED = Path(__file__).parents[2] / "data" / "pretrained"
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
