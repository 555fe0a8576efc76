"""The images in a folder."""

import warnings
from pathlib import Path

from ilvr_lightning.data.images import SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it, sorted; hidden ones, such as those that macOS adds, are left out.

    Folders that are links are not followed; a warning names them.
    """
    everything = list(folder.rglob("*"))
    if linked := [file.name for file in everything if file.is_symlink() and file.is_dir()]:
        warnings.warn(
            f"{folder}: links to folders are not followed: {', '.join(sorted(linked))[:200]}; give "
            "the folders themselves",
            stacklevel=2,
        )
    return sorted(
        file
        for file in everything
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        and file.is_file()
    )
