"""phi_N, the low-pass filter of ILVR, as two matrices: downsampling by N with antialiasing, then upsampling by N."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ilvr_lightning.diffusion.plan import as_tuple, check_factor


class LowPassFilter:
    """phi_N(x) = A_h x A_w^T (Choi et al. 2021, section 3.2).

    A side of length 1 is left alone, so that 1-d signals are images of height 1.

    Args:
        size: height and width in pixels.
        factor: N, which divides both sides; one value, or one per image.
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
        self.kernel, self.orthogonal = kernel, orthogonal
        factors = as_tuple(self.factor)
        for value in factors:
            check_factor(value, self.size)
        pairs = [[low_pass_factors(side, value, kernel, orthogonal) for value in factors] for side in self.size]
        rows, columns = (batched([up @ down for up, down in pair]) for pair in pairs)
        self._matrices = {(torch.device("cpu"), torch.float64): (rows, columns.mT)}
        self._cells = [[len(down) for _, down in pair] for pair in pairs]
        ups = [
            batched([zero_padded(up, 1, max(n)) for up, _ in pair]) for pair, n in zip(pairs, self._cells, strict=True)
        ]
        downs = [
            batched([zero_padded(d, 0, max(n)) for _, d in pair]) for pair, n in zip(pairs, self._cells, strict=True)
        ]
        self._pairs = {(torch.device("cpu"), torch.float64): (ups, downs)}

    def __call__(self, x: Tensor) -> Tensor:
        """Filter x (B, C, H, W), in its own dtype; with one factor per image, B must be their number.

        Raises:
            ValueError: x has another size than the filter.
        """
        self._check(x)
        key = (x.device, x.dtype)
        if key not in self._matrices:
            rows, columns = self._matrices[torch.device("cpu"), torch.float64]
            self._matrices[key] = (cast_like(rows, x), cast_like(columns, x))
        rows, columns = self._matrices[key]
        return rows @ x @ columns

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[-2:]) != self.size:
            raise ValueError(f"the low-pass filter is for images of {self.size}: got {tuple(x.shape[-2:])}")

    def cell_means(self, mask: Tensor) -> Tensor:
        """The mean of a mask over each cell of the low-resolution grid; a cell is N x N pixels.

        Args:
            mask: (B, 1, H, W), or 1 in place of B.

        Returns:
            (B, 1, n_h, n_w) in float64, where n is the side divided by N. With one factor per image n belongs to the
            smallest factor, and the grids of the others are padded with 0.
        """
        self._check(mask)
        rows, columns = (
            batched([zero_padded(_mean_matrix(side, n), 0, max(cells)) for n in cells])
            for side, cells in zip(self.size, self._cells, strict=True)
        )
        return rows @ mask.to("cpu", torch.float64) @ columns.mT

    def weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """U (w * (D x)), where phi is U D: x (B, C, H, W) filtered, with its coefficients weighted by w.

        w has the shape that `cell_means` returns.

        Where D U is 1 (orthogonal, ideal, box) D of it is the weighted D x, exactly; in pixels weights fade over the
        reach of U, two cells for the bicubic kernel ("ideal" and orthogonal Lanczos have no end, and ring at an edge).
        """
        self._check(x)
        key = (x.device, x.dtype)
        if key not in self._pairs:
            ups, downs = self._pairs[torch.device("cpu"), torch.float64]
            self._pairs[key] = [cast_like(m, x) for m in ups], [cast_like(m, x) for m in downs]
        (up_h, up_w), (down_h, down_w) = self._pairs[key]
        weighted: Tensor = up_h @ (cast_like(weight, x) * (down_h @ x @ down_w.mT)) @ up_w.mT
        return weighted


