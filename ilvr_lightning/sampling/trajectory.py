"""sample.py --trajectory: the predicted x_0 over the steps, as a strip and as an animation."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import Pixels, to_image
from ilvr_lightning.sampling.folder import trajectory_files
from ilvr_lightning.sampling.requests import SampleRequest
from ilvr_lightning.visual.grids import Column, draw_grid

T = TypeVar("T")
FRAMES_IN_STRIP = 10
"""The strip shows at most this many steps, evenly chosen."""
FRAMES_IN_ANIMATION = 50
"""The animation shows at most this many steps, evenly chosen."""
MIN_SIDE = 256
"""The animation of a smaller image is enlarged to at least this many pixels, pixel by pixel."""
FRAME_MS = 120
"""A frame of the animation is shown for this many milliseconds."""
LAST_FRAME_MS = 1500
"""The last frame, which is the image, is shown for this many milliseconds."""


class Frame(NamedTuple):
    """The x_0 that was predicted at one timestep, with the reference applied, for all images of a batch."""

    t: int
    pixels: Pixels
    """(B, H, W, C)."""


def draw_trajectory(frames: Sequence[Frame], index: int, request: SampleRequest, image: Path) -> None:
    """Write the strip and the animation of one image of a batch.

    Args:
        frames: the steps in order; the last one shows the image itself.
        index: the image's index in the batch.
        request: what was sampled.
        image: the image's file, which gives the names of the two.
    """
    strip, animation = trajectory_files(image)
    columns = [Column(label=f"t={f.t}", rows=[[f.pixels[index]]]) for f in evenly_chosen(frames, FRAMES_IN_STRIP)]
    if request.reference is not None:
        columns.insert(0, Column(label="reference", rows=[[request.reference.preview()]]))
    plan = request.recipe.plan
    title = f"{image.stem}: x_0 as predicted at t, {plan.num_steps} steps of {plan.sampler}"
    write_atomically(strip, functools.partial(draw_grid(columns, title).save, format="PNG"))
    images = [_enlarged(f.pixels[index]) for f in evenly_chosen(frames, FRAMES_IN_ANIMATION)]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_FRAME_MS]
    write_atomically(
        animation,
        functools.partial(
            images[0].save, format="WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0,
            lossless=True,
        ),
    )  # fmt: skip


def evenly_chosen(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _enlarged(pixels: Pixels) -> Image.Image:
    height, width, _ = pixels.shape
    zoom = max(1, -(-MIN_SIDE // min(height, width)))
    return to_image(pixels).convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
