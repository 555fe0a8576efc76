"""Pictures in and out: reading with care, [-1, 1] <-> 8 bits, labelled grids."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from ilvr_lightning.data.images import Pixels, from_tensor, to_image
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.plan import SamplingPlan


@dataclass(frozen=True, kw_only=True)
class Column:
    """A labelled group of tiles, one list of pictures a row."""

    label: str
    rows: Sequence[Sequence[Pixels]]


def draw_grid(columns: Sequence[Column], title: str, min_tile: int = 96) -> Image.Image:
    """A labelled grid: groups of columns side by side, a reference a row.

    Args:
        columns: the groups; every one has as many rows.
        title: drawn above all.
        min_tile: tiles of fewer pixels are enlarged by a whole number, pixel by pixel.
    """
    height, width, _ = next(tile for column in columns for row in column.rows for tile in row).shape
    zoom = max(1, -(-min_tile // min(height, width)))
    tile_h, tile_w, gap, margin = height * zoom, width * zoom, 2, 12
    font = ImageFont.load_default(14)
    header = 44
    widths = [
        max(max((len(row) for row in c.rows), default=0) * (tile_w + gap) - gap, math.ceil(font.getlength(c.label)))
        for c in columns
    ]
    total = (2 * margin + sum(widths) + margin * (len(widths) - 1), header + margin)
    rows = max(len(c.rows) for c in columns)
    title_width = int(font.getlength(title)) + 2 * margin
    sheet = Image.new("RGB", (max(total[0], title_width), total[1] + rows * (tile_h + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 4), title, fill="black", font=font)
    left = margin
    for column, column_width in zip(columns, widths, strict=True):
        draw.text((left, 24), column.label, fill="black", font=font)
        for i, row in enumerate(column.rows):
            for j, pixels in enumerate(row):
                tile = to_image(pixels).convert("RGB").resize((tile_w, tile_h), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + j * (tile_w + gap), header + i * (tile_h + gap)))
        left += column_width + margin
    return sheet


def reference_columns(
    references: Sequence[Reference],
    factors: Sequence[int],
    plan: SamplingPlan,
    tiles: Callable[[int, int], list[Pixels]],
) -> list[Column]:
    """A row a reference: itself, then for each factor its low-pass image and its samples.

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
    """phi_N of each reference, as pictures."""
    y = torch.stack([r.tensor for r in references])
    low_pass = LowPassFilter((y.shape[-2], y.shape[-1]), factor, plan.kernel, plan.orthogonal)
    return [r.preview(low) for r, low in zip(references, from_tensor(low_pass(y)), strict=True)]
