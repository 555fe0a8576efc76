"""Pages that show a folder of images in a browser: one file each, without a server, a network or a library."""

import json
import re
from pathlib import Path
from typing import Any

from ilvr_lightning.atomic import write_atomically

PAGE = "index.html"
"""The name of a page."""
OTHER_NAME = "gallery.html"
"""The name of a page where the folder holds an index.html of another program."""
MARK = b'<meta name="generator" content="ilvr_lightning">'
"""By this a page is known to be ours, so that it may be replaced."""
GRID = re.compile(r"step_\d+\.png")
"""Matches the grids of a training run."""


def write_page(folder: Path, template: str, data: Any) -> Path:
    """Write a page. Equal data give equal bytes.

    Args:
        folder: where the page goes; the files that it shows lie in it or below it.
        template: a page in this package, whose script finds the data as JSON in its element #data.
        data: what JSON can hold.

    Returns:
        The page: index.html, or gallery.html where the folder holds an index.html of another program.
    """
    here = Path(__file__).parent
    text = (here / template).read_text("utf-8").replace("/* style */", (here / "page.css").read_text("utf-8"))
    # "<" would let a name end the script element. ASCII alone, because a text may hold what UTF-8 cannot.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")
    page = text.replace("/* data */", embedded)
    path = folder / PAGE
    if path.exists() and not _is_ours(path):
        path = folder / OTHER_NAME
    write_atomically(path, lambda partial: partial.write_text(page, "utf-8"))
    return path


def write_grid_page(folder: Path) -> Path:
    """Write the page of a training run's grids, with a slider over their steps.

    Args:
        folder: holds step_*.png, at least one.

    Returns:
        The page.
    """
    names = sorted(path.name for path in folder.glob("step_*.png") if GRID.fullmatch(path.name))
    return write_page(folder, "grids.html", names)


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK in file.read(1000)
