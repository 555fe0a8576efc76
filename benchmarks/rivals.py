"""Rivals of ILVR for the constraint phi(x) = phi(y), in one table with ours.

    python -m benchmarks.rivals [--data gaussian six overlap64 overlap256 mcgdiff8 mcgdiff80 mcgdiff800 toon64]
        [--samples 200] [--references 24] [--factor 4 8] [--only GLOB ...]

One table per data set, sorted by cost: evaluations of the network for one sample, where a product with its Jacobian
counts two (one backward pass) beside the evaluation, and those of all particles count. All rows have the same
references, seeds and x_T. Lower is better.

- gaussian: lines of 64 pixels (tests/support/gaussian.py), W2² from the exact conditional over its variance, by Monte
  Carlo: squared error of the mean given y, and Bures' distance of the covariance, pooled over the references;
- the mixtures of benchmarks/mixture.py: total variation of the components' weights, and sliced W2² of the high band
  over its variance, with standard errors; for mcgdiff sliced W2 in all directions, in the data's units, in its place;
- toon64: a trained network (--ckpt, --ref), two samples for each held-out image: energy score of the high band, its
  Frechet distance, its energy, RMS error of the low band.

The low-band error is RMS, in pixels. Exact denoisers compute in float64. The first row is the measures' floor. A rival
is a function of a Problem and an entry in RIVALS.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.mixture import MIXTURES, BatchNoise, Draw, Mixture, compare, presets
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.components import HighBandCorrection
from ilvr_lightning.diffusion.denoiser import Denoise, Prediction, clip_prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_band import LowBand, radial_spectrum
from ilvr_lightning.diffusion.low_pass import LowPassFilter, dct_basis, low_pass_matrix
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule, spaced_timesteps
from ilvr_lightning.metrics.bands import bures, energy_scores, measure
from tests.support.gaussian import SCHEDULE, Gaussian, ancestral, spectrum_1d

Transpose = Callable[[Tensor], Tensor]
"""v -> J^T v, with J the Jacobian of x_0 as a function of x_t."""


@dataclass(frozen=True)
class Prior:
    """A covariance of the data that two orthonormal bases diagonalise, along the rows and along the columns."""

    rows: Tensor
    """(H, H), a vector per row."""
    columns: Tensor
    """(W, W), a vector per row."""
    values: Tensor
    """(H, W) variances."""

    def posterior(self, x: Tensor, snr: float) -> Tensor:
        """(C^-1 + snr)^-1 x for images (B, C, H, W)."""
        rows, columns = self.rows.to(x), self.columns.to(x)
        gain = (self.values / (1 + snr * self.values)).to(x)
        result: Tensor = rows.mT @ (gain * (rows @ x @ columns.mT)) @ columns
        return result


@dataclass
class Problem:
    """What a rival is given: B samples are to have z(x) = z(y). It counts what the rival spends."""

    network: Denoise
    schedule: NoiseSchedule
    y: Tensor
    """(B, C, H, W), one reference for each sample."""
    factor: int
    prior: Prior
    x_T: Tensor  # noqa: N815 - the field's name
    """(B, C, H, W)."""
    generator: torch.Generator
    clip: bool = False
    spent: int = 0

    @functools.cached_property
    def band(self) -> LowBand:
        """z."""
        return low_band(self.y.shape[2], self.y.shape[3], self.factor)

    @property
    def cost(self) -> float:
        """Evaluations for each sample."""
        return self.spent / len(self.y)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """What ILVR's gain takes from the network."""
        return tuple(getattr(self.network, "spectrum", ()))

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """The network for `generate`, one evaluation."""
        self.spent += len(x)
        return self.network(x, t)

    def at(self, t: int) -> float:
        """The cumulative product of alphas."""
        return float(self.schedule.alphas_cumprod[t])

    def timesteps(self, count: int, spacing: str) -> list[int]:
        """So many, descending to 1."""
        return spaced_timesteps(self.schedule, count, spacing)

    def steps(self, count: int, spacing: str) -> Iterator[tuple[int, int, float, float]]:
        """t, s < t, and the cumulative products of alphas at both."""
        for t, s in pairwise([*self.timesteps(count, spacing), 0]):
            yield t, s, self.at(t), self.at(s)

    def predict(self, x: Tensor, t: int) -> Prediction:
        """One evaluation."""
        with torch.no_grad():
            return self._evaluated(x, t)

    def linearised(self, x: Tensor, t: int) -> tuple[Prediction, Transpose]:
        """One evaluation, and products with its Jacobian's transpose, each of which counts two."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            kept = self._evaluated(x, t)

        def transpose(v: Tensor) -> Tensor:
            self.spent += 2 * len(x)
            return torch.autograd.grad(kept.x0, x, v, retain_graph=True)[0]

        return Prediction(x0=kept.x0.detach(), eps=kept.eps.detach()), transpose

    def _evaluated(self, x: Tensor, t: int) -> Prediction:
        prediction = self(x, torch.full((len(x),), t))
        return clip_prediction(prediction, x, t, self.schedule) if self.clip else prediction

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    def off(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z(y - x)."""
        return self.band.coordinates((self.y if y is None else y) - x)

    def projected(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x with the low band of y."""
        return x + self.band.pixels(self.off(x, y))

    def spread(self, a: float) -> tuple[Tensor, Tensor]:
        """G Q (m, 1, H, W) and the diagonal of Q^T G Q (n_h, n_w), with G = (C^-1 + snr)^-1 and Q the basis of z."""
        shape = self.band.coordinates(self.y[:1, :1]).shape[2:]
        units = torch.eye(shape.numel()).to(self.y).reshape(-1, 1, *shape)
        columns = self.prior.posterior(self.band.pixels(units), a / (1 - a))
        return columns, self.band.coordinates(columns).flatten(1).diagonal().reshape(shape)

    def corrected(self, x0: Tensor, a: float) -> Tensor:
        """x_0 + G Q (Q^T G Q)^-1 z(y - x_0): the correction of the low band, and what it says of the high one."""
        columns, _ = self.spread(a)
        system = self.band.coordinates(columns).flatten(1)
        v: Tensor = torch.linalg.solve(system, self.off(x0).flatten(2).mT).mT
        return x0 + (v @ columns.flatten(1)).reshape(x0.shape)

    @functools.cached_property
    def by_components(self) -> HighBandCorrection:
        """What the training images' principal components say of the high band, as our presets take it."""
        low_pass = LowPassFilter((self.y.shape[2], self.y.shape[3]), self.factor, orthogonal=True)
        return HighBandCorrection(low_pass, self.network.components)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=8)
