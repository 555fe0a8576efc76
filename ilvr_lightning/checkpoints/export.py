"""Export: a denoiser written as safetensors, as a state dict of ADM, or as a folder of diffusers."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ilvr_lightning.checkpoints.families import export_formats
from ilvr_lightning.checkpoints.families.family import FileContent
from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.errors import UserError, first_line


def export(loaded: LoadedDenoiser, to: str, out: Path, half: bool = False) -> list[Path]:
    """Write a denoiser in another format, completely or not at all.

    Args:
        loaded: what load_denoiser returned.
        to: the name of a format, as export_formats() lists them.
        out: a file or a folder, as the format says; it must not exist, or be an empty folder.
        half: write the weights in float16, which halves the size and rounds to 11 bits.

    Returns:
        The files written.

    Raises:
        UserError: the format cannot express this network, or out exists or cannot be written.
    """
    check_target(out)
    dtype = torch.float16 if half else torch.float32
    weights = {name: value.to(dtype) for name, value in loaded.network.state_dict().items()}
    if half and not all(value.isfinite().all() for value in weights.values()):
        raise UserError("--half: a weight is beyond the range of float16; export without --half")
    try:
        files = export_formats()[to].exported_files(loaded.description, weights, out)
    except UserError as error:
        raise UserError(f"--to {to}: {error}; --to safetensors holds everything") from None
    _write(files, out)
    return list(files)


def check_target(out: Path) -> None:
    """Raise a UserError if something would be overwritten, or there can be no such file."""
    try:
        taken = not out.is_dir() or any(out.iterdir())
        out.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _cannot_write(out, error) from None
    if taken:
        raise UserError(f"{out} already exists; give another name")


def _write(files: dict[Path, FileContent], out: Path) -> None:
    """Write files in a temporary folder beside out, then rename them to out at once.

    Raises:
        UserError: they cannot be written; nothing is left behind.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", suffix=".partial", dir=out.parent) as temporary:
            for path, content in files.items():
                partial = temporary / path.relative_to(out.parent)
                partial.parent.mkdir(parents=True, exist_ok=True)
                _write_file(partial, content)
            os.replace(Path(temporary) / out.name, out)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise _cannot_write(out, error) from None


def _cannot_write(out: Path, error: Exception) -> UserError:
    return UserError(f"{out} cannot be written: {getattr(error, 'strerror', None) or first_line(error, 120)}")


def _write_file(path: Path, content: FileContent) -> None:
    if isinstance(content, str):
        path.write_text(content)
        return
    weights: dict[str, Tensor] = {name: value.contiguous() for name, value in content[0].items()}
    if path.suffix == ".safetensors":
        save_file(weights, path, content[1])
        path.chmod(0o644)  # safetensors makes its files private
    else:
        torch.save(weights, path)
