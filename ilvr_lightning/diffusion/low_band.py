"""The space of phi_N in orthonormal coordinates, and how much images vary along each: what the gain of ILVR needs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_pass import batched, cast_like, dct_basis, low_pass_matrix, zero_padded
from ilvr_lightning.diffusion.plan import as_tuple

MIN_VARIANCE = 1e-8
"""Images that vary less than this along a frequency (in [-1, 1]) are taken to vary so much."""


class LowBand:
    """Coordinates z(x) = Q_h^T x Q_w of phi_N's space, ordered by frequency.

    The columns of Q are the lowest frequencies of the DCT-II, projected onto the space and made orthonormal: along one
    axis Q = qr(P D[:n]^T), with P the orthogonal filter and n the side divided by N.

    Args:
        size: height and width in pixels.
        factor: N; one value, or one per image.
        kernel: the filter's.
    """

    def __init__(self, size: tuple[int, int], factor: int | Sequence[int], kernel: str = "cubic") -> None:
        self.size = size
        factors = as_tuple(factor if isinstance(factor, int) else tuple(factor))
        bases = [[_basis(side, n, kernel) for n in factors] for side in size]
        most = [max(Q.shape[1] for Q in along) for along in bases]
        self._bases = [
            batched([zero_padded(Q, 1, n) for Q in along]) for along, n in zip(bases, most, strict=True)
        ]  # (H, n_h), (W, n_w), or (B, 1, H, n_h) ...

    def coordinates(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, n_h, n_w); with one factor per image, smaller bands are padded with 0."""
        rows, columns = (cast_like(Q, x) for Q in self._bases)
        return rows.mT @ x @ columns

    def pixels(self, z: Tensor) -> Tensor:
        """(B, C, n_h, n_w) -> (B, C, H, W), in the filter's space."""
        rows, columns = (cast_like(Q, z) for Q in self._bases)
        return rows @ z @ columns.mT

    def variances(self, spectrum: Sequence[float]) -> Tensor:
        """Variance of each coordinate, (n_h, n_w) or (B, 1, n_h, n_w) in float64.

        Args:
            spectrum: variance of the DCT's coefficients by radius, as `radial_spectrum` returns it.
        """
        by_frequency = _at_radii(spectrum, self.size)
        rows, columns = ((dct_basis(side) @ Q).square() for side, Q in zip(self.size, self._bases, strict=True))
        variances: Tensor = rows.mT @ by_frequency @ columns
        return variances


def _basis(side: int, factor: int, kernel: str) -> Tensor:
    """(side, n) float64, orthonormal columns."""
    if side == 1 or factor == 1:
        return dct_basis(side).mT
    lowest = dct_basis(side)[: side // factor].mT
    basis: Tensor = torch.linalg.qr(low_pass_matrix(side, factor, kernel, orthogonal=True) @ lowest).Q
    return basis


def radial_spectrum(images: Tensor) -> list[float]:
    """Variance of the DCT-II's coefficients of images (B, C, H, W), averaged over channels, by radius.

    Returns:
        One number per whole radius 0, 1, 2 ..., the radius of frequency (i, j) being max(H, W) |(i / H, j / W)|.
    """
    rows, columns = (dct_basis(side) for side in images.shape[-2:])
    power = (rows @ images.cpu().double() @ columns.mT).var(0, correction=0).mean(0)
    radius = _radii((images.shape[2], images.shape[3])).round().long()
    total, count = torch.zeros(2, int(radius.max()) + 1, dtype=torch.float64)
    total.index_add_(0, radius.flatten(), power.flatten())
    count.index_add_(0, radius.flatten(), torch.ones_like(power).flatten())
    return [float(each) for each in total / count.clamp(min=1)]


def natural_spectrum(size: tuple[int, int]) -> list[float]:
    """The spectrum 1 / (1 + radius)^2 of natural images, scaled so that a pixel's variance is 1."""
    length = math.ceil(float(_radii(size).max())) + 1
    shape = [1 / (1 + radius) ** 2 for radius in range(length)]
    total = float(_at_radii(shape, size).sum()) - shape[0]
    return [value * size[0] * size[1] / total for value in shape]


def _radii(size: tuple[int, int]) -> Tensor:
    """(H, W) the radius of each frequency."""
    rows, columns = (torch.arange(side, dtype=torch.float64) / side for side in size)
    return max(size) * (rows[:, None].square() + columns.square()).sqrt()


def _at_radii(spectrum: Sequence[float], size: tuple[int, int]) -> Tensor:
    """(H, W) the spectrum at each frequency; its logarithm is interpolated between whole radii."""
    values = torch.tensor(spectrum, dtype=torch.float64).clamp(min=MIN_VARIANCE).log()
    radius = _radii(size).clamp(max=len(values) - 1)
    below = radius.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], radius - below).exp()