class OctaveGains:
    """Multiplies each octave above a filter's frequencies: x + sum_k (g_k - 1) (P_k/2 x - P_k x), k = 2, 4 ... N.

    Args:
        low_pass: P_N; its kernel makes the octaves.
        gains: one list for all images, or one per image, with one gain per octave, the finest (k = 2) last; coarser
            octaves without a gain stay as they are.

    Raises:
        ValueError: N is no power of two.
    """

    def __init__(self, low_pass: LowPassFilter, gains: Sequence[Sequence[float]]) -> None:
        factors = as_tuple(low_pass.factor)
        images = max(len(factors), len(gains))
        pairs = [(factors[i % len(factors)], gains[i % len(gains)]) for i in range(images)]
        if any(n & (n - 1) for n, own in pairs if len(own)):
            raise ValueError(f"octave gains are for factors that are powers of two: got {low_pass.factor}")
        count = max((n.bit_length() - 1 for n, own in pairs if len(own)), default=0)
        self._filters = [
            LowPassFilter(low_pass.size, 2**k, low_pass.kernel, low_pass.orthogonal) for k in range(1, count + 1)
        ]
        self._gains = torch.ones(count, images, 1, 1, 1, dtype=torch.float64)
        for i, (n, own) in enumerate(pairs):
            octaves = n.bit_length() - 1
            for k, gain in enumerate(reversed(own[-octaves:] if octaves else ())):
                self._gains[k, i] = gain

    def __call__(self, x: Tensor) -> Tensor:
        """Change x (B, C, H, W)."""
        made, finer = x, x
        for gain, low_pass in zip(cast_like(self._gains, x), self._filters, strict=True):
            coarser = low_pass(x)
            made = made + (gain - 1) * (finer - coarser)
            finer = coarser
        return made


def cast_like(table: Tensor, x: Tensor) -> Tensor:
    """A float64 table in the dtype and on the device of x; the dtype first, since not every device has float64."""
    return table.to(x.dtype).to(x.device)


def batched(matrices: list[Tensor]) -> Tensor:
    """One matrix, which broadcasts over the batch, or several as (B, 1, ., .)."""
    return matrices[0] if len(matrices) == 1 else torch.stack(matrices).unsqueeze(1)


def zero_padded(matrix: Tensor, dim: int, length: int) -> Tensor:
    """A matrix padded with zeros along one dimension."""
    shape = list(matrix.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def _mean_matrix(side: int, cells: int) -> Tensor:
    """(cells, side) matrix that averages side/cells neighbours."""
    return torch.eye(cells, dtype=torch.float64).repeat_interleave(side // cells, 1) * (cells / side)


def low_pass_matrix(side: int, factor: int, kernel: str = "cubic", orthogonal: bool = False) -> Tensor:
    """The (side, side) float64 matrix of phi along one axis.

    Raises:
        ValueError: the kernel is unknown.
    """
    up, down = low_pass_factors(side, factor, kernel, orthogonal)
    return up @ down


@functools.lru_cache(maxsize=256)
def low_pass_factors(side: int, factor: int, kernel: str = "cubic", orthogonal: bool = False) -> tuple[Tensor, Tensor]:
    """U (side, n) and D (n, side) in float64, whose product is phi along one axis; n is side / factor.

    Raises:
        ValueError: the kernel is unknown.
    """
    if kernel not in KERNELS and kernel != "ideal":
        raise ValueError(f"sampling.kernel must be one of {', '.join((*KERNELS, 'ideal'))}: got {kernel!r}")
    if side == 1 or factor == 1:
        return torch.eye(side, dtype=torch.float64), torch.eye(side, dtype=torch.float64)
    if kernel == "ideal":
        cells = side // factor
        down = dct_basis(cells).mT @ dct_basis(side)[:cells]
        return down.mT, down
    down = resize_matrix(side, side // factor, kernel)
    up = resize_matrix(side // factor, side, kernel)
    if not orthogonal:
        return up, down
    if kernel.startswith("lanczos"):
        return torch.linalg.pinv(down), down
    return up, torch.linalg.pinv(up)


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
    """(side, side) orthonormal DCT-II, one frequency per row; mirrored borders by construction."""
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
