"""Draw the animation of the sampling, docs/pictures/sampling.webp: python docs/make_animation.py

For each bundled model: a reference, what N keeps of it, and the predictions of x_0 while four samples are drawn.
"""

from pathlib import Path

from PIL import Image

from ilvr_lightning.checkpoints.find import BUNDLED
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.images import Pixels, from_tensor
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate_steps
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.visual.grids import Column, draw_grid

ROOT = Path(__file__).parents[1]
SHOWN = {"toon64": ("field_copper_on_blue", 16), "animals64": ("photo_cat", 32)}
"""By model: its reference in data/references, and N."""
SEEDS = (0, 1, 2, 3)


def predictions(name: str) -> tuple[Pixels, Pixels, list[list[Pixels]]]:
    """The reference, what is kept of it, and four predictions of x_0 per step."""
    denoise = load_denoiser(BUNDLED / name, say=None)
    picture, factor = SHOWN[name]
    reference = find_references([str(ROOT / "data" / "references" / f"{picture}.png")], denoise.image_shape)[0]
    y, shape = reference.tensor[None], denoise.image_shape
    kept = from_tensor(LowPassFilter(shape[1:], factor, orthogonal=True)(y))[0]
    states = generate_steps(denoise, denoise.preset("fast", factor), seeds=SEEDS, shape=shape, reference=y)
    return reference.preview(), kept, [list(from_tensor(state.x0)) for state in states]


def draw() -> None:
    """Write the file."""
    references, kept, steps = zip(*map(predictions, SHOWN), strict=True)
    frames: list[Image.Image] = []
    for step, tiles in enumerate(zip(*steps, strict=True), 1):
        columns = [
            Column(label="reference", rows=[[tile] for tile in references]),
            Column(label="kept", rows=[[tile] for tile in kept]),
            Column(label=f"four samples, step {step} of {len(steps[0])}", rows=tiles),
        ]
        frames.append(draw_grid(columns, "", min_tile=128))
    (ROOT / "docs" / "pictures").mkdir(exist_ok=True)
    frames[0].save(
        ROOT / "docs" / "pictures" / "sampling.webp",
        save_all=True,
        append_images=frames[1:],
        duration=[250] * (len(frames) - 1) + [2500],
        loop=0,
        quality=75,
        method=6,
    )


if __name__ == "__main__":
    draw()
