"""References that have noise of their own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.conditioning import ILVR
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.noise import PerImageNoise
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from tests.support.gaussian import SCHEDULE, errors, modulated_ar1, solver, spectrum_1d, spectrum_2d

GAIN = {"eta": 1.0, "low_band_gain": 2.0, "low_band_decay": 0.0, "eps_extrapolation": 0.75}
GAUSSIAN = spectrum_2d()
PLAN = SamplingPlan(num_steps=10, factor=4, clip=False, reference_sigma=0.2)


def references(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((count, 1, *GAUSSIAN.shape), generator=generator, dtype=torch.float64) / 4


def run(plan: SamplingPlan, y: Tensor, seeds: range) -> Tensor:
    x_T = torch.cat([PerImageNoise([seed]).draw("x_T", y[:1]) for seed in seeds])
    return generate(GAUSSIAN, SCHEDULE, plan, seeds=seeds, shape=(1, *GAUSSIAN.shape), reference=y, x_T=x_T)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("line", [spectrum_1d, modulated_ar1])
def test_twenty_steps_draw_from_the_true_conditional(sigma: float, factor: int, line: object) -> None:
    assert callable(line)
    plan = solver(20, reference_sigma=sigma, factor=factor, **GAIN)
    assert errors(line(), plan)[0] < 0.003
    assert errors(line(), replace(plan, reference_sigma=0.0))[0] < 0.003


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_other_noise_of_the_reference(noise: str) -> None:
    """Ancestral sampling that takes the reference's noise for detail would be 0.34 off, fixed noise 0.33."""
    plan = solver(20, reference_sigma=0.2, factor=4, eta=1.0, reference_noise=noise)
    assert errors(spectrum_1d(), plan)[0] < 0.05


def test_without_noise_nothing_changes() -> None:
    y = references(2)
    assert torch.equal(
        run(replace(PLAN, reference_sigma=0.0), y, range(2)),
        run(replace(PLAN, reference_sigma=(0.0, 0.0)), y, range(2)),
    )


@pytest.mark.parametrize("noise", ["matched", "fresh", "fixed", "fresh_released"])
def test_an_image_depends_on_its_own_noise_alone(noise: str) -> None:
    y = references(3)
    plan = replace(PLAN, reference_noise=noise, factor=(2, 4, 8), reference_sigma=(0.0, 0.1, 0.6))  # type: ignore[arg-type]
    together = run(plan, y, range(3))
    for i, (factor, sigma) in enumerate(((2, 0.0), (4, 0.1), (8, 0.6))):
        alone = run(replace(plan, factor=factor, reference_sigma=sigma), y[i : i + 1], range(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


def test_the_more_noise_the_less_is_followed() -> None:
    y, phi = references(4), LowPassFilter(GAUSSIAN.shape, 4, orthogonal=True)
    off = [float(phi(run(replace(PLAN, reference_sigma=s), y, range(4)) - y).square().mean()) for s in (0.0, 0.1, 0.5)]
    assert off[0] < 1e-9 < off[1] < off[2]


def test_level_of_noise() -> None:
    schedule = NoiseSchedule.cosine(1000)
    assert schedule.level_of_noise(0.0) == 0
    for sigma in (0.05, 0.2, 1.0):
        t = schedule.level_of_noise(sigma)
        ratios = [math.exp(-float(schedule.log_snr_half[level])) for level in (t - 1, t)]
        assert ratios[0] < sigma <= ratios[1]
    assert schedule.level_of_noise(1e-9) == 1
    assert schedule.level_of_noise(1e9) == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_sigma": -0.1}, "reference_sigma must be between 0 and 2"),
        ({"reference_sigma": (0.1, math.nan)}, "reference_sigma must be between 0 and 2"),
        ({"reference_sigma": 0.1, "exact_low_band": True}, "exact_low_band keeps a reference's noise"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingPlan(**change)  # type: ignore[arg-type]


def test_one_value_or_one_per_image() -> None:
    with pytest.raises(ValueError, match=r"reference_sigma must be one, or one per image: got 2 for 3 images"):
        run(replace(PLAN, reference_sigma=(0.1, 0.2)), references(3), range(3))


@pytest.mark.parametrize(("noise", "power"), [("matched", 1.0), ("fixed", 0.5)])
def test_only_the_missing_noise_is_added(noise: str, power: float) -> None:
    """z(x_s) / sqrt(a_s) = z(y) + (1/snr - sigma^2) q, with q = sqrt(snr) eps; of other noise, the missing variance."""
    y, x0, x = references(1), references(3)[1:2], references(3)[2:]
    phi, sigma, s = LowPassFilter(GAUSSIAN.shape, 4, orthogonal=True), 0.5, 300
    settings = ILVR(reference=y, low_pass=phi, reference_noise=noise, reference_sigma=(sigma,))  # type: ignore[arg-type]
    run = settings.start(SCHEDULE, PerImageNoise([0]), [900, s], x_T=x)
    eps = torch.ones_like(y)
    run.refine_prediction(Prediction(x0=x0, eps=eps), 900)
    signal, deviation = SCHEDULE.signal_and_noise(s, y)
    missing = float(1 - (sigma * signal / deviation) ** 2)
    assert 0.1 < missing < 0.99
    start, spread = SCHEDULE.signal_and_noise(900, y)
    n = eps if noise == "matched" else (x - start * y) / spread
    torch.testing.assert_close(phi(run.refine_sample(x, s)), phi(signal * y + deviation * missing**power * n))
