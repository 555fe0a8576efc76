"""Which checkpoint a command uses: the given one, the newest run's, or a bundled model."""

import re
from pathlib import Path

from ilvr_lightning.errors import UserError

BUNDLED = Path(__file__).parents[2] / "data" / "pretrained"
"""The bundled models lie here in a clone of the repository, in one folder each."""

DEFAULT_MODEL = "toon64"
"""The bundled model that samples where there is neither --ckpt nor a run."""


def newest_checkpoint(root: Path) -> Path | None:
    """The newest last.ckpt of the runs under a folder; None if there is none."""
    return next(iter(newest_first(root, "checkpoints/last.ckpt")), None)


def newest_first(root: Path, pattern: str) -> list[Path]:
    """The files under a folder that match a pattern, the newest first."""
    found: list[tuple[float, Path]] = []
    for path in root.rglob(pattern):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue  # another process removes its own files
    return [path for _, path in sorted(found, reverse=True)]


def bundled_models() -> list[str]:
    """The names of the bundled models."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/model.safetensors"))


def _bundled(name: str) -> Path:
    """The folder of a bundled model, as a relative path if the working directory is above it."""
    folder, here = BUNDLED / name, Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def named_checkpoint(given: str | Path) -> Path:
    """A checkpoint by its path, or a bundled model by its name: the one rule of all that takes a checkpoint.

    Raises:
        UserError: the name is neither a file or folder here nor a bundled model.
    """
    name, models = str(given), bundled_models()
    if not re.fullmatch(r"\w{1,100}", name) or Path(name).exists():
        return Path(given)
    if name not in models:
        bundled = f"the bundled models are {', '.join(models)}" if models else "no models are bundled here"
        raise UserError(f"{name}: there is no such file or folder, and {bundled}")
    return _bundled(name)


def find_checkpoint(given: str | None) -> Path:
    """The checkpoint given by path or by the name of a bundled model; else the newest run's; else the default model.

    Raises:
        UserError: there is none.
    """
    if given == "":
        raise UserError("--ckpt is empty; give a checkpoint, or leave it out")
    if given is not None:
        try:
            return named_checkpoint(given)
        except UserError as error:
            raise UserError(f"--ckpt {error}") from None
    newest = newest_checkpoint(Path("runs"))
    if newest is not None:
        return newest
    if DEFAULT_MODEL not in bundled_models():
        raise UserError(
            "--ckpt is missing, there is no run under runs/, and no models are bundled here: train a model with "
            "train.py, or give a checkpoint"
        )
    return _bundled(DEFAULT_MODEL)
