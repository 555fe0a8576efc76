"""Samples against the images that they were made from, one figure per pair."""

import math

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ilvr_lightning.diffusion.low_pass import LowPassFilter

HALF_WINDOW = 5
"""SSIM is not taken nearer to the border."""


def pair_figures(x: Tensor, y: Tensor, factor: int | None = None) -> dict[str, Tensor]:
    """Figures (B,) in float64 of samples x and their sources y, both (B, C, H, W) in [-1, 1].

    L2 is the Euclidean norm of the difference for pixels in [0, 1]. PSNR is in decibels, 100 at most. SSIM has a
    Gaussian window of 11 pixels and the deviation 1.5 (Wang et al. 2004), on each channel; NaN for smaller images.
    "low-band error" is the mean square of the difference below phi_N (the orthogonal bicubic filter of N = factor) for
    pixels in [-1, 1]; it is absent without a factor.
    """
    x, y = x.double(), y.double()
    squares = ((x - y) / 2).square()
    figures = {
        "L2": squares.sum((1, 2, 3)).sqrt(),
        "PSNR": -10 * squares.mean((1, 2, 3)).clamp(min=1e-10).log10(),
        "SSIM": ssim(x, y),
    }
    if factor is not None:
        low_pass = LowPassFilter((x.shape[2], x.shape[3]), factor, orthogonal=True)
        figures["low-band error"] = low_pass(x - y).square().mean((1, 2, 3))
    return figures


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(B,) structural similarity of images (B, C, H, W) in [-1, 1], where the window lies within the image."""
    _, full = structural_similarity_index_measure(
        (x + 1) / 2, (y + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    return full[..., HALF_WINDOW:-HALF_WINDOW, HALF_WINDOW:-HALF_WINDOW].mean((1, 2, 3))


def pairwise_rms(x: Tensor) -> float:
    """Mean RMS distance between two of the images x (K, C, H, W), K of at least 2, in their unit."""
    flat = x.double().flatten(1)
    return float(torch.pdist(flat).mean()) / math.sqrt(flat.shape[1])
