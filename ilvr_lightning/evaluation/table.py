"""Tables of figures: Markdown on the screen, JSON in a file."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.metrics.intervals import Figure
from ilvr_lightning.runtime.command import say

INTERVAL = (
    "± is half the width of the 95% interval over the images that were drawn (random halves of both sets; the samples "
    "of one source are drawn together)"
)
RETRAINING = (
    "training again with another seed is not in the intervals, and moves FID about three times more than they say"
)
MOST_DIGITS = 6
"""Figures that would need more decimal places are written with an exponent."""
BIAS_LIMIT = 2000
"""Frechet distances of fewer images are mostly bias."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures by column and name."""

    columns: Mapping[str, Mapping[str, Figure]]
    notes: Sequence[str] = ()
    about: Mapping[str, Any]
    """What was compared, for the JSON."""
    upright: bool = True
    """Whether each figure is a row; else each column is."""

    def lines(self) -> list[str]:
        """The table in Markdown, and its notes."""
        names = list(dict.fromkeys(name for figures in self.columns.values() for name in figures))
        cells = [["", *self.columns]]
        cells += [[name, *(cell(each.get(name)) for each in self.columns.values())] for name in names]
        if not self.upright:
            cells = [list(row) for row in zip(*cells, strict=True)]
        rows = [f"| {' | '.join(row)} |" for row in cells]
        return [rows[0], "|" + "---|" * len(cells[0]), *rows[1:], "", *(f"note         {note}" for note in self.notes)]

    def plain(self) -> dict[str, Any]:
        """The table as JSON holds it: what is not known is null."""
        columns = {
            column: {
                name: {"value": _known(f.value), "low": _known(f.value - f.margin), "high": _known(f.value + f.margin)}
                for name, f in figures.items()
            }
            for column, figures in self.columns.items()
        }
        return {**self.about, "columns": columns, "notes": list(self.notes)}

    def show(self, file: Path | None) -> None:
        """Print the table, and write it into a file."""
        for line in self.lines():
            say(line)
        if file is not None:
            write_atomically(file, functools.partial(_write, text=json.dumps(self.plain(), indent=1) + "\n"))


def cell(figure: Figure | None) -> str:
    """A figure with as many digits as its interval gives sense to."""
    if figure is None or math.isnan(figure.value):
        return ""
    if not (math.isfinite(figure.margin) and figure.margin > 0):
        return f"{figure.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(figure.margin)))
    if digits > MOST_DIGITS:
        return f"{figure.value:.3g} ± {figure.margin:.2g}"
    return f"{figure.value:.{digits}f} ± {figure.margin:.{digits}f}"


def bias_note(distances: Sequence[str], *counts: int) -> list[str]:
    """A line that says that Frechet distances of few images are mostly bias, where they are few."""
    if not distances or min(counts) >= BIAS_LIMIT:
        return []
    return [
        f"{' and '.join(distances)} of {min(counts)} images: below {BIAS_LIMIT:,} the bias of Frechet distances rules, "
        "so that they compare with those of equally many images alone; the kernel distance (KID) has no bias"
    ]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(partial: Path, text: str) -> None:
    partial.write_text(text)
