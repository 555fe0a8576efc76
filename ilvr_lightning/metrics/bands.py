"""Samples by frequency band: below phi_N they are to be the reference's, above it as real images have it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_pass import LowPassFilter, dct_basis

Metric = Callable[[Tensor, Tensor, int], float]
"""Takes samples (B, C, H, W), their references (B, C, H, W), both float64 in [-1, 1], and N; gives one figure."""
COMPONENTS = 128
"""The number of principal components in which high bands are compared."""


def high_band_distance(x: Tensor, y: Tensor, factor: int) -> float:
    """Frechet distance of the high bands in the references' principal components, over the references' variance."""
    return _component_distance(_high_band(x, factor).flatten(1), _high_band(y, factor).flatten(1), COMPONENTS)


def high_band_energy(x: Tensor, y: Tensor, factor: int) -> float:
    """Energy of the high band over that of the references; below 1 is blur, above 1 is grain."""
    return float(_high_band(x, factor).square().mean() / _high_band(y, factor).square().mean())


def worst_high_band_energy(x: Tensor, y: Tensor, factor: int) -> float:
    """The largest energy of an image's high band over that of its reference."""
    ratios = _high_band(x, factor).square().mean((1, 2, 3)) / _high_band(y, factor).square().mean((1, 2, 3))
    return float(ratios.max())


def low_band_error(x: Tensor, y: Tensor, factor: int) -> float:
    """RMS distance of the low band from the reference's, in pixels of [-1, 1]."""
    return float(_low_pass(x, factor)(x - y).square().mean().sqrt())


def energy_scores(x: Tensor, y: Tensor, factor: int | None) -> Tensor:
    """Energy score of the high band for each reference (Gneiting and Raftery 2007, equation 22); lower is better.

    A proper rule: its mean over held-out images is least where samples are drawn from the true p(x | phi(y)). So it
    punishes blur, grain, wrong modes and too little variety alike.

    Args:
        x: (R, K, C, H, W) samples, K of at least 2 for each reference, in [-1, 1].
        y: (R, C, H, W) the references, held-out images of the training domain.
        factor: N of the orthogonal bicubic filter that separates the bands; None scores the whole image.

    Returns:
        (R,) in float64.
    """
    made, real = x.cpu().double().flatten(0, 1), y.cpu().double()
    if factor is not None:
        made, real = _high_band(made, factor), _high_band(real, factor)
    made, real = made.reshape(*x.shape[:2], -1), real.flatten(1)
    count = x.shape[1]
    spread = torch.cdist(made, made).sum((1, 2)) / (count * (count - 1))
    scores: Tensor = (made - real[:, None]).norm(dim=2).mean(1) - 0.5 * spread
    return scores


METRICS: dict[str, Metric] = {
    "high": high_band_distance,
    "energy": high_band_energy,
    "worst": worst_high_band_energy,
    "low": low_band_error,
}
"""What `measure` computes and benchmarks list. To add a metric, write a function and enter it here."""


def measure(x: Tensor, y: Tensor, factor: int) -> dict[str, float]:
    """Compare samples with their references, one sample each, which are held-out images of the training domain.

    Args:
        x: (B, C, H, W) samples in [-1, 1].
        y: (B, C, H, W) the reference of each.
        factor: N of the orthogonal bicubic filter that separates the bands.

    Returns:
        The figure of each of METRICS.
    """
    x, y = x.cpu().double(), y.cpu().double()
    return {name: metric(x, y, factor) for name, metric in METRICS.items()}


def _low_pass(x: Tensor, factor: int) -> LowPassFilter:
    return LowPassFilter((x.shape[2], x.shape[3]), factor, orthogonal=True)


def _high_band(x: Tensor, factor: int) -> Tensor:
    return x - _low_pass(x, factor)(x)


NO_ENERGY = 1e-6
"""Mean square of a pixel: what rounding to 8 bits alone makes is ten times that."""


def octave_energies(x: Tensor, y: Tensor, factor: int) -> list[float]:
    """Energy of x over that of y (both (B, C, H, W)) in each octave above the frequencies of N, the finest last.

    Octaves lie between the orthogonal bicubic filters of N, N/2 ... 1, N being a power of two; NaN where y has nothing.
    """
    octaves = factor.bit_length() - 1
    filters = [LowPassFilter((x.shape[2], x.shape[3]), 2**k, orthogonal=True) for k in range(octaves, -1, -1)]
    bands_x, bands_y = ([low_pass(z.cpu().double()) for low_pass in filters] for z in (x, y))
    energies = [[float((z[i + 1] - z[i]).square().mean()) for i in range(octaves)] for z in (bands_x, bands_y)]
    return [a / b if b > NO_ENERGY else math.nan for a, b in zip(*energies, strict=True)]


