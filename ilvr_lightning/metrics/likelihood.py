"""The variational bound on the negative log-likelihood of images, in bits per dimension."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Denoise, adjacent_log_variances
from ilvr_lightning.diffusion.loss import discretized_log_likelihood
from ilvr_lightning.diffusion.noise import NoiseSource
from ilvr_lightning.diffusion.schedule import NoiseSchedule

LEVELS = 48
"""The integral over the log-SNR has so many nodes, each one evaluation of the network."""


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The parts of the bound in bits per dimension, for B images; the bound is their sum."""

    prior: Tensor
    """(B,) what x_T still knows of x_0."""
    diffusion: Tensor
    """(B,)."""
    decoder: Tensor
    """(B, V) of x_0 in 8 bits given x_1, for each of V variances of the decoder: the network's own, or the posterior's
    and beta's, of which the better one is to be chosen for the whole set."""


@torch.no_grad()
def bits_per_dimension(
    denoise: Denoise, schedule: NoiseSchedule, x0: Tensor, noise: NoiseSource, levels: int = LEVELS
) -> Bits:
    """The bound of images x0 (B, C, H, W) of 8 bits in [-1, 1] (Kingma et al. 2021, equations 11 to 15).

    Diffusion is in continuous time between x_1 and x_T: half the integral of the SNR times the squared error of x_0
    over the log-SNR, which is the limit of infinitely many steps, with one noise per level and image.

    Args:
        denoise: the network as a callable.
        schedule: the denoiser's.
        x0: the images.
        noise: a source for B images.
        levels: nodes of the integral.
    """
    a = float(schedule.alphas_cumprod[-1])
    prior = 0.5 * (a * x0.double().square() - a - math.log1p(-a)).mean((1, 2, 3))
    first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
    prediction = denoise(schedule.q_sample(x0, 1, noise.draw("x_T", x0)), first)
    learned, fixed = prediction.log_variance, adjacent_log_variances(schedule, first, x0)
    log_variances = [each.expand_as(x0) for each in (fixed if learned is None else (learned,))]
    mean = prediction.x0.clamp(-1, 1)
    decoder = [-discretized_log_likelihood(x0, mean, 0.5 * each).double().mean((1, 2, 3)) for each in log_variances]
    return Bits(
        prior=prior.cpu() / math.log(2), decoder=torch.stack(decoder, 1).cpu() / math.log(2),
        diffusion=diffusion_bits(denoise, schedule, x0, noise, levels),
    )  # fmt: skip


@torch.no_grad()
def diffusion_bits(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: NoiseSource,
    levels: int = LEVELS,
    limit: float = math.inf,
) -> Tensor:
    """(B,) the diffusion part of the bound in bits per dimension, by the trapezoidal rule over the log-SNR.

    Args:
        denoise: as above.
        schedule: as above.
        x0: as above.
        noise: as above.
        levels: nodes, at the timesteps that are nearest to equal distances of the log-SNR.
        limit: the integral is over log-SNRs of at most this size; none leaves it from x_T to x_1.
    """  # fmt: skip
    log_snr = 2 * schedule.log_snr_half[1:]
    low, high = max(float(log_snr[-1]), -limit), min(float(log_snr[0]), limit)
    wanted = torch.linspace(low, high, levels, dtype=torch.float64)
    steps = list(dict.fromkeys(int((log_snr - each).abs().argmin()) + 1 for each in wanted))
    nodes, values = log_snr[torch.tensor(steps) - 1], []
    for t, node in zip(steps, nodes.tolist(), strict=True):
        x_t = schedule.q_sample(x0, t, noise.draw("x_T", x0))
        prediction = denoise(x_t, torch.full((len(x0),), t, device=x0.device))
        error = (prediction.x0.clamp(-1, 1) - x0).double().square().mean((1, 2, 3))
        values.append(0.5 * math.exp(node) * error.cpu())
    return torch.trapezoid(torch.stack(values, 1), nodes) / math.log(2)
