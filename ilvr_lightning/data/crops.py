"""Which parts of a picture are images: it is divided where a strip is held out, reduced once, and cropped to windows.

Sizes are (height, width), corners (top, left), all in pixels.
"""

import math
from typing import Literal

from PIL import Image

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.images import BrokenImageError, Pixels, fit_image
from ilvr_lightning.diffusion.noise import derive_seed

Size = tuple[int, int]
Corner = tuple[int, int]
Part = Literal["whole", "training", "held out"]
"""What of each picture is used: all of it, or one side of the line that divides it."""


def reduction(size: Size, config: DataConfig) -> float:
    """How many pixels of a picture become one of an image, along each axis."""
    if config.scale == "fit":
        return min(size[0] / config.size[0], size[1] / config.size[1])
    return float(config.scale)


def held_out_strip(size: Size, config: DataConfig) -> tuple[int, int] | None:
    """(axis, first row or column) of the strip that is held out of a picture: at its right, or its bottom if it is too
    narrow; None where it is too small for a strip and the rest to hold an image each."""
    for axis in (1, 0):
        least = math.ceil(config.size[axis] * reduction(size, config))
        if size[axis] >= 2 * least:
            strip = min(max(least, round(config.validation_fraction * size[axis])), size[axis] - least)
            return axis, size[axis] - strip
    return None


def _box(size: Size, config: DataConfig, part: Part) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of a picture; one that cannot be divided is all for training."""
    height, width = size
    found = None if part == "whole" else held_out_strip(size, config)
    if found is None and part == "held out":
        raise BrokenImageError("it is too small to hold out a strip")
    if found is None:
        return 0, 0, width, height
    axis, line = found
    if part == "training":
        return (0, 0, line, height) if axis == 1 else (0, 0, width, line)
    return (line, 0, width, height) if axis == 1 else (0, line, width, height)


def reduced_size(size: Size, config: DataConfig, part: Part = "whole") -> Size:
    """The size of a picture's part after it is reduced, at least that of an image.

    Raises:
        BrokenImageError: it is too small.
    """
    left, top, right, bottom = _box(size, config, part)
    factor = reduction(size, config)
    reduced = round((bottom - top) / factor), round((right - left) / factor)
    if config.scale != "fit" and (reduced[0] < config.size[0] or reduced[1] < config.size[1]):
        raise BrokenImageError(
            f"its {size[1]}x{size[0]} pixels, reduced by data.scale={config.scale}, are fewer than data.image_size; "
            "give data.scale=fit, or a smaller scale or image size"
        )
    return max(reduced[0], config.size[0]), max(reduced[1], config.size[1])


def reduce(image: Image.Image, config: DataConfig, part: Part = "whole") -> Image.Image:
    """A part of a picture, reduced by data.scale; cropped to an image in its centre if data.crop says so.

    Raises:
        BrokenImageError: it is too small.
    """
    if config.crop == "center" and config.scale == "fit":
        return fit_image(image, config.size)
    size = image.height, image.width
    height, width = reduced_size(size, config, part)
    if part != "whole":  # first, so that no pixel beyond the line counts
        image = image.crop(_box(size, config, part))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if config.crop == "center":
        top, left = (height - config.size[0]) // 2, (width - config.size[1]) // 2
        image = image.crop((left, top, left + config.size[1], top + config.size[0]))
    return image


def tiles(size: Size, config: DataConfig) -> list[Corner]:
    """The corners of all windows of a reduced picture, side by side; what does not fill one is left out around them."""
    first = [size[axis] % config.size[axis] // 2 for axis in (0, 1)]
    ends = [size[axis] - config.size[axis] + 1 for axis in (0, 1)]
    rows, columns = (range(first[axis], ends[axis], config.size[axis]) for axis in (0, 1))
    return [(top, left) for top in rows for left in columns]


def covering(size: Size, config: DataConfig) -> int:
    """So many windows have the area of a reduced picture."""
    return max(1, round(math.prod(size) / math.prod(config.size)))


def random_window(pixels: Pixels, config: DataConfig, seed: int) -> Pixels:
    """A window of a reduced picture (H, W, C), each equally probable; all of it where it has the size of an image."""
    corner = [
        derive_seed(seed, "crop", axis) % (pixels.shape[axis] - config.size[axis] + 1) for axis in (0, 1)
    ]  # fmt: skip
    return window(pixels, config, (corner[0], corner[1]))


def window(pixels: Pixels, config: DataConfig, corner: Corner) -> Pixels:
    """The window (h, w, C) of a reduced picture at a corner."""
    top, left = corner
    return pixels[top : top + config.size[0], left : left + config.size[1]]
