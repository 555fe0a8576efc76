"""Draw the pictures of the README with the bundled models: python docs/make_pictures.py [NAME ...]

Each shows references, and beside them samples that follow them: by the preset fast, from the seed 0. Nothing but the
references was chosen by hand.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ilvr_lightning.checkpoints.find import BUNDLED
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.images import Pixels, from_tensor
from ilvr_lightning.data.references import Reference, find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.visual.grids import Column, draw_grid

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What one file shows."""

    model: str
    references: Sequence[str]
    """As sample.py --ref takes them, from the project's folder."""
    factors: Sequence[int]
    samples: int
    """The number of samples per reference and factor."""
    title: str = ""
    condition_to: int = 0
    """The timestep at which the reference is let go."""


REFERENCES = "data/references/"
FIELDS = [f"{REFERENCES}field_{name}.png" for name in ("copper_on_blue", "dark_on_yellow", "silver_on_plum")]
PICTURES_BY_NAME = {
    "paint": Picture(model="toon64", references=FIELDS, factors=[16], samples=6),
    "animals": Picture(
        model="animals64",
        references=[f"{REFERENCES}photo_cat.png", *FIELDS[1:], f"{REFERENCES}painting_red_hair.png"],
        factors=[32, 16],
        samples=3,
    ),
    "use_paint": Picture(model="toon64", references=FIELDS[:1], factors=[16], samples=3),
    "use_translation": Picture(
        model="toon64", references=[f"{REFERENCES}painting_blond_bob.png"], factors=[8], samples=3
    ),
    "use_editing": Picture(
        model="toon64", references=[f"{REFERENCES}scribble_chalk.png"], factors=[4], samples=3, condition_to=200
    ),
    "use_variation": Picture(model="animals64", references=["data/animals:test[7:8]"], factors=[16], samples=3),
}


@cache
def model(name: str) -> LoadedDenoiser:
    """A bundled model."""
    return load_denoiser(BUNDLED / name, say=None)


def samples(picture: Picture, reference: Reference, factor: int) -> list[Pixels]:
    """Samples that follow a reference, as sample.py makes them."""
    denoiser = model(picture.model)
    seeds = [image_seed(0, reference.sha256, k) for k in range(picture.samples)]
    plan = replace(denoiser.preset("fast", factor), condition_to=picture.condition_to)
    x = generate(denoiser, plan, seeds=seeds, shape=denoiser.image_shape, reference=reference.tensor[None])
    return list(from_tensor(x))


def draw(name: str) -> None:
    """Write one picture."""
    picture = PICTURES_BY_NAME[name]
    patterns = [pattern if ":" in pattern else str(ROOT / pattern) for pattern in picture.references]
    references = find_references(patterns, model(picture.model).image_shape, "crop")
    columns = [Column(label="reference", rows=[[r.preview()] for r in references])]
    for factor in picture.factors:
        rows = [samples(picture, reference, factor) for reference in references]
        columns.append(Column(label=f"samples, N={factor}", rows=rows))
    PICTURES.mkdir(exist_ok=True)
    draw_grid(columns, picture.title).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES_BY_NAME:
        draw(name)
