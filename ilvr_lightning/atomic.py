"""Atomic writes: a file is written under another name, then renamed, so that a reader finds the old one or the new."""

import os
from collections.abc import Callable
from pathlib import Path

from ilvr_lightning.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Let write(partial) make a file beside path, then rename it to path. Several processes may do so at once.

    Args:
        path: the file to make or to replace.
        write: writes the file that it is given.
        durable: flush file and folder to the disk, so that the file survives a power cut. Without it the file may be
            empty after one, which is fine for what can be made again.

    Raises:
        OSError: as write raised it; the partial file is removed.
    """
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        write(partial)
        if durable:
            _flush(partial)
        os.replace(partial, path)
        if durable:
            _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partials(folder: Path, recursive: bool = True) -> None:
    """Remove the partial files that killed writers left below a folder. No other process may write there meanwhile.

    Args:
        folder: where to look.
        recursive: look into its subfolders, too.
    """
    for path in (folder.rglob if recursive else folder.glob)(".*.partial"):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, flag: str) -> None:
    """Create a folder and write into it. (To ask for the permission would not do: root has every permission.)

    Args:
        folder: where files will go.
        flag: the flag or key that names it, for the message.

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
        raise UserError(f"{flag}: cannot write to {str(folder)[:200]!r} ({reason}); give another folder") from None
