"""Samplers: generators with one signature. To add one, write a function here and enter its name in plan.py."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ilvr_lightning.diffusion.conditioning import Conditioning
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.noise import NoiseSource
from ilvr_lightning.diffusion.plan import SAMPLER_SETTINGS, SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class SamplerState:
    """Where a run stands after a step."""

    x: Tensor
    """(B, C, H, W) the sample at level t."""
    x0: Tensor
    """(B, C, H, W) the prediction of x_0 that led to it."""
    t: int
    """Training timestep of x; 0 when done."""
    evidence: Tensor | None = None
    """(B,) how well the run so far explains the reference, see ILVRRun; None without a reference."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every sampler is given: the reverse process to follow."""

    denoise: Callable[[Tensor, int], Prediction]
    schedule: NoiseSchedule
    conditioning: Conditioning
    noise: NoiseSource
    timesteps: list[int]
    """The evaluated timesteps, descending; the step after the last goes to 0."""
    plan: SamplingPlan

    def steps(self) -> Iterator[tuple[int, int, float, float]]:
        """t, s < t, and alphas_cumprod at both."""
        for t, s in pairwise([*self.timesteps, 0]):
            yield t, s, float(self.schedule.alphas_cumprod[t]), float(self.schedule.alphas_cumprod[s])

    def predict(self, x: Tensor, t: int) -> Prediction:
        """The refined prediction at x_t."""
        return self.conditioning.refine_prediction(self.denoise(x, t), t)


def ddpm(run: Run, x: Tensor) -> Iterator[SamplerState]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any subset of the timesteps.

    The posterior q(x_s | x_t, x_0) of equation 7, with beta = 1 - a_t/a_s for the step from t to s.
    """
    for t, s, a_t, a_s in run.steps():
        p = run.predict(x, t)
        beta = 1 - a_t / a_s
        x = math.sqrt(a_s) * beta / (1 - a_t) * p.x0 + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x
        if s > 0:
            small = beta * (1 - a_s) / (1 - a_t)
            x = x + _deviation(p, small, beta, run.plan.variance) * run.noise.draw("sampler", x)
        x = run.conditioning.refine_sample(x, s)
        yield SamplerState(x=x, x0=p.x0, t=s)


def _deviation(p: Prediction, small: float, large: float, variance: str) -> Tensor | float:
    """Standard deviation of a step whose variance lies between the posterior's and beta.

    Raises:
        ValueError: the plan asks for a learned variance of a network that learned none.
    """
    if variance == "auto":
        variance = "small" if p.variance_fraction is None else "learned"
    if variance != "learned":
        return math.sqrt(small if variance == "small" else large)
    if p.variance_fraction is None:
        raise ValueError("sampling.variance=learned needs a network that learned its variance; give small or large")
    # Nichol and Dhariwal 2021, equation 15, between the bounds of this very step.
    v = p.variance_fraction
    return torch.exp(0.5 * (v * math.log(large) + (1 - v) * math.log(small)))


def ddim(run: Run, x: Tensor) -> Iterator[SamplerState]:
    """Song et al. 2021, equation 12, with the sigma of equation 16: eta times the ancestral one."""
    for t, s, a_t, a_s in run.steps():
        p = run.predict(x, t)
        sigma = run.plan.eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        x = math.sqrt(a_s) * p.x0 + math.sqrt(max(0.0, 1 - a_s - sigma**2)) * p.eps
        if sigma > 0:
            x = x + sigma * run.noise.draw("sampler", x)
        x = run.conditioning.refine_sample(x, s)
        yield SamplerState(x=x, x0=p.x0, t=s)


def dpmpp_2m(run: Run, x: Tensor) -> Iterator[SamplerState]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); with eta, towards SDE-DPM-Solver++ (eta=1).

    Data prediction, in lambda = log(sqrt(a) / sqrt(1 - a)); of first order at the first step and at the last.
    """
    lam = run.schedule.log_snr_half.tolist()
    eta, before, h_before = run.plan.eta, None, 0.0
    for t, s, a_t, a_s in run.steps():
        p = run.predict(x, t)
        if s > 0:
            h = lam[s] - lam[t]
            D = p.x0 if before is None else p.x0 + h / (2 * h_before) * (p.x0 - before)
            x = math.sqrt((1 - a_s) / (1 - a_t)) * math.exp(-eta * h) * x
            x = x - math.sqrt(a_s) * math.expm1(-(1 + eta) * h) * D
            if eta > 0:
                x = x + math.sqrt((1 - a_s) * -math.expm1(-2 * eta * h)) * run.noise.draw("sampler", x)
            before, h_before = p.x0, h
        else:
            x = p.x0  # h is infinite
        x = run.conditioning.refine_sample(x, s)
        yield SamplerState(x=x, x0=p.x0, t=s)


SAMPLERS: dict[str, Callable[[Run, Tensor], Iterator[SamplerState]]] = {
    name: globals()[name] for name in SAMPLER_SETTINGS
}
"""The function of each name in plan.SAMPLER_SETTINGS."""
