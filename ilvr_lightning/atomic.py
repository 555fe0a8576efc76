"""Files that are whole or not there: written under another name, flushed, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path

from ilvr_lightning.errors import UserError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let write(partial) make a file, then give it its name; a reader finds the old one or the new one.

    Several processes may write it. After a power cut it may be a broken one, which is made again: see write_safely.

    Raises:
        OSError: as write did; what it left is removed.
    """
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_safely(path: Path, write: Callable[[Path], object]) -> None:
    """The same, waiting for the disk: for what cannot be made again.

    Raises:
        OSError: as write did; what it left is removed.
    """

    def write_through(partial: Path) -> None:
        write(partial)
        flush_file(partial)

    write_whole(path, write_through)
    flush_file(path.parent)


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed have left below a folder that no other process writes to."""
    for path in folder.rglob(".*.partial"):
        path.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