def low_band(height: int, width: int, factor: int) -> LowBand:
    """Built once for each shape and factor."""
    return LowBand((height, width), factor)


def step(p: Problem, x: Tensor, x0: Tensor, t: int, s: int, eta: float = 1.0) -> Tensor:
    """DDIM from t to s (Song et al. 2021, equations 12 and 16); eta 1 is DDPM with the posterior's variance."""
    mean, sigma = step_mean(p, x, x0, t, s, eta)
    return mean + sigma * p.noise(x) if sigma > 0 else mean


def step_mean(p: Problem, x: Tensor, x0: Tensor, t: int, s: int, eta: float = 1.0) -> tuple[Tensor, float]:
    """Mean and standard deviation of that step."""
    a_t, a_s = p.at(t), p.at(s)
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    eps = (x - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
    return math.sqrt(a_s) * x0 + math.sqrt(max(0.0, 1 - a_s - sigma**2)) * eps, sigma


def travels(timesteps: Sequence[int], length: int, repeats: int) -> Iterator[tuple[int, int]]:
    """Steps (t, s) down to 0, which go back up by `length` levels from every `length`-th (Lugmayr et al. 2022)."""
    levels, last = [*timesteps, 0], len(timesteps) - 1
    left = {last - j: repeats - 1 for j in range(0, last + 1 - length, length)}
    i = 0
    while i <= last:
        yield levels[i], levels[i + 1]
        i += 1
        if left.get(i, 0) > 0:
            left[i] -= 1
            yield levels[i], levels[i - length]
            i -= length


def renoised(p: Problem, x: Tensor, s: int, t: int) -> Tensor:
    """A draw from q(x_t | x_s), t > s."""
    ratio = p.at(t) / p.at(s)
    return math.sqrt(ratio) * x + math.sqrt(1 - ratio) * p.noise(x)


def ilvr(p: Problem, plan: SamplingPlan) -> Tensor:
    """Ours, and the paper's (Choi et al. 2021)."""

    class Counted:
        spectrum, components = p.spectrum, getattr(p.network, "components", None)

        def __call__(self, x: Tensor, t: Tensor) -> Prediction:
            return p(x, t)

    _, channels, height, width = p.y.shape
    return generate(
        Counted(), p.schedule, replace(plan, factor=p.factor), seeds=range(len(p.y)), shape=(channels, height, width),
        reference=p.y, x_T=p.x_T, noise=BatchNoise(p.generator),
    )  # fmt: skip


def ddnm(
    p: Problem, steps: int, eta: float = 0.85, length: int = 1, repeats: int = 1, spacing: str = "uniform"
) -> Tensor:
    """DDNM (Wang et al. 2023, arXiv 2212.00490, equation 13), with time travel (algorithm 2) if repeats > 1.

    x_0 <- A^+ y + (I - A^+ A) x_0;   x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) (eta n + sqrt(1 - eta^2) eps)

    with the network's own eps, and eta 0.85 as in the authors' code.
    """
    x = p.x_T
    for t, s in travels(p.timesteps(steps, spacing), length, repeats):
        if s > t:
            x = renoised(p, x, t, s)
            continue
        prediction, a_s = p.predict(x, t), p.at(s)
        mixed = eta * p.noise(x) + math.sqrt(1 - eta**2) * prediction.eps
        x = math.sqrt(a_s) * p.projected(prediction.x0) + math.sqrt(1 - a_s) * mixed
    return x


def repaint(p: Problem, steps: int, length: int = 10, repeats: int = 10, spacing: str = "uniform") -> Tensor:
    """RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1), the low band in place of the known pixels.

    x_s is a DDPM step whose low band becomes that of sqrt(a_s) y + sqrt(1 - a_s) n; then jumps back by q(x_t | x_s).
    Without jumps this is the paper's ILVR with an orthogonal filter.
    """
    x = p.x_T
    for t, s in travels(p.timesteps(steps, spacing), length, repeats):
        if s > t:
            x = renoised(p, x, t, s)
            continue
        x = step(p, x, p.predict(x, t).x0, t, s)
        x = p.projected(x, p.schedule.q_sample(p.y, s, p.noise(x)))
    return x


def pigdm(p: Problem, steps: int, eta: float = 1.0, spacing: str = "uniform") -> Tensor:
    """PiGDM (Song et al. 2023, ICLR, algorithm 1, without measurement noise).

    x_s = DDIM(x_0) + sqrt(a_s a_t) J^T A^+ (y - A x_0), the coefficient of the author's code (NVlabs/RED-diff).
    """
    x = p.x_T
    for t, s, a_t, a_s in p.steps(steps, spacing):
        prediction, transpose = p.linearised(x, t)
        guidance = transpose(p.band.pixels(p.off(prediction.x0)))
        x = step(p, x, prediction.x0, t, s, eta) + math.sqrt(a_s * a_t) * guidance
    return x


def dps(p: Problem, steps: int, zeta: float = 1.0, spacing: str = "uniform") -> Tensor:
    """DPS (Chung et al. 2023, arXiv 2209.14687, algorithm 1, with the step zeta / |y - A x_0| of its section 3).

    x_s = DDPM(x_0) - zeta grad |y - A x_0|, the gradient by x_t.
    """
    x = p.x_T
    for t, s, _, _ in p.steps(steps, spacing):
        prediction, transpose = p.linearised(x, t)
        d = p.off(prediction.x0)
        norm = d.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
        x = step(p, x, prediction.x0, t, s) + zeta * transpose(p.band.pixels(d / norm))
    return x


def mmps(p: Problem, steps: int, iterations: int = 1, eta: float = 1.0, spacing: str = "logsnr") -> Tensor:
    """MMPS (Rozet et al. 2024, arXiv 2405.13712, section 4; azula), with a few iterations of conjugate gradients.

    x_0 <- x_0 + V A^T (S + A V A^T)^-1 (y - A x_0),   V = (1 - a_t) / sqrt(a_t) J^T, the covariance of x_0 given x_t

    with next to no measurement noise S, then DDIM.
    """
    x = p.x_T
    for t, s, a_t, _ in p.steps(steps, spacing):
        prediction, transpose = p.linearised(x, t)
        scale = (1 - a_t) / math.sqrt(a_t)
        covariance = _covariance(p, transpose, scale)
        v = conjugate_gradients(covariance, p.off(prediction.x0), iterations)
        x = step(p, x, prediction.x0 + scale * transpose(p.band.pixels(v)), t, s, eta)
    return x


def _covariance(p: Problem, transpose: Transpose, scale: float) -> Transpose:
    return lambda v: scale * p.band.coordinates(transpose(p.band.pixels(v))) + MEASUREMENT_VARIANCE * v


MEASUREMENT_VARIANCE = 1e-6
"""Of MMPS, which divides by the posterior's variance."""


def conjugate_gradients(apply: Transpose, b: Tensor, iterations: int) -> Tensor:
    """So many iterations for M x = b from 0, each image (B, ...) by itself."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, 1, 1, 1)

    x, rest, direction = torch.zeros_like(b), b, b
    for _ in range(iterations):
        image, size = apply(direction), dot(rest, rest)
        curvature = dot(direction, image)
        # A network's Jacobian may be no covariance: such an image stops here.
        length = torch.where(curvature > 0, size / curvature, 0.0)
        x, rest = x + length * direction, rest - length * image
        direction = rest + dot(rest, rest) / size.clamp(min=1e-30) * direction
    return x


def jfps(p: Problem, steps: int, eta: float = 1.0, spacing: str = "logsnr", principal: bool = False) -> Tensor:
    """Jacobian-free posterior sampling (azula 0.11, guidance/jfps.py), the linear system solved exactly.

    x_0 <- x_0 + G A^T (A G A^T)^-1 (y - A x_0),   G = (C^-1 + snr)^-1, with C the data's covariance

    then DDIM. For Gaussian data this is the exact E[x_0 | x_t, y]. `principal`: C from the network's principal
    components in place of the prior.
    """
    x = p.x_T
    for t, s, a_t, _ in p.steps(steps, spacing):
        x0 = p.predict(x, t).x0
        if principal:
            difference = p.band.pixels(p.off(x0))
            x0 = x0 + difference + p.by_components(difference, math.log(a_t / (1 - a_t)) / 2)[1]
        else:
            x0 = p.corrected(x0, a_t)
        x = step(p, x, x0, t, s, eta)
    return x


def soft_ilvr(p: Problem, steps: int, weight: float = 1.0, spacing: str = "uniform") -> Tensor:
    """deepinv's ILVRDataFidelity (deepinv 0.5, sampling/noisy_datafidelity.py), its drift in a DDPM step.

    With u = x_t / sqrt(a_t) and sigma^2 = (1 - a_t) / a_t the score gets weight A^+ (y + sigma n - A u) / sigma^2, so

        x_0 <- x_0 + weight A^+ (y + sigma n - A u)

    deepinv integrates the SDE by Euler's method, which is a DDPM step up to higher order.
    """
    x = p.x_T
    for t, s, a_t, _ in p.steps(steps, spacing):
        noised = p.y + math.sqrt((1 - a_t) / a_t) * p.noise(x)
        shift = p.band.pixels(p.off(x / math.sqrt(a_t), noised))
        x = step(p, x, p.predict(x, t).x0 + weight * shift, t, s)
    return x


def sdedit(p: Problem, steps: int, start: float = 0.5, spacing: str = "uniform") -> Tensor:
    """SDEdit (Meng et al. 2022, arXiv 2108.01073, algorithm 1): q(x_t | phi(y)) at t = start T, then DDPM.

    The guide is phi(y), since y would tell the high band that is to be drawn.
    """
    first = round(start * p.schedule.num_timesteps)
    x = p.schedule.q_sample(p.band.pixels(p.band.coordinates(p.y)), first, p.x_T)
    for t, s in pairwise([*spaced_timesteps(p.schedule, steps, spacing, first), 0]):
        x = step(p, x, p.predict(x, t).x0, t, s)
    return x


def resampled(p: Problem, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic resampling of the groups whose effective number of particles is below half.

    Args:
        p: the problem, which has the generator.
        log_w: (B, K) logarithms of the weights.

    Returns:
        Indices (B K,) into the particles, and the new logarithms.
    """
    count = log_w.shape[1]
    w = torch.softmax(log_w, dim=1)
    few = 1 / w.square().sum(1) < count / 2
    start = torch.rand((len(w), 1), generator=p.generator, dtype=w.dtype)
    points = (start + torch.arange(count, dtype=w.dtype)) / count
    index = torch.searchsorted(w.cumsum(1), points).clamp(max=count - 1)
    index = torch.where(few[:, None], index, torch.arange(count))
    flat = (index + count * torch.arange(len(w))[:, None]).flatten()
    return flat, torch.where(few[:, None], torch.zeros_like(log_w), log_w)


def chosen(p: Problem, x: Tensor, log_w: Tensor) -> Tensor:
    """One particle of each group, by its weight."""
    index = torch.multinomial(torch.softmax(log_w, dim=1), 1, generator=p.generator).squeeze(1)
    return x[index + log_w.shape[1] * torch.arange(len(log_w))]


def tds(
    p: Problem, steps: int, particles: int, jacobian: bool = True, informed: bool = True, spacing: str = "logsnr"
) -> Tensor:
    """TDS, the twisted diffusion sampler (Wu et al. 2023, arXiv 2306.17775, algorithm 1).

    The twist p~(y | x_t) = N(z(y); z(x_0), v) guides the DDPM step by its score, x_0 + (1 - a_t)/sqrt(a_t) grad log p~,
    and weights: w <- w p(x_s | x_t) p~(y | x_s) / (p~(x_s | x_t, y) p~(y | x_t)). v is the variance of z(x_0) given
    x_t: 1 / (1/C + snr) with C the data's (informed), or 1 - a_t, as for data of unit variance. The last step projects.
    Without a Jacobian the step is guided by the projection of x_0, which costs one evaluation.
    """
    y = p.y.repeat_interleave(particles, 0)
    x, log_w = p.noise(y), torch.zeros(len(p.y), particles, dtype=p.y.dtype)
    before = torch.zeros_like(log_w)
    for t, s, a_t, _ in p.steps(steps, spacing):
        variance = p.spread(a_t)[1] if informed else torch.full_like(before[0, 0], 1 - a_t)
        guided = jacobian and s > 0
        prediction, transpose = p.linearised(x, t) if guided else (p.predict(x, t), None)
        x0, d = prediction.x0, p.off(prediction.x0, y)
        shift = p.band.pixels(d)
        if transpose is not None:
            shift = (1 - a_t) / math.sqrt(a_t) * transpose(p.band.pixels(d / variance))
        twist = -0.5 * (d.square() / variance).flatten(1).sum(1).reshape(log_w.shape)
        index, log_w = resampled(p, log_w + twist - before)
        x, x0, shift, before = x[index], x0[index], shift[index], twist.flatten()[index].reshape(log_w.shape)
        if s == 0:
            return chosen(p, x0 + shift, log_w)
        mean, sigma = step_mean(p, x, x0 + shift, t, s)
        plain, _ = step_mean(p, x, x0, t, s)
        x = mean + sigma * p.noise(x)
        ratio = (x - mean).square() - (x - plain).square()
        log_w = log_w + ratio.flatten(1).sum(1).reshape(log_w.shape) / (2 * sigma**2)
    raise AssertionError("the last step goes to 0")


def smcdiff(p: Problem, steps: int, particles: int, spacing: str = "logsnr") -> Tensor:
    """SMCDiff (Trippe et al. 2023, arXiv 2206.04119, algorithm 2), the low band in place of the motif.

    A path of y is drawn forwards, y_t ~ q(y_t | y_s). Particles take its low band at each level; their weights are
    N(z(y_s); z(mean of the DDPM step), its variance). The last step, which has none, is not weighted.
    """
    levels = [*p.timesteps(steps, spacing), 0]
    path = {0: p.y}
    for s, t in pairwise(reversed(levels)):
        path[t] = renoised(p, path[s], s, t)
    known = {t: each.repeat_interleave(particles, 0) for t, each in path.items()}
    x, log_w = p.noise(known[0]), torch.zeros(len(p.y), particles, dtype=p.y.dtype)
    for t, s in pairwise(levels):
        x = p.projected(x, known[t])
        mean, sigma = step_mean(p, x, p.predict(x, t).x0, t, s)
        if s > 0:
            off = p.off(mean, known[s]).square().flatten(1).sum(1).reshape(log_w.shape)
            index, log_w = resampled(p, log_w - off / (2 * sigma**2))
            x = mean[index] + sigma * p.noise(mean)
        else:
            x = mean
    return chosen(p, p.projected(x, known[0]), log_w)


Rival = Callable[[Problem], Tensor]
"""Makes B samples, of y's shape."""
RIVALS: dict[str, Rival] = {
    "SDEdit from T/2, 20 steps": partial(sdedit, steps=20),
    "DDNM, 20 steps": partial(ddnm, steps=20),
    "DDNM, 20 steps, log-SNR": partial(ddnm, steps=20, spacing="logsnr"),
    "DDNM, 100 steps": partial(ddnm, steps=100),
    "DDNM, 30 steps, time travel by 10, 10 times": partial(ddnm, steps=30, length=10, repeats=10),
    "RePaint, 30 steps, jumps of 10, 10 times": partial(repaint, steps=30),
    "JFPS, 20 steps": partial(jfps, steps=20),
    "JFPS, 100 steps": partial(jfps, steps=100),
    "soft ILVR, 100 steps": partial(soft_ilvr, steps=100),
    "PiGDM, 10 steps": partial(pigdm, steps=10),
    "PiGDM, 100 steps": partial(pigdm, steps=100),
    "DPS, zeta 0.3, 100 steps": partial(dps, steps=100, zeta=0.3),
    "DPS, zeta 1, 100 steps": partial(dps, steps=100, zeta=1.0),
    "DPS, zeta 3, 100 steps": partial(dps, steps=100, zeta=3.0),
    "MMPS, 1 iteration, 20 steps": partial(mmps, steps=20, iterations=1),
    "MMPS, 3 iterations, 20 steps": partial(mmps, steps=20, iterations=3),
    "TDS, 4 particles, 20 steps": partial(tds, steps=20, particles=4),
    "TDS, 4 particles, twist of unit variance": partial(tds, steps=20, particles=4, informed=False),
    "TDS, 8 particles, 20 steps": partial(tds, steps=20, particles=8),
    "TDS without Jacobian, 4 particles, 20 steps": partial(tds, steps=20, particles=4, jacobian=False),
    "TDS without Jacobian, 8 particles, 20 steps": partial(tds, steps=20, particles=8, jacobian=False),
    "SMCDiff, 4 particles, 20 steps": partial(smcdiff, steps=20, particles=4),
    "SMCDiff, 16 particles, 20 steps": partial(smcdiff, steps=20, particles=16),
}
"""To add a rival, write a function of a Problem and enter it here with its settings."""


def gaussian() -> Mixture:
    """The lines of tests/support/gaussian.py, a mixture of one."""
    covariance = spectrum_1d().covariance
    return Mixture(torch.zeros(1, len(covariance), dtype=torch.float64), covariance)


DATA: dict[str, Callable[[], Mixture]] = {"gaussian": gaussian, **MIXTURES}
"""Data sets with an exact denoiser."""
TRAINED = "toon64"


@dataclass
class Line:
    """A row of a table."""

    name: str
    cost: float
    cells: list[str]


class Exact:
    """A data set with an exact denoiser: its references, and what is measured on them."""

    def __init__(self, name: str, samples: int, references: int, factors: Sequence[int], seed: int) -> None:
        self.name, self.samples, self.seed = name, samples, seed
        self.data = DATA[name]()
        self.length = self.data.means.shape[1]
        grid = name.startswith("mcgdiff")
        self.factors = [self.length // n for n in (1, 2, 4)] if grid else list(factors)
        self.references = self.data.draw(references, torch.Generator().manual_seed(seed))
        weights = torch.softmax(self.data.log_weights, 0)[:, None]
        off = self.data.means - (weights * self.data.means).sum(0)
        values, vectors = torch.linalg.eigh(self.data.covariance + (weights * off).mT @ off)
        self.prior = Prior(torch.eye(1, dtype=torch.float64), vectors.mT, values[None])
        self.names = [f"{n} dim." for n in (1, 2, 4)] if grid else [f"N={n}" for n in self.factors]
        self.measures = ["total variation", "sliced W2" if grid else "sliced W2² / variance"]
        if name == "gaussian":
            self.measures = ["W2² / variance"]

    def rows(self) -> dict[str, Rival | None]:
        """Exact draws, ours and the rivals."""
        ours = presets(self.data, self.length, self.factors[1] if self.name.startswith("mcgdiff") else 8)
        made: dict[str, Rival] = {name: partial(ilvr, plan=plan) for name, plan in ours.items()}
        made[PAPER] = partial(ilvr, plan=ancestral("paper", 100))
        return {"exact draws (floor)": None, **made, **RIVALS}

    def line(self, name: str, rival: Rival | None) -> Line:
        """Run one sampler for all references and factors."""
        by_factor, cost, low = [], [0.0], [0.0]
        for factor in self.factors:
            draws = [self._draw(rival, y, factor, cost, low) for y in self.references]
            phi = low_pass_matrix(self.length, factor, orthogonal=True)
            if self.name == "gaussian":
                by_factor.append([f"{self._gaussian_w2(phi, draws):.4f}"])
                continue
            figures = []
            for i, (y, draw) in enumerate(zip(self.references, draws, strict=True)):
                of = compare(self.data, y, phi, draw, self.samples, 1000 * self.seed + i)
                figures.append((of[0], of[2] if "sliced W2" in self.measures else of[1]))
            by_factor.append([mean_and_error(values) for values in zip(*figures, strict=True)])
        cells = [cell for cells in zip(*by_factor, strict=True) for cell in cells]
        return Line(name, cost[-1], [*cells, f"{max(low):.4f}"])

    def columns(self) -> list[str]:
        """Headings of the cells."""
        return [f"{measure}, {name}" for measure in self.measures for name in self.names] + ["low-band error"]

    def _draw(self, rival: Rival | None, y: Tensor, factor: int, cost: list[float], low: list[float]) -> Draw | None:
        if rival is None:
            return None

        def draw(x_T: Tensor, generator: torch.Generator) -> Tensor:
            reference = y.reshape(1, 1, 1, -1).expand_as(x_T)
            p = Problem(self.data, SCHEDULE, reference, factor, self.prior, x_T, generator)
            x = rival(p)
            cost.append(p.cost)
            low.append(float(p.band.pixels(p.off(x)).square().mean().sqrt()))
            return x.flatten(1)

        return draw

    def _gaussian_w2(self, phi: Tensor, draws: Sequence[Draw | None]) -> float:
        """Squared error of E[x | y] and Bures' distance of the covariance given y, over the conditional's variance."""
        gain, true = Gaussian((1, self.length), self.data.covariance).conditional(phi)
        values, vectors = torch.linalg.eigh(true)
        root = vectors * values.clamp(min=0).sqrt()
        means, rests = [], []
        for i, (y, draw) in enumerate(zip(self.references, draws, strict=True)):
            generator = torch.Generator().manual_seed(1000 * self.seed + i)
            noise = torch.randn((self.samples, self.length), generator=generator, dtype=torch.float64)
            x = draw(noise.reshape(-1, 1, 1, self.length), generator) if draw else gain @ y + noise @ root.mT
            means.append(x.mean(0) - gain @ y)
            rests.append(x - x.mean(0))
        covariance = sum(rest.mT @ rest for rest in rests) / (len(rests) * (self.samples - 1))
        assert isinstance(covariance, Tensor)
        # The mean of so many samples is off by the covariance over their number.
        bias = float(torch.stack(means).square().sum(1).mean() - covariance.trace() / self.samples)
        return (bias + bures(covariance, true)) / float(true.trace())


class Trained:
    """A trained network: two samples for each held-out image."""

    def __init__(self, ckpt: str, references: Sequence[str], train: str, factors: Sequence[int], seed: int) -> None:
        self.loaded, self.factors, self.seed = load_denoiser(ckpt), list(factors), seed
        self.loaded.network.requires_grad_(False)
        shape = self.loaded.image_shape
        self.y, images = (
            torch.stack([r.tensor for r in find_references(each, shape, "crop")]) for each in (references, [train])
        )
        self.loaded.spectrum = tuple(radial_spectrum(images))
        bases = [dct_basis(side) for side in shape[1:]]
        power = (bases[0] @ images.double() @ bases[1].mT).var(0, correction=0).mean(0)
        self.prior = Prior(bases[0], bases[1], power.clamp(min=1e-8))

    def rows(self) -> dict[str, Rival | None]:
        """Ours as calibrated, and the rivals."""
        plans = {name: self.loaded.preset(name) for name in ("draft", "fast", "best")}
        plans[PAPER] = SamplingPlan.preset("paper", num_steps=100, clip=self.loaded.clip)
        rows: dict[str, Rival | None] = {name: partial(ilvr, plan=plan) for name, plan in plans.items()}
        if self.loaded.components is not None:
            for steps in (10, 20):
                rows[f"JFPS, principal components, {steps} steps"] = partial(jfps, steps=steps, principal=True)
        return {**rows, **RIVALS}

    def columns(self) -> list[str]:
        """Headings of the cells."""
        return [f"{measure}, N={factor}" for factor in self.factors for measure in (
            "energy score", "Fréchet distance", "energy", "low-band error")]  # fmt: skip

    def line(self, name: str, rival: Rival | None) -> Line:
        """Run one sampler for all references and factors."""
        cells, cost = [], 0.0
        twice = self.y.repeat_interleave(2, 0)
        for factor in self.factors:
            generator = torch.Generator().manual_seed(self.seed)
            x_T = torch.randn(twice.shape, generator=generator)
            schedule = self.loaded.schedule
            p = Problem(self.loaded, schedule, twice, factor, self.prior, x_T, generator, clip=self.loaded.clip)
            assert rival is not None
            x, cost = rival(p).clamp(-1, 1), p.cost
            scores = energy_scores(x.reshape(-1, 2, *self.y.shape[1:]), self.y, factor)
            of = measure(x, twice, factor)
            cells += [mean_and_error(scores.tolist(), 2), *(f"{of[k]:.{n}f}" for k, n in FIGURES.items())]
        return Line(name, cost, cells)


FIGURES = {"high": 3, "energy": 2, "low": 4}
"""Digits of the figures of `measure`."""
PAPER = "DDPM as the paper, 100"


def mean_and_error(values: Sequence[float], digits: int = 3) -> str:
    """With the standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ±{error:.{digits}f}"


def print_table(data: Exact | Trained, only: Sequence[str]) -> None:
    """Rows sorted by cost; where the work stands goes to stderr."""
    lines = []
    for name, rival in data.rows().items():
        if any(fnmatch(name, pattern) for pattern in only):
            start = time.perf_counter()
            lines.append(data.line(name, rival))
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    columns = ["sampler", "evaluations", *data.columns()]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for line in sorted(lines, key=lambda line: line.cost):
        print(f"| {' | '.join([line.name, f'{line.cost:g}', *line.cells])} |", flush=True)


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["six"], choices=(*DATA, TRAINED))
    parser.add_argument("--samples", type=int, default=200, help="for each reference, with exact denoisers")
    parser.add_argument("--references", type=int, default=24, help="drawn from the data, with exact denoisers")
    parser.add_argument("--factor", type=int, nargs="+", default=[4, 8], help="not for mcgdiff: 1, 2 and 4 dimensions")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="rows to make")
    parser.add_argument("--seed", type=int, default=1, help="of the references and of the noise")
    parser.add_argument("--ckpt", default="data/pretrained/toon64")
    parser.add_argument("--ref", nargs="+", default=["data/toon:test[200:232]"])
    parser.add_argument("--train", default="data/toon:train[0:500]", help="images that the spectrum is taken from")
    args = parser.parse_args()
    for name in args.data:
        data: Exact | Trained
        if name == TRAINED:
            data = Trained(args.ckpt, args.ref, args.train, args.factor, args.seed)
            print(f"\n{name}: {len(data.y)} references, two samples each")
        else:
            print(f"\n{name}: {args.references} references, {args.samples} samples each")
            data = Exact(name, args.samples, args.references, args.factor, args.seed)
        print_table(data, args.only)


if __name__ == "__main__":
    main()
