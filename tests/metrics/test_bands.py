"""Figures of samples against their references, on images whose figures are known."""

import math

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.metrics.bands import frechet_distance, grain_ratios, measure, octave_ratios

LOW_PASS = LowPassFilter((16, 16), 4, orthogonal=True)


def images(count: int, seed: int) -> Tensor:
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_references_in_the_samples_place() -> None:
    figures = measure(images(40, 0), images(40, 0), 4)
    assert (figures["energy"], figures["worst"], figures["low"]) == (1, 1, 0)
    assert figures["high"] == pytest.approx(0, abs=1e-9)


def test_energy_is_of_the_high_band_alone() -> None:
    y = images(40, 0)
    high = y - LOW_PASS(y)
    figures = measure(LOW_PASS(y) + 0.5 * high, y, 4)
    assert figures["energy"] == pytest.approx(0.25) and figures["worst"] == pytest.approx(0.25)
    assert figures["low"] == pytest.approx(0, abs=1e-12)
    # Half the size about the mean: each deviation, and the mean, is off by a half.
    components = 39
    centred = high - high.mean(0)
    _, sizes, axes = torch.linalg.svd(centred.flatten(1), full_matrices=False)
    variance = sizes[:components].square().sum() / 39
    mean = (high.mean(0).flatten() @ axes[:components].mT).square().sum()
    assert figures["high"] == pytest.approx(float(0.25 + 0.25 * mean / variance), rel=1e-6)


def test_the_worst_image_is_told() -> None:
    y = images(10, 0)
    x = y.clone()
    x[3] = LOW_PASS(y)[3] + 3 * (y - LOW_PASS(y))[3]
    assert measure(x, y, 4)["worst"] == pytest.approx(9)


def test_low_is_in_pixels() -> None:
    y = images(10, 0)
    assert measure(y + 0.1, y, 4)["low"] == pytest.approx(0.1)


def test_frechet_distance_of_normals_by_hand() -> None:
    """(3 - 1)^2 for the means and (2 - 1)^2 for the deviations, in one dimension; twice that in two."""
    a = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64) / math.sqrt(4 / 3)
    b = 3 + 2 * a
    assert frechet_distance(1 + a, b) == pytest.approx(5)
    both = torch.cat([a, a.roll(1, 0).sort(0).values], dim=1)
    assert frechet_distance(1 + both, 3 + 2 * both) == pytest.approx(10)


def test_octaves_by_hand() -> None:
    """A wave of 3/8 cycle a pixel is in the finest octave, one of 3/32 two below; means are in none."""
    n = torch.arange(32, dtype=torch.float64) + 0.5
    fine, coarse = (torch.cos(2 * math.pi * f * n).expand(1, 1, 32, 32) for f in (3 / 8, 3 / 32))
    white = torch.randn((4, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert octave_ratios(white, 2 * white + 3) == pytest.approx([0.25] * 4)
    base = octave_ratios(fine + coarse + white, white)
    assert base[3] > 1.5
    assert base[1] > 1.5
    assert base[2] < 1.5
    ratios = octave_ratios(fine + 3 * coarse + 5, fine + coarse)
    assert ratios[1] == pytest.approx(9, rel=1e-3)
    assert ratios[3] == pytest.approx(1, rel=1e-3)


def test_dots_and_stripes_that_no_octave_shows() -> None:
    """A checkerboard and stripes, both of two pixels and small beside white noise; each is seen by its own ratio."""
    white = torch.randn((64, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = torch.arange(32)
    checkerboard = 0.3 * (1.0 - 2.0 * ((n[:, None] + n) % 2))
    stripes = 0.3 * (1.0 - 2.0 * (n % 2)).expand(32, 32)
    assert grain_ratios(white, white) == (1, 1)
    assert octave_ratios(white + checkerboard, white)[-1] < 1.2
    dots, lines = grain_ratios(white + checkerboard, white)
    assert dots > 5 and lines == pytest.approx(1, abs=0.1)
    dots, lines = grain_ratios(white + stripes, white)
    assert dots == pytest.approx(1, abs=0.15) and lines > 2
