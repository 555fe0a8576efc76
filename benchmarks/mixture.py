"""Samplers on a mixture of Gaussians, where the conditional has modes and ILVR's approximation shows.

    python -m benchmarks.mixture [--mixture six] [--samples 400] [--references 40] [--seed 1]

Images are lines of pixels. `six`: six components in 32 pixels, which share much of their low band, so that the mode is
decided early; `overlap64` and `overlap256`: eight components in 64 and 256 pixels (16 and 64 constrained dimensions at
N=4) whose low bands overlap, so that matched noise without a gain finds the mode; `mcgdiff8`, `mcgdiff80` and
`mcgdiff800`: a grid of 25 components (see `mcgdiff`). The exact denoiser and the exact conditional
p(x | phi(x) = phi(y)) are known, a mixture itself; the samplers' draws are compared with it by the weight that each
component gets (total variation) and by the sliced 2-Wasserstein distance in the band that the conditional leaves free,
over its variance. Means over references drawn from the data, with the standard error; both measures have a floor, which
the first row shows: as many exact draws of the conditional.
The presets `draft`, `fast` and `best` have the gain that
`metrics.calibration.choose_low_band` chooses for the exact denoiser on other draws of the data; the line before the
tables says which. Rows of several candidates make so many runs per draw and keep one by its evidence.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.diffusion.components import Components, principal_components
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_band import radial_spectrum
from ilvr_lightning.diffusion.low_pass import dct_basis, low_pass_matrix
from ilvr_lightning.diffusion.noise import Stream
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics.calibration import CALIBRATED_PRESETS, choose_low_band
from tests.support.gaussian import SCHEDULE, ancestral, solver


@dataclass(frozen=True)
class Mixture:
    """Means (K, n), one covariance (n, n) and weights (K,), equal unless given."""

    means: Tensor
    covariance: Tensor
    weights: Tensor | None = None

    @functools.cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the covariance, and its eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.clamp(min=0), vectors

    @property
    def log_weights(self) -> Tensor:
        """(K,) up to a constant."""
        return torch.zeros(len(self.means), dtype=torch.float64) if self.weights is None else self.weights.log()

    def responsibilities(self, x: Tensor, scale: float, noise: float) -> Tensor:
        """(B, K) posterior weights of the components given x = scale x_0 + noise n, x (B, n)."""
        return self._weights_of(x @ self.eigen[1], scale, noise)

    def _weights_of(self, coefficients: Tensor, scale: float, noise: float) -> Tensor:
        """The same for coefficients in the eigenvectors."""
        values, vectors = self.eigen
        variance = scale**2 * values + noise**2
        means = scale * self.means @ vectors
        # The squares of x are the same for all components.
        exponent = coefficients @ (means / variance).mT - 0.5 * (means.square() / variance).sum(1)
        return torch.softmax(exponent + self.log_weights, dim=1)

    def denoise(self, x: Tensor, t: Tensor) -> Prediction:
        """The exact E[x_0 | x_t], all of one t."""
        a = float(SCHEDULE.alphas_cumprod[t[0]])
        values, vectors = self.eigen
        coefficients = x.flatten(1).to(vectors) @ vectors
        mean = self._weights_of(coefficients, math.sqrt(a), math.sqrt(1 - a)) @ (self.means @ vectors)
        gain = math.sqrt(a) * values / (a * values + 1 - a)
        x0 = ((mean + gain * (coefficients - math.sqrt(a) * mean)) @ vectors.mT).reshape(x.shape)
        return Prediction(x0=x0, eps=(x - math.sqrt(a) * x0) / math.sqrt(1 - a))

    @property
    def schedule(self) -> NoiseSchedule:
        return SCHEDULE

    @functools.cached_property
    def training_images(self) -> Tensor:
        """(B, 1, 1, n) draws from which spectrum and components are computed."""
        images = self.draw(20_000, torch.Generator().manual_seed(5))
        return images.reshape(len(images), 1, 1, -1)

    @functools.cached_property
    def spectrum(self) -> tuple[float, ...]:
        """Variance of the images' DCT coefficients by radius."""
        return tuple(radial_spectrum(self.training_images))

    @functools.cached_property
    def components(self) -> Components:
        """The images' principal components."""
        return principal_components([self.training_images])

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        return self.denoise(x, t)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, n) images."""
        if self.weights is None:
            component = torch.randint(len(self.means), (count,), generator=generator)
        else:
            component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn((count, self.means.shape[1]), generator=generator, dtype=torch.float64)
        images: Tensor = self.means[component] + noise @ torch.linalg.cholesky(self.covariance).mT
        return images

    def conditional(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (K,), means (K, n) and covariance (n, n) of p(x | phi x = phi y), y (n,)."""
        u, sizes, _ = torch.linalg.svd(phi.mT)
        seen = u[:, sizes > 1e-9 * sizes[0]]
        C = self.covariance
        inner = seen.mT @ C @ seen
        gain = C @ seen @ torch.linalg.inv(inner)
        off = (y - self.means) @ seen
        exponent = -0.5 * (off * torch.linalg.solve(inner, off.mT).mT).sum(1)
        weights = torch.softmax(exponent + self.log_weights, dim=0)
        return weights, self.means + off @ gain.mT, C - gain @ seen.mT @ C


