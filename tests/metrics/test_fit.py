"""Whether a reference fits: p values that hold what they promise, scores that find what is foreign."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.plan import FitScores
from ilvr_lightning.metrics.fit import (
    Fit,
    check_reference,
    fit_scores,
    misfits,
    octaves_of,
    p_values,
    smallest_fitting,
    usable_factors,
)
from tests.support.gaussian import SCHEDULE, spectrum_2d

SIDE = 16
DATA = spectrum_2d(SIDE)


class Domain:
    """Gaussian images and their exact denoiser, with the scores of so many of them."""

    schedule, spectrum = SCHEDULE, DATA.spectrum

    def __init__(self, count: int = 0) -> None:
        self.fit_scores: FitScores = fit_scores(self, draw(count, 0)) if count else {}

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        prediction = DATA.denoise(x.double(), t)
        return Prediction(x0=prediction.x0.float(), eps=prediction.eps.float())


def draw(count: int, seed: int) -> Tensor:
    values, vectors = DATA.eigen
    white = torch.randn(count, SIDE**2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (white * values.sqrt() @ vectors.mT).reshape(count, 1, SIDE, SIDE).float()


@cache
def domain() -> Domain:
    return Domain(200)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_at_most_alpha_of_the_domains_images_are_refused(alpha: float) -> None:
    """At each N alone, and at any of several; within the binomial error of 300 images and of 200 scores."""
    test, known = draw(300, 1), domain().fit_scores
    factors = list(known)
    own = torch.stack([score.mean(1) for score in misfits(domain(), test, factors).values()], 1)
    held_out = torch.stack([torch.tensor(known[n]).mean(1) for n in factors], 1)
    most = alpha + 3 * math.sqrt(alpha * (1 - alpha) * (1 / 300 + 1 / 200))
    refused_at_any = sum(bool((p_values(score, held_out) <= alpha).any()) for score in own) / 300
    assert refused_at_any <= most
    for i in range(len(factors)):
        p = [float(p_values(score[i, None], held_out[:, i, None])) for score in own]
        assert sum(each <= alpha for each in p) / 300 <= most
        assert sum(each <= 0.5 for each in p) / 300 == pytest.approx(0.5, abs=0.15)


def test_a_single_look_is_split_conformal() -> None:
    calibration = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    for score, above in ((0.5, 4), (2.0, 3), (2.5, 2), (9.0, 0)):
        assert float(p_values(torch.tensor([score]), calibration)) == pytest.approx((1 + above) / 5)


def test_the_corrected_p_is_exact_for_any_dependence() -> None:
    """Each image in turn against the others: no more than a share alpha has a p of alpha at any of its looks."""
    for dependence in (0.0, 0.7, 1.0):
        generator = torch.Generator().manual_seed(0)
        common, own = torch.randn(100, 1, generator=generator), torch.randn(100, 5, generator=generator)
        scores = dependence * common + (1 - dependence) * own
        least = [float(p_values(scores[i], scores[torch.arange(100) != i]).min()) for i in range(100)]
        for alpha in (0.01, 0.05, 0.1, 0.5):
            assert sum(each <= alpha + 1e-9 for each in least) <= 100 * alpha + 1e-9


def test_what_is_foreign_is_refused_and_named() -> None:
    noise = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2.5
    at_two = check_reference(domain(), noise, [2])[0]
    assert not at_two.fits and at_two.p == pytest.approx(1 / 201) and at_two.reason.startswith("too much detail at ")
    bright = draw(1, 3) * 0.2 + 0.9
    assert [fit.reason for fit in check_reference(domain(), bright, [8])] == ["its mean colour"]
    assert str(at_two) == f"does not fit (p = 0.005: {at_two.reason})"
    own = check_reference(domain(), draw(1, 3))
    assert [fit.factor for fit in own] == [2, 4, 8] and all(fit.fits for fit in own)
    assert str(own[0]) == f"fits (p = {own[0].p:.2g})"


def test_detail_that_the_low_band_does_not_see_does_not_matter() -> None:
    """A fine checkerboard on a picture of the domain is seen at N=2, not at N=8."""
    checks = torch.full((SIDE, SIDE), 1.5)
    checks[::2, 1::2] = checks[1::2, ::2] = -1.5
    y = draw(1, 3) + checks.roll(0) * torch.linspace(0, 1, SIDE)
    assert check_reference(domain(), y, [8])[0].p == pytest.approx(
        check_reference(domain(), draw(1, 3), [8])[0].p, abs=0.1
    )


def test_scores_depend_neither_on_company_nor_on_order() -> None:
    images = draw(6, 2)
    together = misfits(domain(), images, [4])[4]
    apart = misfits(domain(), images.flip(0), [4], batch=2)[4].flip(0)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_octaves() -> None:
    assert octaves_of(4, 4).reshape(4, 4).tolist() == [[0, 1, 2, 2], [1, 1, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert octaves_of(1, 8).tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert usable_factors((64, 64)) == [2, 4, 8, 16, 32] and usable_factors((48, 64)) == [2, 4, 8, 16]


def test_what_cannot_be_checked() -> None:
    y = draw(1, 3)
    with pytest.raises(ValueError, match="holds no scores of held-out images"):
        check_reference(Domain(), y)
    with pytest.raises(ValueError, match="scored at N=2, 4, 8 alone: got N=16"):
        check_reference(domain(), y, [16])
    with pytest.raises(ValueError, match=r"200 held-out images were scored; alpha=0\.001 needs 999"):
        check_reference(domain(), y, alpha=0.001)
    check_reference(domain(), y, [8], alpha=1 / 201)
    with pytest.raises(ValueError, match="images of another size were scored: got 8x8"):
        check_reference(domain(), y[..., :8, :8], [2])


def test_the_smallest_factor_that_fits() -> None:
    def found(**fits: bool) -> int | None:
        return smallest_fitting([Fit(factor=int(n[1:]), p=0.5, fits=ok, reason="") for n, ok in fits.items()])

    assert found(n2=True, n4=True, n8=True) == 4
    assert found(n2=True, n4=False, n8=True) == 8
    assert found(n2=True, n4=True, n8=False) is None
