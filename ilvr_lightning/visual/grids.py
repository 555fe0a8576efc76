"""Labelled grids of images: groups of columns, one row per reference."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import Pixels, from_tensor, to_image
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.plan import SamplingPlan

MIN_TILE = 96
"""Tiles of fewer pixels are enlarged by an integer, pixel by pixel."""
GRID_KEY = "ilvr_lightning_grid"
"""PNG key of a grid's digest."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A labelled group of tiles."""

    label: str
    rows: Sequence[Sequence[Pixels]]
    """The tiles (H, W, C) of each row."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid that is drawn once its samples are there."""

    path: Path
    title: str
    columns: Callable[[], list[Column]]
    digest: str
    """Equal for equal samples. The PNG keeps it, so that a grid of other samples is not overwritten."""

    def draw(self) -> None:
        """Draw it into its file."""
        info = PngInfo()
        info.add_text(GRID_KEY, self.digest)
        image = draw_grid(self.columns(), self.title)
        write_atomically(self.path, functools.partial(image.save, format="PNG", pnginfo=info))


class GridSource(Protocol):
    """Samples that grids can be drawn of, such as a folder that sample.py has filled."""

    def grids(self) -> Iterable[Grid]:
        """The grids, in an order that is the same on every rank."""


def draw_grid(columns: Sequence[Column], title: str, min_tile: int = MIN_TILE) -> Image.Image:
    """Draw groups of columns side by side.

    Args:
        columns: the groups; every one has the same number of rows.
        title: the line above them; empty for none.
        min_tile: tiles of fewer pixels are enlarged by an integer, pixel by pixel.
    """
    height, width, _ = next(tile for column in columns for row in column.rows for tile in row).shape
    zoom = max(1, -(-min_tile // min(height, width)))
    tile_h, tile_w, gap, margin = height * zoom, width * zoom, 2, 12
    font = ImageFont.load_default(14)
    header = 44 if title else 24
    widths = [
        max(max((len(row) for row in c.rows), default=0) * (tile_w + gap) - gap, math.ceil(font.getlength(c.label)))
        for c in columns
    ]
    rows = max(len(c.rows) for c in columns)
    total_width = 2 * margin + sum(widths) + margin * (len(widths) - 1)
    title_width = int(font.getlength(title)) + 2 * margin
    image = Image.new("RGB", (max(total_width, title_width), header + margin + rows * (tile_h + gap)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((margin, 4), title, fill="black", font=font)
    left = margin
    for column, column_width in zip(columns, widths, strict=True):
        draw.text((left, header - 20), column.label, fill="black", font=font)
        for i, row in enumerate(column.rows):
            for j, pixels in enumerate(row):
                tile = to_image(pixels).convert("RGB").resize((tile_w, tile_h), Image.Resampling.NEAREST)
                image.paste(tile, (left + j * (tile_w + gap), header + i * (tile_h + gap)))
        left += column_width + margin
    return image


def reference_columns(
    references: Sequence[Reference],
    factors: Sequence[int],
    plan: SamplingPlan,
    tiles: Callable[[int, int], list[Pixels]],
) -> list[Column]:
    """One row per reference: the reference, then for each factor its low-pass image and its samples.

    Args:
        references: the rows.
        factors: the groups of columns.
        plan: gives the filter.
        tiles: the samples of (row, factor).
    """
    columns = [Column(label="reference", rows=[[r.preview()] for r in references])]
    for factor in factors:
        low = low_pass_pixels(references, factor, plan)
        rows = [[low[row], *tiles(row, factor)] for row in range(len(references))]
        columns.append(Column(label=f"N={factor}: low-pass, samples", rows=rows))
    return columns


def low_pass_pixels(references: Sequence[Reference], factor: int, plan: SamplingPlan) -> list[Pixels]:
    """phi_N of each reference as an image (H, W, C)."""
    y = torch.stack([r.tensor for r in references])
    low_pass = LowPassFilter((y.shape[-2], y.shape[-1]), factor, plan.kernel, plan.orthogonal)
    return [r.preview(low) for r, low in zip(references, from_tensor(low_pass(y)), strict=True)]
