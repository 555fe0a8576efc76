"""Whether an image and the samples after its low band are exchangeable, as they are if the sampler is right.

An image x drawn from the data and K draws from p(x | phi_N(x)) have the same distribution in any order. So the rank of
the image among its samples is uniform in every scalar, shares of samples are probabilities, and no classifier tells the
image from the samples. The limits and p values here hold exactly, whatever the dependence between scalars: under
exchangeability any of the K + 1 members may play the image, and members chosen at random give the null distribution.

Groups are tensors (R, M, ...): R references of M = K + 1 members, the image first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PERMUTATIONS = 1000
"""So many random choices of the image make a null distribution."""
BINS = 6
"""Shares of samples are rounded to this many values, 0 to 1, for the curve of reliability."""


@dataclass(frozen=True, kw_only=True)
class RankTest:
    """Ranks of R images among their samples in S scalars, against the uniform distribution over M ranks."""

    histogram: Tensor
    """(S, M) share of the references at each rank; its cumulative sum is the coverage at credibility k / M."""
    mean: Tensor
    """(S,) mean rank over 0..1: above 0.5 the images have more of the scalar than the samples."""
    spread: Tensor
    """(S,) mean square of the rank's distance from 1/2, over that of uniform ranks: above 1 the samples vary too little
    or are biased, below 1 they vary too much."""
    ks: Tensor
    """(S,) Kolmogorov-Smirnov distance."""
    gap: Tensor
    """(S,) mean of |coverage - credibility| over the credibilities k / M (for distances from random points: TARP, Lemos
    et al. 2023)."""
    p: Tensor
    """(S,) p value of the Kolmogorov-Smirnov distance."""
    pooled_p: float
    """p value of the mean of the distances over the scalars."""
    pooled_spread: tuple[float, float]
    """Mean of the spread over the scalars, and its standard error over the references."""
    pooled_gap: tuple[float, float]
    """Mean of the gap over the scalars, and the 95% limit under exchangeability."""
    band: Tensor
    """(2, M) the central 95% of the mean histogram under exchangeability."""
    coverage_band: Tensor
    """(2, M) the same of its cumulative sum."""


def rank_test(values: Tensor, seed: int = 0) -> RankTest:
    """Test the ranks of images among their samples; ties are broken at random.

    Args:
        values: (R, M, S) scalars of the members, the image first.
        seed: of the ties and of the null distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = _ranks(values, generator)
    members = ranks.shape[1]
    histogram = _histogram(ranks[:, 0], members)
    ks, gap = _distances(histogram)
    null = [_histogram(chosen, members) for chosen in _chosen(ranks, generator)]
    null_ks, null_gap = (torch.stack(each) for each in zip(*map(_distances, null), strict=True))
    null_mean = torch.stack([each.mean(0) for each in null])
    place = (ranks[:, 0].double() + 0.5) / members
    spread = 12 * (place - 0.5).square() / (1 - 1 / members**2)
    return RankTest(
        histogram=histogram, mean=place.mean(0), spread=spread.mean(0), ks=ks, gap=gap,
        p=_p_value(ks, null_ks),
        pooled_p=float(_p_value(ks.mean(), null_ks.mean(1))),
        pooled_spread=mean_and_error(spread.mean(1)),
        pooled_gap=(float(gap.mean()), float(null_gap.mean(1).quantile(0.95))),
        band=_central_95(null_mean), coverage_band=_central_95(null_mean.cumsum(1)),
    )  # fmt: skip


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of values (R,) and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _ranks(values: Tensor, generator: torch.Generator) -> Tensor:
    """(R, M, S) for each member the number of members below it."""
    shuffle = torch.rand(values.shape, generator=generator).argsort(1)
    order = values.cpu().gather(1, shuffle).argsort(stable=True, dim=1).argsort(dim=1)
    return torch.empty_like(order).scatter_(1, shuffle, order)


def _chosen(groups: Tensor, generator: torch.Generator) -> list[Tensor]:
    """PERMUTATIONS choices of one member per group: (R, ...) each."""
    rows = torch.arange(len(groups))
    return [
        groups[rows, torch.randint(groups.shape[1], (len(groups),), generator=generator)] for _ in range(PERMUTATIONS)
    ]


