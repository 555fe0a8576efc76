"""Known truths: exchangeable draws pass, too little variance and a bias are found, Brier scores are the formula's."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.exchangeability import (
    brier,
    brier_excess,
    expected_brier,
    fair_brier,
    marginal_auroc,
    paired_auroc,
    rank_test,
    reliability,
)


def groups(scale: float = 1.0, bias: float = 0.0, references: int = 200, samples: int = 9, features: int = 4) -> Tensor:
    """Images m + z and samples m + bias + scale z, where m is known to both: (R, M, D)."""
    generator = torch.Generator().manual_seed(4)
    known = 3 * torch.randn(references, 1, features, generator=generator, dtype=torch.float64)
    z = torch.randn(references, samples + 1, features, generator=generator, dtype=torch.float64)
    return known + torch.cat([z[:, :1], bias + scale * z[:, 1:]], 1)


def test_ranks_of_exchangeable_draws_are_uniform() -> None:
    test = rank_test(groups())
    assert test.histogram.shape == (4, 10)
    assert test.histogram.sum(1).tolist() == pytest.approx([1] * 4)
    assert float(test.p.min()) > 0.01
    assert test.pooled_p > 0.01
    spread, error = test.pooled_spread
    assert abs(spread - 1) < 3 * error
    assert test.pooled_gap[0] < test.pooled_gap[1]
    credibility = torch.arange(1, 10) / 10
    assert bool(((test.coverage_band[0, :-1] < credibility) & (test.coverage_band[1, :-1] > credibility)).all())
    assert bool(((test.band[0] < 0.1) & (test.band[1] > 0.1)).all())


def test_p_values_of_exchangeable_draws_are_uniform() -> None:
    p = rank_test(groups(references=40, features=300)).p
    assert 0.02 < float((p < 0.1).float().mean()) < 0.18
    assert 0.4 < float(p.mean()) < 0.6


@pytest.mark.parametrize(("scale", "over_one"), [(0.5, True), (2.0, False)])
def test_wrong_variance_is_found(scale: float, over_one: bool) -> None:
    test = rank_test(groups(scale))
    assert test.pooled_p < 0.005
    assert (test.pooled_spread[0] > 1.3) if over_one else (test.pooled_spread[0] < 0.7)
    assert test.mean.tolist() == pytest.approx([0.5] * 4, abs=0.08)
    assert test.pooled_gap[0] > test.pooled_gap[1]


def test_bias_is_found_with_its_sign() -> None:
    test = rank_test(groups(bias=-0.7))
    assert test.pooled_p < 0.005
    assert float(test.mean.min()) > 0.6


def test_equal_values_are_ranked_at_random() -> None:
    test = rank_test(torch.zeros(2000, 4, 1))
    assert test.histogram[0].tolist() == pytest.approx([0.25] * 4, abs=0.04)


def test_classifier_cannot_tell_exchangeable_draws_apart() -> None:
    for auroc in (paired_auroc, marginal_auroc):
        area, deviation = auroc(groups(), permutations=10)
        assert abs(area - 0.5) < 3 * deviation
        assert 0.005 < deviation < 0.06


@pytest.mark.parametrize(("scale", "bias"), [(0.5, 0.0), (1.0, 0.7)])
def test_classifier_finds_what_the_marginal_distribution_hides(scale: float, bias: float) -> None:
    x = groups(scale, bias)
    assert paired_auroc(x, permutations=2)[0] > 0.65
    assert marginal_auroc(x, permutations=2)[0] < 0.65  # the known part varies more


def test_marginal_classifier_finds_another_distribution() -> None:
    assert marginal_auroc(groups(bias=9.0), permutations=2)[0] > 0.9


def attribute(probability: Tensor, told: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Images that have a value with `probability` (R,), and samples that show it with the probability `told`: seen
    (R, M, 2), with the image first, and the truth (R, 2)."""
    generator = torch.Generator().manual_seed(2)
    chance = torch.cat([probability[:, None], told[:, None].expand(-1, members - 1)], 1)
    first = (torch.rand(chance.shape, generator=generator) < chance).double()
    seen = torch.stack([first, 1 - first], 2)
    return seen, seen[:, 0]


def test_brier_scores_of_known_probabilities() -> None:
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert brier(torch.tensor([[0.7, 0.3], [0.7, 0.3]]), truth).tolist() == pytest.approx([0.18, 0.98])
    p = torch.full((20_000,), 0.3)
    for members in (3, 9):  # the fair score does not depend on the number of samples
        seen, truth = attribute(p, p, members)
        assert float(fair_brier(seen[:, 1:], truth).mean()) == pytest.approx(2 * 0.3 * 0.7, abs=0.01)
        assert float(expected_brier(seen[:, 1:]).mean()) == pytest.approx(2 * 0.3 * 0.7, abs=0.01)


def test_brier_score_of_samples_that_are_too_sure_exceeds_what_they_expect() -> None:
    seen, truth = attribute(torch.full((20_000,), 0.7), torch.full((20_000,), 0.9), 9)
    assert float(expected_brier(seen[:, 1:]).mean()) == pytest.approx(0.18, abs=0.01)
    assert float(fair_brier(seen[:, 1:], truth).mean()) == pytest.approx(0.42 + 2 * 0.2**2, abs=0.01)


@pytest.mark.parametrize(("true", "told", "excess"), [(0.7, 0.7, 0.0), (0.7, 0.9, 0.32), (0.95, 0.7, -0.2)])
def test_excess_of_the_brier_score(true: float, told: float, excess: float) -> None:
    """Of samples that are right, too sure and not sure enough."""
    found, limit = brier_excess(*attribute(torch.full((3000,), true), torch.full((3000,), told), 9))
    assert found == pytest.approx(excess, abs=0.03)
    assert (abs(found) < 1.2 * limit) == (excess == 0)


def test_reliability_of_right_shares_lies_in_its_band() -> None:
    p = torch.rand(1500, generator=torch.Generator().manual_seed(3))
    curve = reliability(*attribute(p, p, 9))
    inside = (curve.observed >= curve.band[0]) & (curve.observed <= curve.band[1])
    assert int(inside.sum()) >= 5
    assert curve.error < 1.1 * curve.limit
    assert float(curve.observed[-1]) < 0.97  # 8 of 8 is no certainty
    assert float(curve.band[0, -1]) < 0.97


def test_reliability_finds_samples_that_are_too_sure() -> None:
    p = torch.rand(1500, generator=torch.Generator().manual_seed(3))
    curve = reliability(*attribute(p, (p > 0.5).float(), 9))
    assert curve.error > 2 * curve.limit
    assert float(curve.observed[-1]) == pytest.approx(0.75, abs=0.05)
    assert math.isnan(float(curve.observed[2]))  # no reference has such a share
