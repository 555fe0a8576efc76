"""Coordinates of the filter's space, and the spectrum of images."""

import math

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_band import LowBand, natural_spectrum, radial_spectrum
from ilvr_lightning.diffusion.low_pass import LowPassFilter, dct_basis


def images(count: int, height: int = 16, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, 3, height, width), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["cubic", "lanczos3", "box", "ideal"])
@pytest.mark.parametrize("factor", [1, 2, 4, (2, 8)])
def test_coordinates_are_orthonormal_and_span_the_filters_space(kernel: str, factor: int | tuple[int, int]) -> None:
    x = images(2)
    band = LowBand((16, 32), factor, kernel)
    phi = LowPassFilter((16, 32), factor, kernel, orthogonal=True)
    z = band.coordinates(x)
    torch.testing.assert_close(band.pixels(z), phi(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.square().sum((2, 3)), phi(x).square().sum((2, 3)), rtol=0, atol=1e-9)


def test_the_first_coordinate_is_the_mean() -> None:
    x = images(1)
    z = LowBand((16, 32), 4).coordinates(x)
    torch.testing.assert_close(z[:, :, 0, 0].abs(), x.mean((2, 3)).abs() * math.sqrt(16 * 32), rtol=0, atol=1e-12)


def test_a_line_of_pixels_has_coordinates() -> None:
    x = images(1, height=1)
    torch.testing.assert_close(
        LowBand((1, 32), 4).pixels(LowBand((1, 32), 4).coordinates(x)), LowPassFilter((1, 32), 4, orthogonal=True)(x)
    )


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (1, 32)])
def test_radial_spectrum_of_images_whose_spectrum_is_radial(size: tuple[int, int]) -> None:
    """The variances along the coordinates are those of the images, within what interpolation between radii leaves."""
    rows, columns = (torch.arange(side, dtype=torch.float64) / side for side in size)
    radius = max(size) * (rows[:, None].square() + columns.square()).sqrt()
    noise = torch.randn((4000, 1, *size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    down, across = (dct_basis(side) for side in size)
    x = down.mT @ (noise / (1 + radius)) @ across
    spectrum = radial_spectrum(x)
    torch.testing.assert_close(
        torch.tensor(spectrum[:5], dtype=torch.float64), 1 / (1 + torch.arange(5)).double().square(), rtol=0.25, atol=0
    )
    band = LowBand(size, 4)
    ratio = band.coordinates(x).var(0, correction=0)[0] / band.variances(spectrum)
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.4


def test_natural_spectrum_has_the_variance_of_a_pixel() -> None:
    spectrum = natural_spectrum((16, 16))
    everything = LowBand((16, 16), 1).variances(spectrum)
    assert float(everything.sum() - everything[0, 0]) / 256 == pytest.approx(1)
    assert spectrum[0] / spectrum[1] == pytest.approx(4)