def _histogram(ranks: Tensor, members: int) -> Tensor:
    return F.one_hot(ranks, members).double().mean(0)


def _distances(histogram: Tensor) -> tuple[Tensor, Tensor]:
    members = histogram.shape[-1]
    credibility = torch.arange(1, members, dtype=torch.float64) / members
    differences = (histogram.cumsum(-1)[..., :-1] - credibility).abs()
    return differences.amax(-1), differences.mean(-1)


def _p_value(observed: Tensor, null: Tensor) -> Tensor:
    return (1 + (null >= observed - 1e-9).sum(0)) / (1 + len(null))


def _central_95(null: Tensor) -> Tensor:
    return torch.stack([torch.nanquantile(null, q, dim=0) for q in (0.025, 0.975)])


def brier(share: Tensor, truth: Tensor) -> Tensor:
    """(R,) squared distance of probabilities (R, V) of an attribute's values from the truth (R, V), 0 or 1."""
    return (share - truth).square().sum(1)


def fair_brier(seen: Tensor, truth: Tensor) -> Tensor:
    """(R,) the Brier score of infinitely many samples, without bias from K of them (Ferro 2014).

    Args:
        seen: (R, K, V) 1 where a sample shows a value of the attribute, else 0.
        truth: (R, V) the same of the image.
    """
    share = seen.mean(1)
    return brier(share, truth) - (share * (1 - share)).sum(1) / (seen.shape[1] - 1)


def expected_brier(seen: Tensor) -> Tensor:
    """(R,) the Brier score that samples (R, K, V) would have if their shares were the true probabilities."""
    share, count = seen.mean(1), seen.shape[1]
    return (share * (1 - share)).sum(1) * count / (count - 1)


