"""Principal components of images, and the correction of the high band that they allow."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.components import (
    TRUST_RADIUS,
    Components,
    HighBandCorrection,
    principal_components,
)
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_band import LowBand
from ilvr_lightning.diffusion.low_pass import LowPassFilter, dct_basis
from ilvr_lightning.diffusion.plan import SamplingPlan
from tests.support.gaussian import SCHEDULE, errors, modulated_ar1, nonstationary_2d, solver

SIZE = (8, 8)


def images(count: int, seed: int = 0) -> Tensor:
    """Mixtures of five fixed patterns, and a little noise."""
    patterns = torch.randn((5, 3 * 64), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.randn((count, 5), generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn((count, 192), generator=generator, dtype=torch.float64)
    return (0.3 * shares @ patterns + noise).reshape(count, 3, *SIZE)


def covariance_of(components: Components) -> Tensor:
    """(CHW, CHW) in pixels, of images no larger than the components."""
    rows, columns = (dct_basis(side) for side in SIZE)
    vectors = (rows.mT @ components.vectors.double() @ columns).flatten(1)
    excess = vectors.mT @ ((components.variances - components.residual)[:, None] * vectors)
    return excess + components.residual * torch.eye(192, dtype=torch.float64)


def test_components_are_those_of_the_covariance() -> None:
    x = images(2000)
    components = principal_components([x])
    flat = components.vectors.flatten(1)
    torch.testing.assert_close(flat @ flat.mT, torch.eye(len(flat)), rtol=0, atol=1e-5)
    torch.testing.assert_close(covariance_of(components), x.flatten(1).mT.cov(correction=0), rtol=0, atol=0.01)
    assert len(components.variances) == 128
    assert components.residual == pytest.approx(0.01, rel=0.4)  # the smallest of the eigenvalues


def test_few_images_have_few_components() -> None:
    components = principal_components([images(4)])
    assert len(components.variances) == 3
    assert 0 < components.residual <= float(components.variances.min())


def test_large_images_are_seen_at_their_lowest_frequencies() -> None:
    x = torch.randn((6, 1, 48, 96), generator=torch.Generator().manual_seed(0))
    components = principal_components([x[:4], x[4:]])
    assert components.vectors.shape == (5, 1, 32, 32)
    assert components.size == (48, 96)


def rotations(x: Tensor) -> list[Tensor]:
    return [x.rot90(quarters, (-2, -1)) for quarters in range(4)]


def test_mirrored_and_turned_images_count() -> None:
    """As if all that a training draws had been given."""
    x = images(40)
    mirrored = [x, x.flip(-1)]
    every_view: dict[tuple[str, bool], list[Tensor]] = {
        ("none", False): [x],
        ("horizontal", False): mirrored,
        ("both", False): [*mirrored, x.flip(-2), x.flip(-2, -1)],
        ("none", True): rotations(x),
        ("horizontal", True): [*rotations(x), *rotations(x.flip(-1))],
        ("both", True): [*rotations(x), *rotations(x.flip(-1))],
    }
    found = [covariance_of(principal_components([torch.cat(views)])) for views in every_view.values()]
    for (flip, rotate90), expected in zip(every_view, found, strict=True):
        components = principal_components([x], flip, rotate90)
        torch.testing.assert_close(covariance_of(components), expected, rtol=0, atol=1e-4)  # the rest is cut off
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(found[:5], 2))


def correction(components: Components, factor: int | tuple[int, ...]) -> HighBandCorrection:
    return HighBandCorrection(LowPassFilter(SIZE, factor, orthogonal=True), components)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("lam", [-3.0, 0.0, 2.0])
def test_correction_is_the_regression_on_the_low_band(factor: int, lam: float) -> None:
    """Against dense matrices: (I - phi) G Q (Q^T G Q)^-1 d with G = (C^-1 + snr I)^-1."""
    components = principal_components([images(2000)])
    phi, band = LowPassFilter(SIZE, factor, orthogonal=True), LowBand(SIZE, factor)
    x0, y = images(3, 1), images(3, 2)
    difference = 0.05 * phi(y - x0)
    identity = torch.eye(192, dtype=torch.float64)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance_of(components)) + math.exp(2 * lam) * identity)
    basis = band.coordinates(identity.reshape(192, 3, *SIZE)).flatten(1)  # Q, (CHW, m)
    d = difference.flatten(1) @ basis
    inner = basis.mT @ posterior @ basis
    moved = (torch.linalg.solve(inner, d.mT).mT @ (posterior @ basis).mT).reshape(difference.shape)
    distance = ((d * torch.linalg.solve(inner, d.mT).mT).sum(1) / d.shape[1]).sqrt()
    assert float(distance.max()) < TRUST_RADIUS
    made = correction(components, factor)(difference, lam)[1]
    torch.testing.assert_close(made, moved - phi(moved), rtol=0, atol=1e-6)
    assert float(phi(made).abs().max()) < 1e-12


def test_improbable_low_bands_are_corrected_for_so_much_and_no_more() -> None:
    components = principal_components([images(2000)])
    phi = LowPassFilter(SIZE, 4, orthogonal=True)
    difference = phi(images(2, 1) - images(2, 2))
    shifts = correction(components, 4)

    def correct(d: Tensor, lam: float) -> Tensor:
        return shifts(d, lam)[1]

    far, further = correct(1e3 * difference, 0.0), correct(1e4 * difference, 0.0)
    torch.testing.assert_close(far, further, rtol=1e-9, atol=0)
    assert float(far.abs().max()) < 1e2 * float(correct(difference, 0.0).abs().max())


def test_each_image_has_its_own_factor_and_distance() -> None:
    components = principal_components([images(500)])
    factors = (2, 4, 8)
    x = images(3, 1) * torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    difference = LowPassFilter(SIZE, factors, orthogonal=True)(x)
    together = correction(components, factors)(difference, 0.5)[1]
    for i, factor in enumerate(factors):
        alone = correction(components, factor)(difference[i : i + 1], 0.5)[1]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)


def test_components_survive_a_file() -> None:
    components = principal_components([images(50)])
    plain = components.plain()
    again = Components.from_plain(plain, (3, *SIZE))
    torch.testing.assert_close(again.vectors, components.vectors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.variances, components.variances, rtol=1e-5, atol=0)
    assert again.residual == pytest.approx(components.residual, rel=1e-5)
    assert again.plain() == Components.from_plain(again.plain(), (3, *SIZE)).plain()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [9, 3, 8]}, {"shape": [10**9, 3, 8, 8]}, {"shape": "x"}, {"vectors": "!"}, {"vectors": "AAAA"},
        {"variances": [1.0]}, {"variances": [-1.0] * 49}, {"variances": ["x"] * 49}, {"variances": None},
        {"residual": 0.0}, {"residual": float("nan")}, {"residual": "x"}, {"size": [64, 64]}, {"size": 3},
    ],
)  # fmt: skip
def test_damaged_components_are_refused(change: dict[str, Any]) -> None:
    plain = principal_components([images(50)]).plain()
    with pytest.raises((KeyError, RuntimeError, TypeError, ValueError)):
        Components.from_plain({**plain, **change}, (3, *SIZE))
    with pytest.raises(ValueError, match="the components have the shape"):
        Components.from_plain(plain, (1, *SIZE))


def test_an_exact_denoiser_gets_nearer_to_the_conditional() -> None:
    """Where the covariance is not diagonal in the DCT, and few steps do not find the multiplier."""
    for data, least in ((modulated_ar1(), 2.0), (nonstationary_2d(), 2.0)):
        plan = solver(10, eta=1.0, factor=8)
        without, with_it = (errors(data, replace(plan, high_band_correction=c))[0] for c in (0.0, 1.0))
        assert with_it < without / least


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
def test_noisy_references_are_taken_for_what_they_are(sigma: float) -> None:
    plan = solver(20, eta=1.0, factor=4, reference_sigma=sigma, high_band_correction=1.0)
    for data in (modulated_ar1(), nonstationary_2d()):
        assert errors(data, plan)[0] < 0.003


def test_components_of_another_size_are_not_used() -> None:
    data = nonstationary_2d()
    plan = SamplingPlan(num_steps=3, factor=2, clip=False, high_band_correction=1.0)
    y = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Other:
        components = data.components

        def __call__(self, x: Tensor, t: Tensor) -> Any:
            return replace(SMALL.denoise(x, t))

    runs = [
        generate(Other(), SCHEDULE, replace(plan, high_band_correction=c), seeds=[0], shape=(1, 8, 8), reference=y,
                 x_T=y.clone())
        for c in (0.0, 1.0)
    ]  # fmt: skip
    assert torch.equal(*runs)


SMALL = nonstationary_2d(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high_band_correction": 1.5}, "high_band_correction must be between 0 and 1"),
        ({"high_band_correction": 1.0, "reference_noise": "fresh"}, "high_band_correction needs .*matched"),
        ({"high_band_correction": 1.0, "orthogonal": False}, "high_band_correction needs .*orthogonal=true"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingPlan(**change)


def test_a_denoiser_that_forgets_its_components_is_refused() -> None:
    data = modulated_ar1()

    def wrapped(x: Tensor, t: Tensor) -> Any:
        return data.denoise(x, t)

    plan = SamplingPlan(high_band_correction=1, num_steps=2, factor=4, clip=False)
    with pytest.raises(ValueError, match="needs a denoiser with the attribute `components`"):
        generate(wrapped, SCHEDULE, plan, seeds=[0], shape=(1, *data.shape), reference=torch.zeros(1, 1, *data.shape))
