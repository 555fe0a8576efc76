"""Matched noise with a gain."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_band import LowBand
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.multiplier import Multiplier
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from tests.support.gaussian import SCHEDULE as LINEAR
from tests.support.gaussian import Gaussian, spectrum_2d

SCHEDULE = NoiseSchedule.cosine(1000)
SIZE, FACTOR = (16, 16), 4
BAND = LowBand(SIZE, FACTOR)
SPECTRUM = tuple(4 / (1 + radius) ** 2 for radius in range(23))


def images(count: int) -> Tensor:
    return torch.randn((count, 3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def multiplier(gain: float, decay: float = 1.0, spectrum: tuple[float, ...] = SPECTRUM) -> Multiplier:
    return Multiplier(LowPassFilter(SIZE, FACTOR, orthogonal=True), images(2), spectrum, gain=gain, decay=decay)


@pytest.mark.parametrize("gain", [0.5, 4.0, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_equations(gain: float, decay: float) -> None:
    eps, difference, lam, h = images(2), images(2).flip(0), -0.7, 0.4
    e, kept = multiplier(gain, decay)(eps, difference, lam, h)
    snr, C = math.exp(2 * lam), BAND.variances(SPECTRUM)
    g = (1 / (snr * C)).clamp(max=gain)
    rho = ((1 + decay * g) * snr * C / (1 + snr * C)).clamp(max=1)
    expected = (BAND.coordinates(eps) + math.sqrt(snr) * g * BAND.coordinates(difference)) * (-h * rho).exp()
    torch.testing.assert_close(e, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept, (1 - rho).expand_as(kept), rtol=0, atol=1e-12)


def test_before_the_image_nothing_decays() -> None:
    eps, difference = images(2), images(2).flip(0)
    at_end, _ = multiplier(4.0)(eps, difference, 3.0, math.inf)
    barely, _ = multiplier(4.0)(eps, difference, 3.0, 0.0)
    torch.testing.assert_close(at_end, barely, rtol=0, atol=0)


def test_without_a_limit_one_step_solves_a_gaussian() -> None:
    """Newton's step: E[z(x_0) | x_t] = z(y) at the next evaluation of the same level, whatever the first noise was."""
    data = Gaussian((1, 32), torch.diag(torch.ones(32, dtype=torch.float64)) * 0.25)
    y = torch.randn((3, 1, 1, 32), generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    band, phi = LowBand((1, 32), 4), LowPassFilter((1, 32), 4, orthogonal=True)
    solver = Multiplier(phi, y, [0.25] * 33, gain=math.inf, decay=1.0)
    t = 700
    signal, sigma = LINEAR.signal_and_noise(t, y)
    x = signal * y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def predict(x: Tensor) -> Prediction:
        return data.denoise(x, torch.full((3,), t))

    said = predict(x)
    assert float(phi(y - said.x0).abs().max()) > 0.05
    e, _ = solver(said.eps, phi(y - said.x0), float(LINEAR.log_snr_half[t]), math.inf)
    x = x - phi(x) + phi(signal * y) + sigma * band.pixels(e)
    torch.testing.assert_close(phi(predict(x).x0), phi(y), rtol=0, atol=1e-12)


def test_natural_spectrum_follows_the_references_variance() -> None:
    y = images(2) * torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    found = Multiplier(LowPassFilter(SIZE, FACTOR, orthogonal=True), y, (), gain=1.0, decay=1.0)._variances
    variance = y.var((1, 2, 3), correction=0)
    ratio = found[1] / found[0]
    torch.testing.assert_close(ratio, (variance[1] / variance[0]).expand_as(ratio))


GAUSSIAN = spectrum_2d()


PLAN = SamplingPlan(num_steps=10, factor=4, clip=False, low_band_gain=4.0, eps_extrapolation=0.75)


def run(plan: SamplingPlan, y: Tensor, seeds: range, mask: Tensor | None = None) -> Tensor:
    return generate(
        GAUSSIAN, LINEAR, plan, seeds=seeds, shape=(1, *GAUSSIAN.shape), reference=y, mask=mask,
        x_T=torch.stack([start(seed) for seed in seeds]),
    )  # fmt: skip


def start(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, *GAUSSIAN.shape), generator=generator, dtype=torch.float64)


def references(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((count, 1, *GAUSSIAN.shape), generator=generator, dtype=torch.float64) / 4


def test_the_low_band_is_met() -> None:
    y = references(3)
    phi = LowPassFilter((16, 16), 4, orthogonal=True)
    torch.testing.assert_close(phi(run(PLAN, y, range(3))), phi(y), rtol=0, atol=1e-5)


def test_an_image_depends_on_its_own_seed_and_settings_alone() -> None:
    y = references(3)
    plan = replace(PLAN, factor=(2, 4, 8), condition_to=(0, 200, 0))
    together = run(plan, y, range(3))
    for i, (factor, low) in enumerate(((2, 0), (4, 200), (8, 0))):
        alone = run(replace(PLAN, factor=factor, condition_to=low), y[i : i + 1], range(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


def test_where_the_mask_is_black_nothing_is_followed() -> None:
    y = references(2)
    free = run(PLAN, y, range(2), mask=torch.zeros(1, 1, 16, 16))
    other = run(PLAN, -y, range(2), mask=torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(free, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_band_gain": -1.0}, "low_band_gain must be at least 0"),
        ({"low_band_gain": math.nan}, "low_band_gain must be at least 0"),
        ({"low_band_decay": 1.5}, "low_band_decay must be between 0 and 1"),
        ({"low_band_gain": 1.0, "reference_noise": "fixed"}, "low_band_gain needs sampling.reference_noise=matched"),
        ({"low_band_gain": 1.0, "orthogonal": False}, "low_band_gain needs sampling.orthogonal=true"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        SamplingPlan(**change)  # type: ignore[arg-type]
