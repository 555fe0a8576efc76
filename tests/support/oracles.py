"""Denoisers and noise whose answers are known."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.low_pass import low_pass_matrix
from ilvr_lightning.diffusion.noise import Stream
from ilvr_lightning.diffusion.plan import FORMER_DEFAULTS, SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet


def make_plan(**settings: Any) -> SamplingPlan:
    """A plan of 50 uniform ddpm steps with fresh noise, the paper's bicubic filter and these settings."""
    return SamplingPlan(**{**FORMER_DEFAULTS, **settings})


@dataclass
class GaussianDenoiser:
    """The exact E[x_0 | x_t] where each pixel of the data is N(mean, variance) on its own.

    fraction: what it says of the variance, as a network with a learned one would.
    """

    schedule: NoiseSchedule
    mean: Tensor | float = 0.0
    variance: Tensor | float = 1.0
    fraction: float | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        a = self.schedule.alphas_cumprod[t].to(x.dtype).reshape(-1, 1, 1, 1)
        x0 = self.mean + a.sqrt() * self.variance / (a * self.variance + 1 - a) * (x - a.sqrt() * self.mean)
        fraction = None if self.fraction is None else torch.full_like(x, self.fraction)
        return Prediction(x0=x0, eps=(x - a.sqrt() * x0) / (1 - a).sqrt(), variance_fraction=fraction)


@dataclass
class RecordedNoise:
    """Replays what was recorded, a list a stream; zeros for a stream that is not given."""

    recorded: dict[Stream, list[Tensor]] = field(default_factory=dict)
    drawn: list[Stream] = field(default_factory=list)

    def draw(self, stream: Stream, like: Tensor) -> Tensor:
        self.drawn.append(stream)
        if stream not in self.recorded:
            return torch.zeros_like(like)
        return self.recorded[stream].pop(0).to(like)


@dataclass
class ProbeNoise:
    """Image 0 never gets noise; image i + 1 gets a one in the i-th drawing alone.

    So a sampler that is affine in its noise shows its offset and every gain in one run.
    """

    draws: int = 0

    def draw(self, stream: Stream, like: Tensor) -> Tensor:
        noise = torch.zeros_like(like)
        noise[self.draws + 1] = 1
        self.draws += 1
        return noise


def projection_error(side: int, factor: int, kernel: str, orthogonal: bool) -> float:
    """||P P - P|| / ||P||."""
    P = low_pass_matrix(side, factor, kernel, orthogonal)
    return float(torch.linalg.matrix_norm(P @ P - P, 2) / torch.linalg.matrix_norm(P, 2))


def nesting_error(side: int, finer: int, coarser: int, kernel: str, orthogonal: bool) -> float:
    """||(I - P_N) P_M|| for N = finer, M = coarser."""
    fine, coarse = (low_pass_matrix(side, n, kernel, orthogonal) for n in (finer, coarser))
    return float(torch.linalg.matrix_norm(coarse - fine @ coarse, 2))


def small_unet() -> UNet:
    """A network of 8 channels with attention, for images of 3x8x8, with weights that are not 0."""
    torch.manual_seed(0)
    config = UNetConfig(
        channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(8,), num_head_channels=8
    )
    made = UNet(config, (8, 8))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made