def brier_excess(seen: Tensor, truth: Tensor, seed: int = 0) -> tuple[float, float]:
    """How far the Brier score exceeds what it would be if the shares were the true probabilities, over the references.

    Args:
        seen: (R, M, V) 1 where a classifier sees a value of an attribute, else 0; the image first.
        truth: (R, V) what the image truly has.
        seed: of the null distribution.

    Returns:
        The mean of fair_brier - expected_brier, and the 95% limit of its size under exchangeability.
    """
    samples = seen.shape[1] - 1

    def excess(share: Tensor, truth: Tensor) -> Tensor:
        return (brier(share, truth) - (share * (1 - share)).sum(1) * (samples + 1) / (samples - 1)).mean()

    total = seen.sum(1)
    null = [excess((total - chosen) / samples, chosen) for chosen in _chosen(seen, torch.Generator().manual_seed(seed))]
    return float(excess(seen[:, 1:].mean(1), truth)), float(torch.stack(null).abs().quantile(0.95))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How often attributes are true that a share of the samples shows, in BINS of the share."""

    share: Tensor
    """(BINS,) mean share; NaN where a bin is empty, as below."""
    observed: Tensor
    """(BINS,) how often the attribute is true."""
    band: Tensor
    """(2, BINS) the central 95% of that under exchangeability. It leaves the diagonal: a share of few samples is itself
    uncertain, so that 8 of 8 is no certainty."""
    error: float
    """Mean of |observed - share| over all pairs of reference and value (the expected calibration error)."""
    limit: float
    """The 95% limit of the error under exchangeability."""


def reliability(seen: Tensor, truth: Tensor, seed: int = 0) -> Reliability:
    """Compare shares of samples with the truth.

    Args:
        seen: (R, M, V) 1 where a classifier sees a value of an attribute, else 0; the image first.
        truth: (R, V) what the image truly has.
        seed: of the null distribution.
    """
    share, observed, error = _curve(seen[:, 1:].mean(1), truth)
    total, others = seen.sum(1), seen.shape[1] - 1
    null = [_curve((total - chosen) / others, chosen) for chosen in _chosen(seen, torch.Generator().manual_seed(seed))]
    band = _central_95(torch.stack([observed for _, observed, _ in null]))
    limit = torch.tensor([error for *_, error in null]).quantile(0.95)
    return Reliability(share=share, observed=observed, band=band, error=error, limit=float(limit))


def _curve(share: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, float]:
    bins = (share * (BINS - 1)).round().long().flatten()
    count, shares, true = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, each.double().flatten())
        for each in (torch.ones_like(share), share, truth)
    )
    return shares / count, true / count, float((true - shares).abs().sum() / count.sum())


def paired_auroc(features: Tensor, folds: int = 5, permutations: int = 100) -> tuple[float, float]:
    """How well a classifier tells the image from the samples of its own low band: 0.5 not at all, 1 always.

    A logistic regression on the differences from the group's mean and their squares, cross-validated by references.

    Args:
        features: (R, M, D), the image first.
        folds: parts of the references.
        permutations: random choices of the image, for the deviation.

    Returns:
        The area under the ROC curve within groups, averaged over the references, and its standard deviation under
        exchangeability. (Folds share references, so that the error over references is a third too small.)
    """

    def area(z: Tensor) -> float:
        scores = _held_out_scores(z, folds)
        return float(_share_below(scores[:, :1], scores[:, 1:]).mean())

    return _with_deviation(area, _with_squares(features - features.mean(1, keepdim=True)), permutations)


def marginal_auroc(features: Tensor, folds: int = 5, permutations: int = 100) -> tuple[float, float]:
    """How well a classifier tells images from samples if it does not know which belong together.

    Args:
        features: (R, M, D), the image first.
        folds: parts of the references.
        permutations: random choices of the image, for the deviation.

    Returns:
        The area under the ROC curve within folds, averaged over the images, and its standard deviation under
        exchangeability.
    """

    def area(z: Tensor) -> float:
        scores = _held_out_scores(z, folds)
        parts = [scores[k::folds] for k in range(folds)]
        return float(torch.cat([_share_below(part[:, 0], part[:, 1:].flatten()) for part in parts]).mean())

    return _with_deviation(area, _with_squares(features), permutations)


def _with_deviation(area: Callable[[Tensor], float], features: Tensor, permutations: int) -> tuple[float, float]:
    generator, rows = torch.Generator().manual_seed(0), torch.arange(len(features))
    null = []
    for _ in range(permutations):
        chosen = torch.randint(features.shape[1], (len(features),), generator=generator)
        changed = features.clone()
        changed[:, 0], changed[rows, chosen] = features[rows, chosen], features[:, 0]
        null.append(area(changed))
    return area(features), float(torch.tensor(null).std())


def _share_below(x: Tensor, others: Tensor) -> Tensor:
    """For each of x (..., n) the share of others (..., m) below it, ties counting half."""
    difference = x[..., :, None] - others[..., None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean(-1)


def _with_squares(features: Tensor) -> Tensor:
    """(R, M, 2D) standardised features and their squares, outliers clamped."""
    flat = features.double().flatten(0, 1)
    z = ((features.double() - flat.mean(0)) / flat.std(0).clamp(min=1e-9)).clamp(-4, 4)
    return torch.cat([z, z.square() - 1], 2)


def _held_out_scores(features: Tensor, folds: int) -> Tensor:
    """(R, M) log-odds of being the image, each from a regression that has not seen its reference."""
    fold, scores = torch.arange(len(features)) % folds, features.new_empty(features.shape[:2])
    for k in range(folds):
        scores[fold == k] = features[fold == k] @ _logistic_regression(features[fold != k])
    return scores


def _logistic_regression(features: Tensor, ridge: float = 1.0, steps: int = 20) -> Tensor:
    """(D,) weights that tell the first member of each group (R, M, D) from the others; both classes weigh the same.

    Newton's method on the log-likelihood minus ridge/2 times the squared weights.
    """
    x = torch.cat([features, torch.ones_like(features[..., :1])], 2).flatten(0, 1)
    is_image = torch.zeros_like(features[..., 0])
    is_image[:, 0] = 1
    importance = torch.where(is_image == 1, 1.0, 1 / (features.shape[1] - 1)).flatten()
    penalty = torch.diag(torch.tensor([ridge] * features.shape[2] + [1e-6], dtype=x.dtype))
    weights = x.new_zeros(x.shape[1])
    for _ in range(steps):
        p = torch.sigmoid(x @ weights)
        gradient = x.mT @ (importance * (p - is_image.flatten())) + penalty @ weights
        curvature = (x.mT * (importance * p * (1 - p))) @ x + penalty
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if float(step.abs().max()) < 1e-5:
            break
    return weights[:-1]