def octave_ratios(x: Tensor, y: Tensor) -> list[float]:
    """Power of x over that of y (both (B, C, H, W)) by octaves of the radial frequency, the finest last."""
    ratios: list[float] = (octave_powers(x).mean(0) / octave_powers(y).mean(0)).tolist()
    return ratios


def octave_powers(x: Tensor) -> Tensor:
    """(B, octaves) power of images (B, C, H, W) by octaves of the radial frequency, the finest last.

    The finest is 1/4 cycle per pixel and above, the one before it 1/8 to 1/4, and so on; the first holds all that is
    below. Borders are mirrored (DCT-II), so that they make no frequencies of their own.
    """
    vertical, horizontal = (torch.arange(side)[:, None] / (2 * side) for side in x.shape[-2:])
    frequency = (vertical**2 + horizontal.mT**2).sqrt()
    octaves = int(math.log2(min(x.shape[-2:]))) - 1
    octave = torch.floor(torch.log2(frequency.clamp(min=1e-9) * 8)).clamp(2 - octaves, 1)
    return _summed(_power(x), [octave == k for k in range(2 - octaves, 2)])


def grain_ratios(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Power of x over that of y (both (B, C, H, W)) at the checkerboard and at stripes of two pixels."""
    checkerboard, stripes = (grain_powers(x).mean(0) / grain_powers(y).mean(0)).tolist()
    return checkerboard, stripes


def grain_powers(x: Tensor) -> Tensor:
    """(B, 2) power of images (B, C, H, W) at the checkerboard and at stripes of two pixels.

    Checkerboard: within one frequency of Nyquist in both directions. Stripes: within one of it in one direction, and
    below a quarter of it in the other. A Hann window keeps the borders out. Octaves are too wide to show either.
    """
    near, low = (
        [torch.fft.fftfreq(side, 1 / side).abs() >= side // 2 - 1 for side in x.shape[-2:]],
        [torch.fft.fftfreq(side, 1 / side).abs() < side / 8 for side in x.shape[-2:]],
    )
    stripes = (near[0][:, None] & low[1]) | (low[0][:, None] & near[1])
    return _summed(_windowed_power(x), [near[0][:, None] & near[1], stripes])


def _summed(power: Tensor, parts: list[Tensor]) -> Tensor:
    """(B, parts) the sums of power (B, H, W) over parts (H, W) of the frequencies."""
    return torch.stack([power[:, part].sum(1) for part in parts], 1)


def _windowed_power(x: Tensor) -> Tensor:
    """(B, H, W) power of x (B, C, H, W) by frequency under a Hann window, without the mean of each image."""
    x = x.cpu().double() - x.cpu().double().mean((2, 3), keepdim=True)
    rows, columns = (torch.hann_window(side, periodic=False, dtype=torch.float64) for side in x.shape[-2:])
    power: Tensor = torch.fft.fft2(x * rows[:, None] * columns).abs().square().mean(1)
    return power


def _power(x: Tensor) -> Tensor:
    """(B, H, W) power of x (B, C, H, W) by frequency in the DCT, without the mean of each image."""
    x = x.cpu().double() - x.cpu().double().mean((2, 3), keepdim=True)
    rows, columns = (dct_basis(side) for side in x.shape[-2:])
    power: Tensor = (rows @ x @ columns.mT).square().mean(1)
    return power


def _component_distance(x: Tensor, y: Tensor, components: int) -> float:
    """Frechet distance of x from y (rows are images) in y's leading principal components, over y's variance there."""
    centre = y.mean(0)
    _, sizes, axes = torch.linalg.svd(y - centre, full_matrices=False)
    axes = axes[: min(components, len(y) - 1)]
    a, b = (x - centre) @ axes.mT, (y - centre) @ axes.mT
    variance = float(sizes[: len(axes)].square().sum() / (len(y) - 1))
    return frechet_distance(a, b) / variance


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance of the normals that fit two sets of features (Heusel et al. 2017).

    Args:
        a: (n, d) features.
        b: (m, d) features.
    """
    a, b = a.double(), b.double()
    shift = float((a.mean(0) - b.mean(0)).square().sum())
    if min(len(a), len(b)) > a.shape[1]:
        return shift + bures(*(features.mT.cov().reshape(a.shape[1], -1) for features in (a, b)))
    a, b = ((features - features.mean(0)) / math.sqrt(len(features) - 1) for features in (a, b))
    overlap = torch.linalg.svdvals(a @ b.mT).sum()  # tr (A B)^1/2 from the smaller of the two matrices
    return shift + float(a.square().sum() + b.square().sum() - 2 * overlap)


def bures(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance of N(0, a) from N(0, b), covariances (d, d)."""
    root = _root(a)
    return float(a.trace() + b.trace() - 2 * _root(root @ b @ root).trace())


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    return root
