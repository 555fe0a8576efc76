"""How much noise an image has: what the camera or the JPEG compression added."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from ilvr_lightning.data.values import own_range

MAX_SIDE = 1024
"""Noise is estimated in the middle of an image, which is cropped to this side."""
CHROMA_GAIN = 1.91
"""Variance of R, G and B, on average, per variance of Cb and of Cr (ITU-T T.871)."""


def estimate_noise(image: Image.Image) -> float:
    """Standard deviation of an image's noise, for pixels in [-1, 1], at its own size.

    White noise from the median of the finest diagonal Haar coefficients (Donoho and Johnstone 1994), which edges hardly
    change; compression from a JPEG's quantization tables.

    Args:
        image: as `open_image` gives it.
    """
    return math.hypot(_white_noise(image), _quantization_noise(image))


def _white_noise(image: Image.Image) -> float:
    left, top = max(0, image.width - MAX_SIDE) // 2, max(0, image.height - MAX_SIDE) // 2
    part = image.crop((left, top, min(image.width, left + MAX_SIDE), min(image.height, top + MAX_SIDE)))
    if image.mode[0] in "IF":  # one channel of 16 or 32 bits
        _, white = own_range(np.asarray(image))
        values: NDArray[np.float64] = np.nan_to_num(np.array(part, dtype=np.float64))[..., None] * (255 / white)
    else:
        values = np.array(part.convert("RGB"), dtype=np.float64)
    height, width = values.shape[0] // 2 * 2, values.shape[1] // 2 * 2
    if not height or not width:
        return 0.0
    values = values[:height, :width]
    diagonal = (values[::2, ::2] - values[1::2, ::2] - values[::2, 1::2] + values[1::2, 1::2]) / 2
    return float(np.median(np.abs(diagonal), axis=(0, 1)).mean()) / 0.6745 / 127.5


def _quantization_noise(image: Image.Image) -> float:
    """The error of the blocks' means, if it is uniform over a step of their quantization."""
    tables = getattr(image, "quantization", None)
    if not tables or 0 not in tables:
        return 0.0
    steps = [tables.get(number, tables[0])[0] / math.sqrt(12) / 127.5 for number in (0, 1)]
    # A chroma sample of 4:2:0 stands for four pixels, so that its error is twice as large in orthonormal coefficients.
    pixels = {0: 1, 1: 2, 2: 4}.get(JpegImagePlugin.get_sampling(image), 1)
    colours = CHROMA_GAIN * pixels * steps[1] ** 2 if image.mode != "L" else 0.0
    return math.sqrt(steps[0] ** 2 + colours)
