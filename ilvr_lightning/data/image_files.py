"""The images in a folder."""

from pathlib import Path

from ilvr_lightning.data.images import SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it, sorted; hidden ones, such as those that macOS adds, are left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        and file.is_file()
    )
