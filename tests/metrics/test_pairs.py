"""Figures of pairs, by hand."""

import math

import pytest
import torch

from ilvr_lightning.metrics.pairs import pair_figures, pairwise_rms


def images(count: int, side: int = 16) -> torch.Tensor:
    return 2 * torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(count)) - 1


def test_by_hand() -> None:
    """All pixels differ by 0.1 of the range: L2 is 0.1 sqrt(3 * 16 * 16), PSNR 20 dB, the low band differs by 0.2."""
    y = 0.5 * images(2)
    found = pair_figures(y + 0.2, y, 4)
    assert found["L2"].tolist() == pytest.approx([0.1 * math.sqrt(768)] * 2, rel=1e-5)
    assert found["PSNR"].tolist() == pytest.approx([20, 20], rel=1e-5)
    assert found["low-band error"].sqrt().tolist() == pytest.approx([0.2] * 2, rel=1e-5)
    assert "low-band error" not in pair_figures(y, y)


def test_equal_images() -> None:
    found = pair_figures(images(2), images(2))
    assert (found["L2"].tolist(), found["PSNR"].tolist()) == ([0, 0], [100, 100])
    assert found["SSIM"].tolist() == pytest.approx([1, 1])


def test_ssim_is_that_of_the_window_of_11_pixels() -> None:
    """At 11 px the window fits once: means, variances and covariance under its weights, per channel."""
    x, y = images(1, 11).double(), images(2, 11)[:1].double()
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    weights = torch.outer(g, g) / g.sum() ** 2
    a, b = (x + 1) / 2, (y + 1) / 2
    ma, mb, aa, bb, ab = ((weights * each).sum((2, 3)) for each in (a, b, a * a, b * b, a * b))
    c1, c2 = 0.01**2, 0.03**2
    by_hand = ((2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)) / ((ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2))
    assert pair_figures(x, y)["SSIM"].item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_pairwise_rms() -> None:
    x = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert pairwise_rms(x) == pytest.approx((1 + 3 + 2) / 3)
