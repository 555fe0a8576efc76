"""Principal components of the training images: what an image's low band says of its high band."""

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_pass import LowPassFilter, cast_like, dct_basis
from ilvr_lightning.diffusion.plan import as_tuple

COMPONENTS = 128
"""The number of components that are kept."""
COMPONENT_SIDE = 32
"""They are kept at the lowest frequencies: as many per axis as an image of this side has."""
TRUST_RADIUS = 2.0
"""A low band that is further off, in standard deviations, is corrected for only so much."""
MIN_VARIANCE = 1e-6
"""A direction in which images vary less (in [-1, 1]) is taken to vary so much."""


@dataclass(frozen=True, eq=False)
class Components:
    """The images' covariance as sum_k (variances_k - residual) v_k v_k^T + residual I.

    Args:
        vectors: (K, C, h, w) orthonormal v_k: coefficients of the h x w lowest frequencies of the DCT-II.
        variances: (K,) in float64.
        residual: mean variance of the other coefficients.
        size: height and width of the images in pixels.
    """

    vectors: Tensor
    variances: Tensor
    residual: float
    size: tuple[int, int]

    def plain(self) -> dict[str, Any]:
        """The components as JSON can hold them, the vectors in float16."""
        halves = self.vectors.half().cpu().contiguous().view(torch.uint8)
        return {
            "shape": list(self.vectors.shape),
            "vectors": base64.b64encode(bytes(halves.flatten().tolist())).decode(),
            "variances": [float(f"{variance:.6g}") for variance in self.variances],
            "residual": float(f"{self.residual:.6g}"),
            "size": list(self.size),
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], image_shape: tuple[int, int, int]) -> "Components":
        """What `plain` gave, for images (C, H, W).

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is something else.
        """
        count, channels, *sides = map(int, values["shape"])
        size = tuple(map(int, values["size"]))
        lowest = [min(side, COMPONENT_SIDE) for side in image_shape[1:]]
        if [channels, *sides] != [image_shape[0], *lowest] or size != image_shape[1:] or not 1 <= count <= COMPONENTS:
            raise ValueError(f"the components have the shape {values['shape']!r:.60}")
        halves = torch.frombuffer(bytearray(base64.b64decode(values["vectors"], validate=True)), dtype=torch.float16)
        vectors = halves.float().reshape(count, channels, *sides)
        variances = torch.tensor([float(variance) for variance in values["variances"]], dtype=torch.float64)
        residual = float(values["residual"])
        positive = [*variances.tolist(), residual]
        if variances.shape != (count,) or not all(0 < each < math.inf for each in positive):
            raise ValueError("the components' variances must be positive, one per component")
        if not bool(vectors.isfinite().all()):
            raise ValueError("the components are not finite")
        return cls(vectors, variances, residual, (size[0], size[1]))