def six_components(length: int = 32) -> Mixture:
    """Means that share much of their low band, a covariance of 1/(1 + k)^2 in the DCT."""
    generator = torch.Generator().manual_seed(0)
    basis = dct_basis(length)
    k = torch.arange(length, dtype=torch.float64)
    low = 0.15 * torch.randn((6, length), generator=generator, dtype=torch.float64) * (k < 4)
    high = 0.5 * torch.randn((6, length), generator=generator, dtype=torch.float64) * ((k >= 4) & (k < 16))
    values = 1 / (1 + k) ** 2
    covariance = basis.mT @ torch.diag(0.02 * length * values / values.sum()) @ basis
    return Mixture((low + high) @ basis, covariance)


def overlapping(length: int) -> Mixture:
    """Eight components whose means differ by one standard deviation in the low band, and by more above it."""
    generator = torch.Generator().manual_seed(0)
    basis = dct_basis(length)
    k = torch.arange(length, dtype=torch.float64)
    deviation = 1 / (1 + k)
    deviation = 0.5 * deviation * math.sqrt(length) / deviation.norm()
    above = 3 * deviation * ((k >= length // 8) & (k < length // 2))
    means = torch.randn((8, length), generator=generator, dtype=torch.float64)
    means = means * (deviation * (k < length // 8) / math.sqrt(length // 8) + above)
    covariance = basis.mT @ torch.diag(deviation.square()) @ basis
    return Mixture(means @ basis, covariance)


def mcgdiff(length: int) -> Mixture:
    """The Gaussian mixture of Cardoso et al. 2024 (MCGDiff, arXiv 2308.07983, section 4 and the authors' code).

    25 components with unit covariance, means (8i, 8j, 8i, 8j ...) for i and j from -2 to 2, and squares of normal draws
    as weights. There a random matrix A measures it. What A sees without noise is a random subspace, so here the data
    are rotated at random and the low band is measured: length/N dimensions, and noise of the samplers is unchanged by a
    rotation. It differs from the published setting in the measurement's noise, which is none here.
    """
    generator = torch.Generator().manual_seed(0)
    grid = 8 * torch.arange(-2, 3, dtype=torch.float64)
    means = torch.cartesian_prod(grid, grid).repeat(1, length // 2)
    weights = torch.randn(len(means), generator=generator, dtype=torch.float64).square()
    rotation = torch.linalg.qr(torch.randn((length, length), generator=generator, dtype=torch.float64)).Q
    return Mixture(means @ rotation, torch.eye(length, dtype=torch.float64), weights / weights.sum())


MIXTURES: dict[str, Callable[[], Mixture]] = {
    "six": six_components,
    "overlap64": lambda: overlapping(64),
    "overlap256": lambda: overlapping(256),
    "mcgdiff8": lambda: mcgdiff(8),
    "mcgdiff80": lambda: mcgdiff(80),
    "mcgdiff800": lambda: mcgdiff(800),
}

CANDIDATES = (("draft", 4), ("draft", 8), ("fast", 4))
CALIBRATION_IMAGES = 400
"""Drawn for the calibration: an exact denoiser is cheap."""


@dataclass(frozen=True)
class BatchNoise:
    """One generator for all images, which is quicker than one each."""

    generator: torch.Generator
    dtype: torch.dtype | None = None
    """Of the noise; that of the images unless given."""

    def draw(self, stream: Stream, like: Tensor) -> Tensor:
        """Standard normal noise like an image batch."""
        return torch.randn(like.shape, generator=self.generator, dtype=self.dtype or like.dtype)


def sliced_w2(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean squared 2-Wasserstein distance of projections on directions (d, n); equally many samples."""
    return float(((a @ directions.mT).sort(0).values - (b @ directions.mT).sort(0).values).square().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--references", type=int, default=40)
    parser.add_argument("--mixture", choices=tuple(MIXTURES), default="six")
    parser.add_argument("--seed", type=int, default=1, help="of the references and of the noise")
    parser.add_argument("--factor", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="rows to make")
    args = parser.parse_args()
    rows: dict[str, SamplingPlan | None] = {
        "exact draws (the measures' floor)": None,
        "DDPM as released, 100": ancestral("ilvr_adm", 100),
        "DDPM as the paper, 10": ancestral("paper", 10),
        "DDPM as the paper, 100": ancestral("paper", 100),
        "DDPM as the paper, 1000": ancestral("paper", 1000),
        "2M, fixed, 10": solver(10, reference_noise="fixed"),
        "2M, matched, 10": solver(10),
        "2M, matched, kappa 0.75, 10": solver(10, eps_extrapolation=0.75),
        "2M, matched, eta 1, 10": solver(10, eta=1.0),
        "2M, matched, 20": solver(20),
        "2M, matched, kappa 0.75, 20": solver(20, eps_extrapolation=0.75),
        "2M, matched, eta 1, 20": solver(20, eta=1.0),
        "2M, matched, eta 1, kappa 0.75, 20": solver(20, eta=1.0, eps_extrapolation=0.75),
    }
    data = MIXTURES[args.mixture]()
    length = data.means.shape[1]
    rows |= presets(data, length)
    generator = torch.Generator().manual_seed(args.seed)
    references = data.draw(args.references, generator)
    for factor in args.factor:
        phi = low_pass_matrix(length, factor, orthogonal=True)
        print(f"\nN={factor}, {args.references} references, {args.samples} samples each")
        print("| sampler, evaluations | total variation of the components | sliced W2² / variance |\n|---|---|---|")
        for name, plan in rows.items():
            if not any(fnmatch(name, pattern) for pattern in args.only):
                continue
            figures = [
                measure(data, y, phi, plan, factor, args.samples, 1000 * args.seed + i)
                for i, y in enumerate(references)
            ]
            cells = []
            for values in zip(*figures, strict=True):
                error = statistics.stdev(values) / math.sqrt(len(values))
                cells.append(f"{statistics.mean(values):.3f} ±{error:.3f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def presets(data: Mixture, length: int, factor: int = 8) -> dict[str, SamplingPlan]:
    """The presets, with the gains that the calibration chooses for this denoiser; `best` has those of `fast`."""
    images = data.draw(CALIBRATION_IMAGES, torch.Generator().manual_seed(6)).reshape(-1, 1, 1, length)
    chosen: dict[str, SamplingPlan] = {}
    for name in CALIBRATED_PRESETS:
        plan = SamplingPlan.preset(name, clip=False, factor=factor)
        settings, better = choose_low_band(data, plan, images, range(2 * len(images)), batch=400)
        changes: dict[str, Any] = settings
        print(f"{name}: {' '.join(f'{k}={v:g}' for k, v in settings.items())} ({better})")
        chosen[name] = replace(plan, **changes)
    chosen["best"] = replace(chosen["fast"], num_steps=SamplingPlan.preset("best").num_steps)
    several = {f"{name}, {k} candidates": replace(chosen[name], candidates=k) for name, k in CANDIDATES}
    return {name: chosen[name] for name in ("draft", "fast", "best")} | several


Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Makes samples (B, n) from x_T (B, 1, 1, n) and a generator."""


def measure(
    data: Mixture, y: Tensor, phi: Tensor, plan: SamplingPlan | None, factor: int, count: int, seed: int
) -> tuple[float, float]:
    """Total variation of the component weights, and the sliced distance, for one reference."""

    def draw(x_T: Tensor, generator: torch.Generator) -> Tensor:
        assert plan is not None
        return generate(
            data, replace(plan, factor=factor), seeds=range(count), shape=(1, 1, len(y)),
            reference=y.reshape(1, 1, 1, -1), x_T=x_T if plan.candidates == 1 else None,
            noise=BatchNoise(generator, torch.float64),
        ).flatten(1)  # fmt: skip

    variation, distance, _ = compare(data, y, phi, None if plan is None else draw, count, seed)
    return variation, distance


def compare(
    data: Mixture, y: Tensor, phi: Tensor, draw: Draw | None, count: int, seed: int
) -> tuple[float, float, float]:
    """The same for what `draw` makes, or for exact draws; and the sliced distance in all directions, not squared."""
    generator = torch.Generator().manual_seed(seed)
    weights, means, covariance = data.conditional(y, phi)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()

    def exact() -> Tensor:
        component = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn((count, len(y)), generator=generator, dtype=torch.float64)
        images: Tensor = means[component] + noise @ root.mT
        return images

    truth = exact()
    if draw is None:
        x = exact()
    else:
        x = draw(torch.randn((count, 1, 1, len(y)), generator=generator, dtype=torch.float64), generator)
    share = data.responsibilities(x, 1.0, 0.0).mean(0)
    directions = torch.randn((64, len(y)), generator=generator, dtype=torch.float64)
    free = directions - directions @ phi.mT
    free, directions = (each / each.norm(dim=1, keepdim=True) for each in (free, directions))
    variance = float((truth @ free.mT).var(0).mean())
    variation = float(0.5 * (share - weights).abs().sum())
    return variation, sliced_w2(x, truth, free) / variance, math.sqrt(sliced_w2(x, truth, directions))


if __name__ == "__main__":
    main()
