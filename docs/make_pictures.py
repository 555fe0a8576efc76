"""Draw the pictures of README.md and docs/guide.md with the bundled models: python docs/make_pictures.py [NAME ...]

Each shows references, and beside them samples that follow them: by the preset fast, from the seed 0. The references and
settings were chosen by hand; the samples are the first ones.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

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
    """What one file shows: references, and beside each of them samples by the preset fast, in labelled columns."""

    model: str
    references: Sequence[str]
    """As sample.py --ref takes them, from the project's folder."""
    columns: Mapping[str, Mapping[str, Any]]
    """What each column changes in the preset, by its label."""
    samples: int = 3
    """The number of samples per reference and column."""
    spoil: Callable[[Tensor], Tensor] = lambda reference: reference
    """What is done to each reference (C, H, W) first."""


def thumbnail(reference: Tensor) -> Tensor:
    """The reference as it looks when it is enlarged from 8 px."""
    small = interpolate(reference[None], size=8, mode="area")
    return interpolate(small, size=reference.shape[1:], mode="bicubic")[0].clamp(-1, 1)


def noisy(reference: Tensor) -> Tensor:
    """The reference with noise of the standard deviation 0.2."""
    return reference + 0.2 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))


REFERENCES = "data/references/"
FIELDS = [f"{REFERENCES}field_{name}.png" for name in ("copper_on_blue", "dark_on_yellow", "silver_on_plum")]
PICTURES_BY_NAME = {
    "paint": Picture(model="toon64", references=FIELDS, columns={"samples, N=16": {"factor": 16}}, samples=6),
    "animals": Picture(
        model="animals64",
        references=[f"{REFERENCES}photo_cat.png", *FIELDS[1:], f"{REFERENCES}painting_red_hair.png"],
        columns={"samples, N=32": {"factor": 32}, "samples, N=16": {"factor": 16}},
    ),
    "use_paint": Picture(
        model="relief64",
        references=["data/maps/heart.png"],
        columns={"samples, N=4, --range 1000:500": {"factor": 4, "condition_to": 500}},
    ),
    "use_translation": Picture(
        model="animals64", references=[f"{REFERENCES}photo_astronaut.png"], columns={"samples, N=16": {"factor": 16}}
    ),
    "use_editing": Picture(
        model="toon64",
        references=[f"{REFERENCES}scribble_chalk.png"],
        columns={"samples, N=4, --range 1000:200": {"factor": 4, "condition_to": 200}},
    ),
    "use_variation": Picture(
        model="animals64", references=["data/animals:test[7:8]"], columns={"samples, N=16": {"factor": 16}}
    ),
    "relief": Picture(
        model="relief64",
        references=[f"data/maps/{name}.png" for name in ("heart", "ring", "coast", "chain")],
        columns={"samples, N=4, --range 1000:500": {"factor": 4, "condition_to": 500}},
        samples=4,
    ),
    "fails_muddle": Picture(
        model="toon64",
        references=[f"{REFERENCES}photo_cat.png"],
        columns={"symptom: N=4": {"factor": 4}, "remedy: N=16": {"factor": 16}},
    ),
    "fails_blur": Picture(
        model="toon64",
        references=["data/toon:test[5:6]"],
        columns={"symptom: N=4": {"factor": 4}, "remedy: N=8": {"factor": 8}},
        spoil=thumbnail,
    ),
    "fails_grain": Picture(
        model="toon64",
        references=["data/toon:test[5:6]"],
        columns={
            "symptom: N=4": {"factor": 4},
            "remedy: the noise is known": {"factor": 4, "reference_sigma": 0.2},
        },
        spoil=noisy,
    ),
    "fails_tint": Picture(
        model="toon64",
        references=["data/toon:test[4:5]"],
        columns={"symptom: N=8, 1000:500": {"condition_to": 500}, "remedy: N=8, 1000:0": {}},
    ),
    "fails_ignored": Picture(
        model="toon64",
        references=[f"{REFERENCES}painting_blond_bob.png"],
        columns={"symptom: N=32": {"factor": 32}, "remedy: N=8": {"factor": 8}},
    ),
}


@cache
def model(name: str) -> LoadedDenoiser:
    """A bundled model."""
    return load_denoiser(BUNDLED / name, say=None)


def samples(picture: Picture, reference: Reference, changes: Mapping[str, Any]) -> list[Pixels]:
    """Samples that follow a reference, as sample.py makes them."""
    denoiser = model(picture.model)
    seeds = [image_seed(0, reference.sha256, k) for k in range(picture.samples)]
    y = picture.spoil(reference.tensor)[None]
    plan = denoiser.preset("fast", **changes)
    return list(from_tensor(generate(denoiser, plan, seeds=seeds, shape=denoiser.image_shape, reference=y)))


def draw(name: str) -> None:
    """Write one picture."""
    picture = PICTURES_BY_NAME[name]
    patterns = [pattern if ":" in pattern else str(ROOT / pattern) for pattern in picture.references]
    references = find_references(patterns, model(picture.model).image_shape, "crop")
    shown = [from_tensor(picture.spoil(r.tensor)[None])[0] for r in references]
    columns = [Column(label="reference", rows=[[pixels] for pixels in shown])]
    for label, changes in picture.columns.items():
        columns.append(Column(label=label, rows=[samples(picture, reference, changes) for reference in references]))
    PICTURES.mkdir(exist_ok=True)
    if picture.model == "relief64":  # maps are as large as photographs in PNG
        draw_grid(columns, "").save(PICTURES / f"{name}.jpg", quality=90, subsampling=0, optimize=True)
    else:
        draw_grid(columns, "").save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES_BY_NAME:
        draw(name)