def principal_components(batches: Iterable[Tensor], flip: str = "none", rotate90: bool = False) -> Components:
    """The leading components of images, at most COMPONENTS of them.

    Args:
        batches: (B, C, H, W) each, at least three images in all; of each only the lowest frequencies are kept.
        flip: whether their mirror images count, too, as data.flip names it: none, horizontal or both.
        rotate90: whether they count turned by quarters, too; they are square then.
    """
    parts, size = [], (0, 0)
    for images in batches:
        size = images.shape[2], images.shape[3]
        rows, columns = (cast_like(dct_basis(side)[:COMPONENT_SIDE], images) for side in size)
        parts.append(rows @ images @ columns.mT)
    coefficients = torch.cat(_views(torch.cat(parts), flip, rotate90))
    flat = (coefficients - coefficients.mean(0)).flatten(1).cpu()
    total = float(flat.double().square().sum()) / len(flat)
    count = min(COMPONENTS, len(flat) - 1, flat.shape[1] - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, sizes, vectors = torch.svd_lowrank(flat, q=min(count + 16, *flat.shape), niter=4)
    variances = (sizes[:count].double().square() / len(flat)).clamp(min=MIN_VARIANCE)
    rest = (total - float(variances.sum())) / (flat.shape[1] - count)
    return Components(
        vectors[:, :count].mT.reshape(count, *coefficients.shape[1:]).contiguous().float(),
        variances, min(max(rest, MIN_VARIANCE), float(variances[-1])), size,
    )  # fmt: skip


def _views(coefficients: Tensor, flip: str, rotate90: bool) -> list[Tensor]:
    """The DCT coefficients (B, C, h, w) of images and of their mirrored and turned versions, all that a training draws.

    A mirror changes the sign of every odd frequency of its axis; a quarter turn is a transposition and a mirror.
    """
    signs = [torch.ones(side).to(coefficients) for side in coefficients.shape[-2:]]
    for each in signs:
        each[1::2] = -1
    upside_down, mirrored = signs[0][:, None], signs[1]
    views = [coefficients]
    if rotate90:
        turned = coefficients.mT
        views += [coefficients * upside_down * mirrored, turned * upside_down, turned * mirrored]
    if flip != "none":
        views += [view * mirrored for view in views]
    if flip == "both" and not rotate90:  # with quarter turns these are among them
        views += [view * upside_down for view in views]
    return views


class HighBandCorrection:
    """E[x_0 | x_t, z(x_0) = z(y)], from the network's E[x_0 | x_t].

    A network does not know y. What its low band is off, d = z(y) - z(x_0), says how far its high band is off: were x_0
    Gaussian with the covariance C of the images, the covariance given x_t would be G = (C^-1 + snr I)^-1, and the high
    band's regression on the low band

        x_0 <- x_0 + (I - phi) G Q (Q^T G Q)^-1 d

    (Kalman's update; the columns of Q are a basis of phi's space). Where d is improbable, because the reference is none
    of the training images' kind, the correction is shortened to what TRUST_RADIUS standard deviations would call for.

    Args:
        low_pass: phi_N, a projection.
        components: C.
    """

    def __init__(self, low_pass: LowPassFilter, components: Components) -> None:
        self._low_pass, self._components = low_pass, components
        vectors = components.vectors.cpu().double()
        rows, columns = (dct_basis(side)[:COMPONENT_SIDE] for side in low_pass.size)
        self._tables = {(torch.device("cpu"), torch.float64): (rows, columns, vectors.flatten(1))}
        self._gram, dimensions = [], []
        for factor in as_tuple(low_pass.factor):
            phi = LowPassFilter(low_pass.size, factor, low_pass.kernel, low_pass.orthogonal)
            seen = rows @ phi(rows.mT @ vectors @ columns) @ columns.mT
            self._gram.append(vectors.flatten(1) @ seen.flatten(1).mT)
            dimensions.append(vectors.shape[1] * math.prod(max(1, side // factor) for side in low_pass.size))
        self._dimensions = torch.tensor(dimensions)

    def __call__(
        self, difference: Tensor, lam: float, variance: Tensor | None = None, where: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The shifts of x_0's low band and high band, (B, C, H, W) each.

        Args:
            difference: (B, C, H, W) what the low band is off.
            lam: half-log-SNR of the level that x_0 was predicted at.
            variance: (B, 1, 1, 1) sigma^2 of the reference's own noise, if it has any. Then `difference` is the low
                band of y - sigma^2 sqrt(snr) eps - x_0, and Q^T G Q becomes (1 - sigma^2 snr) Q^T G Q + sigma^2 I: what
                the network took from x_t's low band is replaced by what y says.
            where: (B, 1, H, W) from 0 to 1, the part of the image in which the low band is given.
        """
        key = (difference.device, difference.dtype)
        if key not in self._tables:
            tables = self._tables[torch.device("cpu"), torch.float64]
            self._tables[key] = tuple(cast_like(table, difference) for table in tables)  # type: ignore[assignment]
        rows, columns, vectors = self._tables[key]
        snr, C = math.exp(2 * lam), self._components
        own = torch.zeros(1, 1) if variance is None else variance.reshape(-1, 1)
        own = own.cpu().double()
        along, rest = 1 / (1 / C.variances + snr), 1 / (1 / C.residual + snr)
        excess = (along - rest).clamp(min=1e-12 * rest)
        share = (1 - own * snr).clamp(min=1e-9)
        inner_rest = share * rest + own  # (B, 1) what the other directions of Q^T G Q have
        ratio = inner_rest / (share * excess)
        inverse = torch.linalg.inv(torch.diag_embed(ratio) + torch.stack(self._gram))
        seen = ((rows @ difference @ columns.mT).flatten(1) @ vectors.mT)[:, None]
        explained = (seen @ cast_like(inverse, difference))[:, 0]
        inner_rest = cast_like(inner_rest, difference)
        weights = explained / cast_like(share, difference)  # of the components in G Q (Q^T G Q)^-1 d
        square = difference.square().sum((1, 2, 3)) - (explained * seen[:, 0]).sum(1)
        given = where if isinstance(where, float) else where.mean((1, 2, 3)).clamp(min=1e-9)
        distance = (square.clamp(min=0) / (inner_rest[:, 0] * given * self._dimensions.to(difference))).sqrt()
        trust = (TRUST_RADIUS / distance).clamp(max=1).reshape(-1, 1, 1, 1)

        def image(weights: Tensor) -> tuple[Tensor, Tensor]:
            """A sum of components: its low band and its high band."""
            coefficients = (weights @ vectors).reshape(-1, *C.vectors.shape[1:])
            x = rows.mT @ coefficients @ columns
            low = self._low_pass(x)
            return low, x - low

        low, high = image(weights)
        if variance is None:
            return difference, trust * high
        unexplained = (difference - image(explained)[0]) / inner_rest.reshape(-1, 1, 1, 1)
        return rest * unexplained + low, trust * high
