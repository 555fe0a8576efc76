"""Bits per dimension: known for normal images under their exact denoiser."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.noise import PerImageNoise
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics.likelihood import bits_per_dimension, diffusion_bits

SCHEDULES = {"linear": NoiseSchedule.linear(1000), "cosine": NoiseSchedule.cosine(1000)}


def eight_bits(deviation: float, count: int) -> Tensor:
    x = deviation * torch.randn((count, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def exact(schedule: NoiseSchedule, deviation: float, log_variance: float | None = None) -> Any:
    """The mean of x_0 given x_t where pixels are independent normals."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        signal, sigma = schedule.signal_and_noise(t, x)
        x0 = signal * deviation**2 * x / (signal**2 * deviation**2 + sigma**2)
        variance = None if log_variance is None else torch.full_like(x, log_variance)
        return Prediction(x0=x0, eps=(x - signal * x0) / sigma, log_variance=variance)

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_bits_of_normal_pixels_are_their_entropy(name: str, deviation: float) -> None:
    """log2(s sqrt(2 pi e) / step) of pixels with the deviation s that are rounded to steps of 2/255."""
    schedule, x0 = SCHEDULES[name], eight_bits(deviation, 40)
    bits = bits_per_dimension(exact(schedule, deviation), schedule, x0, PerImageNoise(range(40)), 200)
    entropy = math.log2(deviation * math.sqrt(2 * math.pi * math.e) / (2 / 255))
    total = bits.prior + bits.diffusion + bits.decoder.min(1).values
    assert float(total.mean()) == pytest.approx(entropy, abs=0.05)
    assert bits.decoder.shape == (40, 2)
    assert 0 < float(bits.prior.mean()) < 0.01


def test_a_worse_denoiser_has_more_bits() -> None:
    schedule, x0 = SCHEDULES["linear"], eight_bits(0.1, 20)
    right, wrong = (
        diffusion_bits(exact(schedule, deviation), schedule, x0, PerImageNoise(range(20))) for deviation in (0.1, 0.5)
    )
    assert float(right.mean()) + 0.1 < float(wrong.mean())


def test_the_variance_of_the_network_is_used() -> None:
    schedule, x0 = SCHEDULES["linear"], eight_bits(0.1, 4)
    decoders = [
        bits_per_dimension(exact(schedule, 0.1, value), schedule, x0, PerImageNoise(range(4)), 2).decoder
        for value in (math.log(1e-4), math.log(1e-2))
    ]
    assert decoders[0].shape == (4, 1)
    assert (decoders[0] + 1 < decoders[1]).all()


def test_bits_of_an_image_do_not_depend_on_its_batch() -> None:
    schedule, x0 = SCHEDULES["cosine"], eight_bits(0.3, 4)
    together = bits_per_dimension(exact(schedule, 0.3), schedule, x0, PerImageNoise(range(4)), 20)
    alone = bits_per_dimension(exact(schedule, 0.3), schedule, x0[2:3], PerImageNoise([2]), 20)
    assert together.diffusion[2].item() == pytest.approx(alone.diffusion.item(), rel=1e-6)
    assert together.decoder[2].tolist() == pytest.approx(alone.decoder[0].tolist(), rel=1e-6)
