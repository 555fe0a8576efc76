"""The energy score, and the settings of matched noise that it chooses."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.mixture import six_components
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics import calibration
from ilvr_lightning.metrics.bands import energy_scores
from ilvr_lightning.metrics.calibration import GAIN_CHOICES, choose_low_band
from tests.support.oracles import GaussianDenoiser

PLAN = SamplingPlan.preset("draft", factor=8, clip=False)


def test_energy_score_by_hand() -> None:
    """Two samples of each of two references; with factor 8 of 8 pixels all but the mean is in the high band."""
    y = torch.zeros(2, 1, 8, 8)
    pattern = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 8, 8)
    x = torch.stack([torch.stack([pattern, -pattern]), torch.stack([y[1], 3 * pattern])])
    # |pattern| is 8: (8 + 8) / 2 - 16 / 2, and (0 + 24) / 2 - 24 / 2.
    torch.testing.assert_close(energy_scores(x, y, 8), torch.tensor([0.0, 0.0], dtype=torch.float64), rtol=0, atol=0.1)
    same = torch.stack([pattern, pattern]).expand(2, 2, 1, 8, 8)
    torch.testing.assert_close(
        energy_scores(same, y, 8), torch.tensor([8.0, 8.0], dtype=torch.float64), rtol=0, atol=0.1
    )


def test_energy_score_is_least_for_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, deviation: float) -> Tensor:
        return deviation * torch.randn((count, 1, 16, 16), generator=generator)

    y = draw(400, 1.0)
    scores = {d: float(energy_scores(draw(800, d).reshape(400, 2, 1, 16, 16), y, 4).mean()) for d in (0.5, 1.0, 2.0)}
    assert min(scores, key=lambda deviation: scores[deviation]) == 1.0


def test_a_gain_is_chosen_where_modes_are_missed_without() -> None:
    data = six_components()
    images = data.draw(16, torch.Generator().manual_seed(6)).reshape(16, 1, 1, 32)
    settings, better = choose_low_band(data, PLAN, images, range(32))
    assert list(settings) == list(LOW_BAND_FIELDS)
    assert settings["low_band_gain"] >= 2
    assert float(better.removeprefix("energy score lower by ").partition("%")[0]) > 20


class Exact(GaussianDenoiser):
    """Pixels that are independent: every frequency above the filter's is free, and no gain can help."""

    spectrum = tuple([0.25] * 17)


def test_within_the_spread_nothing_is_changed() -> None:
    images = 0.5 * torch.randn((16, 1, 1, 16), generator=torch.Generator().manual_seed(0))
    denoise = Exact(NoiseSchedule.linear(1000), 0.0, 0.25)
    settings, better = choose_low_band(denoise, PLAN, images, range(32))
    assert tuple(settings.values()) == (*GAIN_CHOICES[0], 0.0)
    assert better == "energy score lower by 0.0% ±0.0"


def test_of_equal_choices_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "energy_scores", lambda made, images, factor: torch.full((4,), math.pi))
    images = torch.zeros(4, 1, 1, 16)
    denoise = Exact(NoiseSchedule.linear(1000), 0.0, 0.25)
    assert tuple(choose_low_band(denoise, PLAN, images, range(8))[0].values()) == (*GAIN_CHOICES[0], 0.0)


def test_one_image_is_enough_to_choose() -> None:
    denoise = Exact(NoiseSchedule.linear(1000), 0.0, 0.25)
    settings, _ = choose_low_band(denoise, PLAN, torch.zeros(1, 1, 1, 16), range(2))
    assert set(settings) == set(LOW_BAND_FIELDS)


def test_denoiser_is_given_the_spectrum() -> None:
    seen = []

    class Recording(Exact):
        def __call__(self, x: Tensor, t: Tensor) -> Prediction:
            seen.append(self.spectrum)
            return super().__call__(x, t)

    images = 0.5 * torch.randn((4, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    denoise = Recording(NoiseSchedule.linear(1000), 0.0, 0.25)
    found = calibration.calibrate_presets(denoise, images)  # type: ignore[arg-type]
    assert set(seen) == {found.spectrum}
    assert len(found.spectrum) == 22
    assert set(found.low_band) == {"fast", "draft"}
    assert set(found.octave_gains) == {"fast", "draft"}
