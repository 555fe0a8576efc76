"""phi_N, the linear low-pass filter of ILVR: down by N with antialias, up by N, mirrored borders, as two matrices."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ilvr_lightning.diffusion.factor import check_factor
from ilvr_lightning.diffusion.plan import as_tuple


class LowPassFilter:
    """phi_N(x) = A_h x A_w^T (Choi et al. 2021, section 3.2).

    A side of length 1 is left alone, so that 1-d signals are images of height 1.

    Args:
        size: height and width in pixels.
        factor: N, which divides both sides; one, or one an image.
        kernel: a key of KERNELS, or "ideal": the DCT-II filter that keeps the lowest 1/N of the frequencies.
        orthogonal: the orthogonal projection onto the filter's space in place of the filter. For a kernel that
            down- and upsampling share (cubic, linear, box) that is U U^+ with U the upsampling matrix; for Lanczos
            D^+ D with D the downsampling matrix, which keeps what D sees. "ideal" is a projection already.

    Raises:
        ValueError: a factor does not divide the size, or the kernel is unknown.
    """

    def __init__(
        self, size: tuple[int, int], factor: int | Sequence[int], kernel: str = "cubic", orthogonal: bool = False
    ) -> None:
        self.size = (int(size[0]), int(size[1]))
        self.factor = factor if isinstance(factor, int) else tuple(factor)
        factors = as_tuple(self.factor)
        for value in factors:
            check_factor(value, self.size)
        sides = [[low_pass_matrix(side, value, kernel, orthogonal) for value in factors] for side in self.size]
        # One factor broadcasts over the batch; several make (B, 1, side, side).
        rows, columns = (m[0] if len(m) == 1 else torch.stack(m).unsqueeze(1) for m in sides)
        self._matrices = {(torch.device("cpu"), torch.float64): (rows, columns.mT)}

    def __call__(self, x: Tensor) -> Tensor:
        """Filter x (B, C, H, W), in its own dtype; with a factor an image, B must be their number.

        Raises:
            ValueError: x has another size than the filter.
        """
        if tuple(x.shape[-2:]) != self.size:
            raise ValueError(f"the low-pass filter is for images of {self.size}: got {tuple(x.shape[-2:])}")
        key = (x.device, x.dtype)
        if key not in self._matrices:
            rows, columns = self._matrices[torch.device("cpu"), torch.float64]
            self._matrices[key] = (rows.to(x.dtype).to(x.device), columns.to(x.dtype).to(x.device))
        rows, columns = self._matrices[key]
        return rows @ x @ columns


@functools.lru_cache(maxsize=256)
def low_pass_matrix(side: int, factor: int, kernel: str = "cubic", orthogonal: bool = False) -> Tensor:
    """The (side, side) float64 matrix of phi along one axis.

    Raises:
        ValueError: the kernel is unknown.
    """
    if kernel not in KERNELS and kernel != "ideal":
        raise ValueError(f"sampling.kernel must be one of {', '.join((*KERNELS, 'ideal'))}: got {kernel!r}")
    if side == 1 or factor == 1:
        return torch.eye(side, dtype=torch.float64)
    if kernel == "ideal":
        basis = dct_basis(side)[: side // factor]
        return basis.mT @ basis
    down = resize_matrix(side, side // factor, kernel)
    up = resize_matrix(side // factor, side, kernel)
    if not orthogonal:
        return up @ down
    if kernel.startswith("lanczos"):
        projection: Tensor = torch.linalg.pinv(down) @ down
    else:
        projection = up @ torch.linalg.pinv(up)
    return projection


def resize_matrix(length: int, new_length: int, kernel: str) -> Tensor:
    """(new_length, length) float64 matrix that resamples a line, antialiased when it shrinks, with mirrored borders.

    Output sample i sits at (i + 1/2) length/new_length - 1/2 of the input's pixel centres; the kernel is widened by
    the same ratio when shrinking. Borders mirror with the edge pixel repeated.
    """
    function, width = KERNELS[kernel]
    scale = new_length / length
    stretch = min(scale, 1.0)
    width = width / stretch
    centre = (torch.arange(new_length, dtype=torch.float64) + 0.5) / scale - 0.5
    first = torch.floor(centre - width / 2)
    taps = first[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    weights = function(stretch * (centre[:, None] - taps))
    weights = weights / weights.sum(1, keepdim=True)
    mirrored = torch.cat([torch.arange(length), torch.arange(length).flip(0)])
    columns = mirrored[taps.long() % (2 * length)]
    return torch.zeros(new_length, length, dtype=torch.float64).scatter_add_(1, columns, weights)


def dct_basis(side: int) -> Tensor:
    """(side, side) orthonormal DCT-II, a frequency a row; mirrored borders by construction."""
    k = torch.arange(side, dtype=torch.float64)[:, None]
    n = torch.arange(side, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * k * (2 * n + 1) / (2 * side)) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis


def _cubic(x: Tensor) -> Tensor:
    """Keys 1981 with a = -0.5."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return near * (x <= 1) + far * ((x > 1) & (x <= 2))


def _lanczos(lobes: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.sinc(x) * torch.sinc(x / lobes) * (x.abs() < lobes)


def _linear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _box(x: Tensor) -> Tensor:
    return ((x >= -0.5) & (x < 0.5)).to(x.dtype)


KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "cubic": (_cubic, 4.0),
    "lanczos2": (_lanczos(2), 4.0),
    "lanczos3": (_lanczos(3), 6.0),
    "linear": (_linear, 2.0),
    "box": (_box, 1.0),
}
"""Each kernel with the width of its support in pixels."""
