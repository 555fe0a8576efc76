"""Draw the pictures of docs/tutorial.md: python docs/make_tutorial.py RUN, a finished run of configs/relief64.yaml.

The run has grids after 500, 2000 and 6000 steps. All other pictures are made with the bundled model relief64.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ilvr_lightning.data.images import Pixels
from ilvr_lightning.visual.grids import Column, draw_grid

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
STEPS = (500, 2000, 6000)
TILE, GAP, MARGIN, HEADER = 128, 2, 12, 44
"""The layout of a grid of training: tiles of 64 px at twice their size."""
COLUMNS = {"reference": 0, "N=8": 4, "unconditional": 7}
"""The tiles that are shown, by their number in a row of a grid with the factors 4, 8 and 16."""
GROUPS = (0, 1, 1, 2, 2, 3, 3, 4)
"""The group of each tile in a row: reference, then low-pass image and sample for each factor, unconditional."""


def tile(grid: Image.Image, row: int, name: str) -> Pixels:
    """(64, 64, 3) a tile of a grid, at its own size."""
    number = COLUMNS[name]
    left = MARGIN + number * (TILE + GAP) + GROUPS[number] * (MARGIN - GAP)
    top = HEADER + row * (TILE + GAP)
    pixels = np.array(grid.crop((left, top, left + TILE, top + TILE)))
    return pixels[::2, ::2]


def draw_steps(run: Path) -> Image.Image:
    """References, and what the run made of them and of nothing, step by step."""
    grids = {step: Image.open(run / "grids" / f"step_{step:07}.png").convert("RGB") for step in STEPS}
    references = [[tile(grids[STEPS[0]], row, "reference")] for row in range(4)]
    columns = [Column(label="reference", rows=references)]
    for step, grid in grids.items():
        rows = [[tile(grid, row, name) for name in ("N=8", "unconditional")] for row in range(4)]
        columns.append(Column(label=f"step {step:,}: N=8, unconditional", rows=rows))
    return draw_grid(columns, "")


def made_by(command: str, picture: str) -> Image.Image:
    """The picture that a command writes into the folder OUT."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *command.replace("OUT", folder).split()], cwd=ROOT, check=True)
        return Image.open(next(Path(folder).rglob(picture))).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    """As JPEG, because maps are as large as photographs in PNG."""
    image.save(PICTURES / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    save(draw_steps(Path(sys.argv[1])), "tutorial_steps")
    save(made_by("train.py configs/relief64.yaml --look trainer.default_root_dir=OUT", "look.png"), "tutorial_look")
    sweep = "sample.py --ckpt relief64 --ref data/maps/heart.png --sweep --num-samples 1 --out OUT"
    save(made_by(sweep, "heart_grid.png"), "tutorial_sweep")
    refs = (
        "data/maps/coast.png data/maps/ring.png data/references/field_copper_on_blue.png data/references/photo_cat.png"
    )
    save(
        made_by(f"sample.py --ckpt relief64 --ref {refs} --factor 4 8 16 --num-samples 2 --out OUT", "grid.png"),
        "tutorial_references",
    )
