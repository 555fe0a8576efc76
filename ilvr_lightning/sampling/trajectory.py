"""sample.py --trajectory: x_0 over the steps, predicted and refined, as a strip and as an animation."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import Pixels, to_image
from ilvr_lightning.sampling.requests import Job, trajectory_files
from ilvr_lightning.visual.grids import Column, draw_grid

T = TypeVar("T")


IN_STRIP, IN_ANIMATION = 10, 50
"""At most so many steps, evenly chosen."""


MIN_SIDE = 256


FRAME_MS, LAST_MS = 120, 1500


class Frame(NamedTuple):
    """x_0 as predicted at one level and refined, for a whole batch."""

    t: int
    pixels: Pixels
    """(B, H, W, C)."""


def draw_trajectory(frames: Sequence[Frame], place: int, job: Job, picture: Path) -> None:
    """Write the two files of one picture of the batch.

    Args:
        frames: a step each; the last one is the picture itself.
        place: of the picture in the batch.
        job: what was made.
        picture: its file, which names the others.
    """
    strip, animation = trajectory_files(picture)
    columns = [Column(label=f"t={f.t}", rows=[[f.pixels[place]]]) for f in spread(frames, IN_STRIP)]
    if job.reference is not None:
        columns.insert(0, Column(label="reference", rows=[[job.reference.preview()]]))
    plan = job.recipe.plan
    title = f"{picture.stem}: x_0 as predicted at t and refined, {plan['sampler']}, {plan['num_steps']} steps"
    write_atomically(strip, functools.partial(draw_grid(columns, title).save, format="PNG"))
    images = [_enlarged(f.pixels[place]) for f in spread(frames, IN_ANIMATION)]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    write_atomically(
        animation,
        functools.partial(
            images[0].save, format="WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0,
            lossless=True,
        ),
    )  # fmt: skip


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _enlarged(pixels: Pixels) -> Image.Image:
    height, width, _ = pixels.shape
    zoom = max(1, -(-MIN_SIDE // min(height, width)))
    return to_image(pixels).convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
