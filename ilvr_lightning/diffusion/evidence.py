"""The evidence of a run of ILVR, by which one of several runs for a reference is chosen."""

import math

import torch
from torch import Tensor

from ilvr_lightning.diffusion.schedule import NoiseSchedule

MAX_SNR = 1000.0
"""A reference is taken to have noise of at least this snr (deviation 0.03): networks know little of finer noise."""


def step_evidence(error: Tensor, schedule: NoiseSchedule, t: int, s: int, variance: Tensor | None = None) -> Tensor:
    """What a step from t to s adds to the logarithm of a run's evidence.

    Along a run, log p(phi(y)) grows by -1/2 |phi(y) - phi(E[x_0 | x_t])|^2 d snr, up to the snr of the reference.

    Args:
        error: (B, C, H, W) phi(y - x_0), x_0 the network's prediction at t.
        schedule: the denoiser's.
        t: the timestep that the step comes from.
        s: the timestep that it goes to.
        variance: (B, 1, 1, 1) of the reference's own noise.

    Returns:
        (B,), up to a constant of the reference.
    """
    most = torch.tensor(MAX_SNR) if variance is None else (1 / variance.flatten()).clamp(max=MAX_SNR)
    snr_t, snr_s = (math.exp(2 * float(schedule.log_snr_half[u])) for u in (t, s))
    growth = most.clamp(max=snr_s) - most.clamp(max=snr_t)
    return -0.5 * growth.to(error) * error.square().sum((1, 2, 3))
