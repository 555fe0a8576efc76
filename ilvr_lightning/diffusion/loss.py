"""Training losses and their weightings, one value per image."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction, adjacent_log_variances
from ilvr_lightning.diffusion.schedule import NoiseSchedule

Weighting = Literal["simple", "min_snr"]
MIN_SNR_GAMMA = 5.0


def training_losses(
    denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, weighting: Weighting = "simple"
) -> Tensor:
    """Loss of each image: simple (Ho et al. 2020, equation 14), plus the bound where the variance is learned.

    Args:
        denoiser: the network in training.
        x0: (B, C, H, W) images in [-1, 1].
        t: (B,) timesteps in 1..T.
        noise: (B, C, H, W) standard normal.
        weighting: of the squared error; "min_snr" is Hang et al. 2023 with gamma 5.

    Returns:
        (B,) losses. With a learned variance: L_simple + L_vlb / 1000 in ADM's scaling (Nichol and Dhariwal 2021,
        equation 16), the bound's gradient reaching the variance alone.
    """
    schedule = denoiser.schedule
    x_t = schedule.q_sample(x0, t, noise)
    output = denoiser.raw(x_t, t).to(x0.dtype)
    signal, sigma = schedule.signal_and_noise(t, x0)
    target = {"eps": noise, "v": signal * noise - sigma * x0, "x0": x0}[denoiser.prediction_type]
    mean, variance = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
    loss = (mean - target).square().mean((1, 2, 3)) * WEIGHTINGS[weighting](schedule, t, x0, denoiser.prediction_type)
    if variance.shape[1]:
        frozen = denoiser.read(torch.cat([mean.detach(), variance], dim=1), x_t, t)
        loss = loss + schedule.num_timesteps / 1000 * bound_term(schedule, frozen, x0, x_t, t)
    return loss


def bound_term(schedule: NoiseSchedule, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """(B,) one term of the variational bound in bits per dimension (Ho et al. 2020, equation 5).

    The KL of p(x_{t-1} | x_t) from the posterior; at t=1 the negative log-likelihood of 8-bit x_0.

    Raises:
        ValueError: the prediction has no variance.
    """
    if prediction.log_variance is None:
        raise ValueError("the bound needs a prediction with a log_variance")
    from_x0, from_xt = schedule.at("posterior_x0", t, x0), schedule.at("posterior_xt", t, x0)
    true_mean = from_x0 * x0 + from_xt * x_t
    mean = from_x0 * prediction.x0 + from_xt * x_t
    true_log_variance, _ = adjacent_log_variances(schedule, t, x0)
    kl = normal_kl(true_mean, true_log_variance, mean, prediction.log_variance)
    nll = -discretized_log_likelihood(x0, mean, 0.5 * prediction.log_variance)
    term = torch.where((t == 1).reshape((-1,) + (1,) * (x0.ndim - 1)), nll, kl)
    return term.mean((1, 2, 3)) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of diagonal normals, in nats, elementwise."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (ratio - 1 + log_variance2 - log_variance1 + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, in nats, of 8-bit x in [-1, 1] under a normal (Ho et al. 2020, equation 13).

    The normal's distribution function is the tanh approximation that the reference implementation uses.
    """
    inverse = torch.exp(-log_scale)
    upper = _approximate_cdf(inverse * (x - mean + 1 / 255))
    lower = _approximate_cdf(inverse * (x - mean - 1 / 255))
    middle = torch.log((upper - lower).clamp(min=1e-12))
    first, last = torch.log(upper.clamp(min=1e-12)), torch.log((1 - lower).clamp(min=1e-12))
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, middle))


def _approximate_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _simple_weight(schedule: NoiseSchedule, t: Tensor, like: Tensor, prediction_type: str) -> Tensor:
    return torch.ones(len(t), dtype=like.dtype, device=like.device)


def _min_snr_weight(schedule: NoiseSchedule, t: Tensor, like: Tensor, prediction_type: str) -> Tensor:
    """min(SNR, gamma) on the error of x_0, written for what the network predicts (Hang et al. 2023, section 3.4)."""
    signal, sigma = schedule.signal_and_noise(t, like)
    snr = (signal / sigma).square().flatten()
    capped = snr.clamp(max=MIN_SNR_GAMMA)
    return {"eps": capped / snr, "v": capped / (snr + 1), "x0": capped}[prediction_type]


WEIGHTINGS: dict[str, Callable[[NoiseSchedule, Tensor, Tensor, str], Tensor]] = {
    "simple": _simple_weight,
    "min_snr": _min_snr_weight,
}
