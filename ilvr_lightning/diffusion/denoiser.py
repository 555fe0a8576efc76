"""From a network's raw output to a Prediction; the one place that knows that the network's index is t - 1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from ilvr_lightning.diffusion.components import Components
from ilvr_lightning.diffusion.plan import FitScores
from ilvr_lightning.diffusion.schedule import NoiseSchedule

PredictionType = Literal["eps", "v", "x0"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a denoiser says of x_t; x0 and eps satisfy x_t = sqrt(a) x0 + sqrt(1 - a) eps."""

    x0: Tensor
    """(B, C, H, W) estimate of E[x_0 | x_t]."""
    eps: Tensor
    """(B, C, H, W) estimate of E[noise | x_t]."""
    log_variance: Tensor | None = None
    """(B, C, H, W) learned log-variance of the step t -> t-1, or None."""
    variance_fraction: Tensor | None = None
    """(B, C, H, W) the v of Nichol and Dhariwal 2021, equation 15, for steps longer than one, or None."""


class Denoise(Protocol):
    """Anything callable as (x, t) -> Prediction, with t (B,) in 1..T."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction: ...


class Denoiser:
    """A network read as eps, v or x0.

    Args:
        network: module or function (B, C, H, W), 0-based int64 (B,) -> (B, C, H, W), or (B, 2C, H, W) where the
            variance is learned.
        schedule: the one that the network was trained with.
        prediction_type: eps (Ho et al. 2020), v (Salimans and Ho 2022) or x0.
    """

    spectrum: tuple[float, ...] = ()
    """Variance of the training images' DCT coefficients by radius, as low_band.radial_spectrum returns it, for ILVR's
    gain; empty if unknown."""
    components: Components | None = None
    """The training images' principal components, for the correction of x_0's high band; None if unknown."""
    fit_scores: FitScores
    """Scores of held-out images, which check_reference compares a reference with; empty if unknown."""

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        schedule: NoiseSchedule,
        prediction_type: PredictionType = "eps",
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.fit_scores = {}

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's own output at timesteps t (B,) in 1..T."""
        if isinstance(self.network, nn.Module):  # in float64, say, while x is float32
            x = x.to(next((weights.dtype for weights in self.network.parameters()), x.dtype))
        output: Tensor = self.network(x, t - 1)
        return output

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """Predict from x (B, C, H, W) at timesteps t (B,) in 1..T."""
        # The reverse process keeps x's dtype, whatever the network computed in.
        return self.read(self.raw(x, t).to(x.dtype), x, t)

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Turn a network's output at x_t into a Prediction."""
        signal, sigma = self.schedule.signal_and_noise(t, x)
        mean, fraction = output, None
        if output.shape[1] == 2 * x.shape[1]:
            mean, interpolation = output.chunk(2, dim=1)
            fraction = (interpolation + 1) / 2
        if self.prediction_type == "eps":
            x0, eps = (x - sigma * mean) / signal, mean
        elif self.prediction_type == "v":
            x0, eps = signal * x - sigma * mean, sigma * x + signal * mean
        else:
            x0, eps = mean, (x - signal * mean) / sigma
        log_variance = None
        if fraction is not None:
            low, high = adjacent_log_variances(self.schedule, t, x)
            log_variance = fraction * high + (1 - fraction) * low
        return Prediction(x0=x0, eps=eps, log_variance=log_variance, variance_fraction=fraction)


def clip_prediction(prediction: Prediction, x: Tensor, t: int, schedule: NoiseSchedule) -> Prediction:
    """Clip x0 to [-1, 1] and compute eps from it, so that the pair stays consistent with x_t."""
    x0 = prediction.x0.clamp(-1, 1)
    signal, sigma = schedule.signal_and_noise(t, x)
    return Prediction(
        x0=x0,
        eps=(x - signal * x0) / sigma,
        log_variance=prediction.log_variance,
        variance_fraction=prediction.variance_fraction,
    )


def adjacent_log_variances(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the least and largest variance of t -> t-1: the posterior's and beta's (Ho et al. 2020, section 3.2)."""
    return schedule.at("log_posterior_variance", t, like), schedule.at("log_beta", t, like)
