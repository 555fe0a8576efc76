"""The nearest image in [-1, 1] that, rounded to 8 bits and downsampled, equals the downsampled reference."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_pass import KERNELS, LowPassFilter, cast_like, low_pass_factors
from ilvr_lightning.diffusion.plan import as_tuple, check_factor

MAX_ITERATIONS = 500
"""Projections of one image at most; nearly all images need fewer than fifty."""


def project_to_low_band(
    x: Tensor, y: Tensor, factor: int | Sequence[int], kernel: str = "cubic", mask: Tensor | None = None
) -> Tensor:
    """The image near x that lies in [-1, 1] and, downsampled by N, equals the downsampled y to within 1/255 after
    rounding to 8 bits.

    Dykstra's alternating projections onto the box and {z: D z = D y}, which find the nearest image in both, with
    Nesterov's momentum; plain alternation takes ten times the rounds, and clipping alone leaves the second set. What is
    not there after MAX_ITERATIONS goes the rest of the way in a straight line to y, which is in both. With a mask the
    image found is near x, not always the nearest.

    Args:
        x: (B, C, H, W).
        y: (B, C, H, W) in [-1, 1].
        factor: N, one value, or one per image.
        kernel: D's, a key of KERNELS.
        mask: (B or 1, 1, H, W); only where it is 1 must the low bands agree.

    Raises:
        ValueError: a factor does not divide the size, or the kernel is no resampling kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"the kernel must be one that downsamples, {', '.join(KERNELS)}: got {kernel!r}")
    y = y.expand_as(x)
    made = [x[:0]]
    factors = as_tuple(factor if isinstance(factor, int) else tuple(factor))
    for i in range(len(x)):
        n = factors[i % len(factors)]
        part = None if mask is None else mask[i % len(mask)][None]
        made.append(_one(x[i][None], y[i][None], n, kernel, part))
    return torch.cat(made)


def _one(x: Tensor, y: Tensor, factor: int, kernel: str, mask: Tensor | None) -> Tensor:
    height, width = x.shape[-2:]
    check_factor(factor, (height, width))
    if factor == 1 and mask is None:
        return y.clone()
    downs = [low_pass_factors(side, factor, kernel)[1] for side in (height, width)]
    up_h, up_w = (cast_like(torch.linalg.pinv(down), x) for down in downs)
    down_h, down_w = (cast_like(down, x) for down in downs)
    # Rounding moves a pixel by half a level at most, and the mean of pixels that D makes by this much.
    rounding = 0.5 * float(down_h.abs().sum(1).max() * down_w.abs().sum(1).max())
    tolerance = (0.998 - rounding) / 127.5
    held: Tensor | float = 1.0
    if mask is not None:
        held = cast_like(LowPassFilter((height, width), factor, kernel).cell_means(mask) >= 1 - 1e-6, x)

    def off(v: Tensor) -> Tensor:
        return held * (down_h @ (y - v.clamp(-1, 1)) @ down_w.mT)

    v = before = x
    momentum = 1.0
    for _ in range(MAX_ITERATIONS):
        wrong = off(v)
        if wrong.abs().max() <= tolerance:
            return v.clamp(-1, 1)
        step = v + up_h @ wrong @ up_w.mT
        if ((v - step) * (step - before)).sum() > 0:
            momentum = 1.0  # it leads away: restart (O'Donoghue and Candes 2015)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        v, before, momentum = step + (momentum - 1) / following * (step - before), step, following
    worst = float(off(v).abs().max())
    return v.clamp(-1, 1) + max(0.0, 1 - tolerance / worst) * (y - v.clamp(-1, 1))
