"""Ground truth for samplers: Gaussian images, whose conditional given a reference's low band is known.

The data are N(0, C); the exact denoiser is linear, so every sampler is a linear map of x_T, the reference y and its
noise. The map is probed in float64 by running the real code on unit vectors; mean and covariance follow exactly,
nothing is drawn. W2 is the squared 2-Wasserstein distance from the true p(x | phi(x) = phi(y)), averaged over y ~ data
and divided by the conditional's variance; Frechet that of the samples' marginal from the data, divided by theirs.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.diffusion.components import COMPONENT_SIDE, COMPONENTS, MIN_VARIANCE, Components
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate_steps
from ilvr_lightning.diffusion.low_band import radial_spectrum
from ilvr_lightning.diffusion.low_pass import dct_basis, low_pass_matrix
from ilvr_lightning.diffusion.noise import Stream
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule, spaced_timesteps
from ilvr_lightning.metrics.bands import bures

SCHEDULE = NoiseSchedule.linear()


@dataclass(frozen=True)
class Gaussian:
    """Zero-mean Gaussian images: shape (H, W), covariance (HW, HW)."""

    shape: tuple[int, int]
    covariance: Tensor

    @functools.cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors, a column each."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.clamp(min=0), vectors

    @functools.cached_property
    def spectrum(self) -> tuple[float, ...]:
        """Variance of the images' DCT coefficients by radius."""
        values, vectors = self.eigen
        x = math.sqrt(len(values)) * (vectors * values.sqrt()).mT  # with the covariance of the images
        return tuple(radial_spectrum(torch.cat([x, -x]).reshape(-1, 1, *self.shape)))

    @functools.cached_property
    def components(self) -> Components:
        """The leading eigenvectors of the covariance at the lowest frequencies."""
        basis = torch.kron(*(dct_basis(side)[:COMPONENT_SIDE] for side in self.shape))
        values, vectors = torch.linalg.eigh(basis @ self.covariance @ basis.mT)
        count = min(COMPONENTS, len(values) - 1)
        sides = [min(side, COMPONENT_SIDE) for side in self.shape]
        rest = max(float(values[:-count].mean()), MIN_VARIANCE)
        leading = vectors[:, -count:].mT.reshape(count, 1, *sides)
        return Components(leading, values[-count:].clamp(min=rest), rest, self.shape)

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        return self.denoise(x, t)

    def denoise(self, x: Tensor, t: Tensor) -> Prediction:
        """E[x_0 | x_t] = sqrt(a) C (a C + (1 - a) I)^-1 x_t, all of one t."""
        a = SCHEDULE.alphas_cumprod[t[0]]
        values, vectors = self.eigen
        gain = a.sqrt() * values / (a * values + 1 - a)
        x0 = ((x.flatten(1) @ vectors) * gain @ vectors.mT).reshape(x.shape)
        return Prediction(x0=x0, eps=(x - a.sqrt() * x0) / (1 - a).sqrt())

    def conditional(self, phi: Tensor, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        """(K, S): x given phi y is N(K y, S), where phi (HW, HW) is the low-pass filter and y has noise sigma."""
        u, sizes, _ = torch.linalg.svd(phi.mT)
        seen = u[:, sizes > 1e-9 * sizes[0]]  # a basis of what phi sees
        C = self.covariance
        noise = sigma**2 * torch.eye(seen.shape[1], dtype=C.dtype)
        gain = C @ seen @ torch.linalg.inv(seen.mT @ C @ seen + noise)
        return gain @ seen.mT, C - gain @ seen.mT @ C


class Probes:
    """Noise for images that each get one unit vector in one drawing, after the first `start` images."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size
        self.drawn = 0

    def draw(self, stream: Stream, like: Tensor) -> Tensor:
        """Zero but for this drawing's block of images."""
        noise = torch.zeros_like(like)
        first = self.start + self.drawn * self.size
        noise.flatten(1)[first : first + self.size] = torch.eye(self.size, dtype=like.dtype)
        self.drawn += 1
        return noise


@dataclass(frozen=True)
class Linear:
    """x = of_x x_T + of_y y + noise of this covariance."""

    of_x: Tensor
    of_y: Tensor
    covariance: Tensor


def probe(data: Gaussian, plan: SamplingPlan, draws: int, first_step_alone: bool = False) -> Linear:
    """The linear map that a run (or its first step) is."""
    size = data.covariance.shape[0]
    count = (2 + draws) * size
    x_T, reference = (torch.zeros(count, 1, *data.shape, dtype=torch.float64) for _ in range(2))
    x_T.flatten(1)[:size] = torch.eye(size, dtype=torch.float64)
    reference.flatten(1)[size : 2 * size] = torch.eye(size, dtype=torch.float64)
    x = x_T
    for state in generate_steps(
        data, SCHEDULE, plan, seeds=range(count), shape=(1, *data.shape), reference=reference, x_T=x_T,
        noise=Probes(2 * size, size),
    ):  # fmt: skip
        x = state.x
        if first_step_alone:
            break
    columns = x.flatten(1).mT
    noise = columns[:, 2 * size :]
    return Linear(columns[:, :size], columns[:, size : 2 * size], noise @ noise.mT)


def run_map(data: Gaussian, plan: SamplingPlan) -> Linear:
    """The whole run's map; samplers without memory step by step, so that a thousand steps are no more work."""
    timesteps = list(plan.timesteps or spaced_timesteps(SCHEDULE, plan.evaluations, plan.spacing))
    memoryless = plan.sampler == "ddpm" and plan.reference_noise.startswith("fresh")
    if not memoryless:
        draws_reference = plan.reference_noise.startswith("fresh") or plan.reference_sigma != 0
        noisy = (plan.eta > 0 or plan.sampler == "ddpm") + draws_reference
        return probe(data, plan, noisy * len(timesteps))
    size = data.covariance.shape[0]
    eye, zero = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    total = Linear(eye, zero, zero)
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
        step = replace(plan, timesteps=(t, s) if s else (t,))
        one = probe(data, step, 2, first_step_alone=True)
        total = Linear(
            one.of_x @ total.of_x,
            one.of_x @ total.of_y + one.of_y,
            one.of_x @ total.covariance @ one.of_x.mT + one.covariance,
        )
    return total


def errors(data: Gaussian, plan: SamplingPlan) -> tuple[float, float]:
    """(W2, Frechet) of a plan."""
    height, width = data.shape
    assert isinstance(plan.factor, int) and isinstance(plan.reference_sigma, float)
    phi = torch.kron(*(low_pass_matrix(side, plan.factor, plan.kernel, plan.orthogonal) for side in (height, width)))
    gain, true = data.conditional(phi, plan.reference_sigma)
    made = run_map(data, plan)
    covariance = made.of_x @ made.of_x.mT + made.covariance
    off = made.of_y - gain
    C = data.covariance
    of_reference = C + plan.reference_sigma**2 * torch.eye(len(C), dtype=C.dtype)
    w2 = (float((off @ of_reference @ off.mT).trace()) + bures(covariance, true)) / float(true.trace())
    frechet = bures(made.of_y @ of_reference @ made.of_y.mT + covariance, C) / float(C.trace())
    return w2, frechet


def _normalised(covariance: Tensor) -> Tensor:
    """With a mean variance of 0.25."""
    return covariance * (0.25 * len(covariance) / covariance.trace())


def spectrum_1d(length: int = 64, power: float = 2.0) -> Gaussian:
    """Diagonal in the DCT: eigenvalues 1 / (1 + k)^power."""
    basis = dct_basis(length)
    values = 1 / (1 + torch.arange(length, dtype=torch.float64)) ** power
    return Gaussian((1, length), _normalised(basis.mT @ torch.diag(values) @ basis))


def spectrum_2d(side: int = 16, power: float = 2.0) -> Gaussian:
    """The same in two dimensions: 1 / (1 + |k|)^power."""
    basis = torch.kron(dct_basis(side), dct_basis(side))
    k = torch.arange(side, dtype=torch.float64)
    values = 1 / (1 + (k[:, None] ** 2 + k[None] ** 2).sqrt().flatten()) ** power
    return Gaussian((side, side), _normalised(basis.mT @ torch.diag(values) @ basis))


def modulated_ar1(length: int = 64, correlation: float = 0.95) -> Gaussian:
    """AR(1) whose amplitude rises and falls along the line: no filter diagonalises it."""
    i = torch.arange(length, dtype=torch.float64)
    amplitude = 1 + 0.7 * torch.sin(2 * math.pi * 1.5 * i / length)
    ar1 = correlation ** (i[:, None] - i[None]).abs()
    return Gaussian((1, length), _normalised(amplitude[:, None] * ar1 * amplitude[None]))


def nonstationary_2d(side: int = 16) -> Gaussian:
    """Smooth on the left, rough on the right, brighter in the middle."""
    i = torch.arange(side, dtype=torch.float64)
    y, x = (grid.flatten() for grid in torch.meshgrid(i, i, indexing="ij"))
    length = 1.5 + 3 * (side - x) / side  # Gibbs 1997: a correlation length that changes over the field
    squares = length[:, None] ** 2 + length[None] ** 2
    distance = ((x[:, None] - x[None]) ** 2 + (y[:, None] - y[None]) ** 2).sqrt()
    correlation = 2 * length[:, None] * length[None] / squares * torch.exp(-distance / (squares / 2).sqrt())
    amplitude = 0.5 + torch.exp(-((y - side / 2) ** 2 + (x - side / 2) ** 2) / side)
    return Gaussian((side, side), _normalised(amplitude[:, None] * correlation * amplitude[None]))


def solver(num_steps: int, **changes: Any) -> SamplingPlan:
    """DPM-Solver++(2M), log-SNR spacing, orthogonal filter, matched noise, deterministic; or what changes say."""
    return SamplingPlan.preset("fast", **{"num_steps": num_steps, "eta": 0.0, "clip": False, **changes})


def ancestral(preset: str, num_steps: int, variance: str = "small") -> SamplingPlan:
    """DDPM by a preset, in so many uniform steps."""
    return SamplingPlan.preset(preset, num_steps=num_steps, clip=False, variance=variance)


Figures = tuple[float | None, ...]
KAPPA = {"eps_extrapolation": 0.75}
DDIM: dict[str, Any] = {"sampler": "ddim"}
IDEAL: dict[str, Any] = {"kernel": "ideal"}

TABLE: dict[str, tuple[SamplingPlan, Figures]] = {
    "DDPM 1000, as released": (ancestral("ilvr_adm", 1000), (0.010, 0.004, 9.0e-5, 1.3e-4)),
    "DDPM 1000, as the paper": (ancestral("paper", 1000), (0.004, 0.003, 9.0e-5, 1.3e-4)),
    "the same, large variance": (ancestral("paper", 1000, "large"), (0.003, 0.002, 5.1e-5, 8.2e-5)),
    "DDPM 100 uniform, as released": (ancestral("ilvr_adm", 100), (0.108, 0.040, 1.2e-3, 1.6e-3)),
    "DDPM 100 uniform, as the paper": (ancestral("paper", 100), (0.045, 0.026, 1.2e-3, 1.6e-3)),
    "DDPM 20 uniform, as released": (ancestral("ilvr_adm", 20), (1.21, 0.40, 8.0e-3, 1.1e-2)),
    "DDPM 20 uniform, as the paper": (ancestral("paper", 20), (0.278, 0.176, 7.7e-3, 1.1e-2)),
    "DDIM 100 uniform": (solver(100, spacing="uniform", **DDIM), (0.014, 0.007, 3.9e-4, 4.7e-4)),
    "DDIM 100 log-SNR": (solver(100, **DDIM), (0.0009, 0.0008, 2.6e-5, 4.8e-5)),
    "2M 20 uniform": (solver(20, spacing="uniform"), (0.034, 0.059, 9.4e-4, 3.7e-3)),
    "2M 10 log-SNR": (solver(10), (0.0025, 0.0022, 4.8e-5, 9.9e-5)),
    "2M 20 log-SNR": (solver(20), (0.0014, 0.0011, 2.6e-5, 4.9e-5)),
    "2M 50 quadratic": (solver(50, spacing="quadratic"), (0.0002, 0.0003, 4.2e-6, 1.2e-5)),
    "2M 20 log-SNR, bicubic": (solver(20, orthogonal=False), (0.0026, None, None, None)),
    "2M 20 log-SNR, fixed": (solver(20, reference_noise="fixed"), (0.0058, 0.0043, 1.1e-4, 1.9e-4)),
    "2M 10 log-SNR, ideal": (solver(10, **IDEAL), (0.0003, 0.0005, 7.9e-6, 2.9e-5)),
    "2M 20 log-SNR, ideal": (solver(20, **IDEAL), (0.0001, 0.0002, 3.3e-6, 1.1e-5)),
    "2M 10 log-SNR, ideal, fixed": (solver(10, reference_noise="fixed", **IDEAL), (0.0003, 0.0005, 7.9e-6, 2.9e-5)),
    "2M 5 log-SNR": (solver(5), (0.0488, 0.0524, None, None)),
    "2M 8 log-SNR": (solver(8), (0.0043, 0.0030, None, None)),
    "2M 8 log-SNR, kappa 0.75": (solver(8, **KAPPA), (0.0031, 0.0021, None, None)),
    "2M 10 log-SNR, kappa 0.75": (solver(10, **KAPPA), (0.0011, 0.0012, None, None)),
    "2M 20 log-SNR, kappa 0.75": (solver(20, **KAPPA), (0.0003, 0.0003, None, None)),
}
"""Known rows in one dimension: W2 at N=4 and 8, Frechet at N=4 and 8. Its bicubic row is the shift; ours, the
replacement after the step, is given in its text."""

TABLE_2D: dict[str, tuple[SamplingPlan, Figures]] = {
    "2M 10 log-SNR": (solver(10), (0.0015, 0.0010)),
    "2M 20 log-SNR": (solver(20), (0.0006, 0.0002)),
}


def with_factor(plan: SamplingPlan, factor: int) -> SamplingPlan:
    """The plan at another N."""
    return replace(plan, factor=factor)


def agrees(figure: float, printed: float) -> bool:
    """Within 3%, or half a unit of the last digit printed."""
    digits = repr(printed).rstrip("0")
    unit = 10.0 ** int(digits.partition("e")[2]) if "e" in digits else 10.0 ** -len(digits.partition(".")[2])
    if "e" in digits:
        unit *= 10.0 ** -len(digits.partition("e")[0].partition(".")[2])
    return abs(figure - printed) <= max(0.03 * printed, 0.5 * unit * (1 + 1e-9))
