"""Sets of features (n, d) compared by their nearest neighbours and by a kernel; every sum is in float64."""

import math

import torch
from torch import Tensor

ROWS = 1000
"""Distances are computed for so many rows at once."""
SUPPORT_NEIGHBOURS = 3
"""The neighbour whose distance is the radius of precision and recall (Kynkaanniemi et al. 2019)."""
DENSITY_NEIGHBOURS = 5
"""That of density and coverage (Naeem et al. 2020)."""


def neighbour_figures(samples: Tensor, references: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of samples (n, d) against references (m, d).

    Precision is the share of the samples that lie in a ball of the references, recall the share of the references that
    lie in a ball of the samples (Kynkaanniemi et al. 2019). Density counts the balls of the references that hold a
    sample, coverage is the share of them that hold one (Naeem et al. 2020). NaN where a set is too small for a ball.
    """
    x, y = samples.double(), references.double()
    ball_y, ball_x = _radii(y, SUPPORT_NEIGHBOURS), _radii(x, SUPPORT_NEIGHBOURS)
    wide = _radii(y, DENSITY_NEIGHBOURS)
    inside, holding, nearest = [], [], y.new_full((len(y),), torch.inf)
    reached = torch.zeros(len(y), dtype=torch.bool)
    for rows, radii in zip(torch.split(x, ROWS), torch.split(ball_x, ROWS), strict=True):
        distances = torch.cdist(rows, y)
        inside.append((distances <= ball_y).any(1))
        holding.append((distances <= wide).sum(1))
        reached |= (distances <= radii[:, None]).any(0)
        nearest = torch.minimum(nearest, distances.amin(0))
    figures = {
        "precision": _mean(torch.cat(inside)), "recall": _mean(reached),
        "density": _mean(torch.cat(holding)) / DENSITY_NEIGHBOURS, "coverage": _mean(nearest <= wide),
    }  # fmt: skip
    fewest = {"precision": (y, ball_y), "recall": (x, ball_x), "density": (y, wide), "coverage": (y, wide)}
    return {name: figure if fewest[name][1].isfinite().all() else torch.nan for name, figure in figures.items()}


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """(n,) the distance of each row from its k-th nearest neighbour; infinite where there are too few."""
    if len(x) <= neighbours:
        return x.new_full((len(x),), torch.inf)
    return torch.cat([torch.cdist(rows, x).kthvalue(neighbours + 1).values for rows in torch.split(x, ROWS)])


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased estimate of the squared MMD under the kernel (x.y / d + 1)^3 (KID of Binkowski et al. 2018).

    Args:
        a: (n, d) features, n of at least 2.
        b: (m, d) features, m of at least 2.
    """
    a, b = a.double(), b.double()
    found = -2 * _kernel_sum(a, b) / (len(a) * len(b))
    for x in (a, b):
        diagonal = float(_kernel(x.square().sum(1), x).sum())
        found += (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))
    return found


def _kernel(products: Tensor, features: Tensor) -> Tensor:
    return (products / features.shape[1] + 1) ** 3


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    return math.fsum(float(_kernel(rows @ b.mT, b).sum()) for rows in torch.split(a, ROWS))


def nearest(x: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The distance (n,) of each row of x (n, d) from the nearest of others (m, d), and which (n,) that is."""
    # Without matrix products, equal rows are at a distance of exactly 0.
    exact = "donot_use_mm_for_euclid_dist"
    all_rows = torch.split(x, ROWS)
    parts = [torch.cdist(rows.double(), others.double(), compute_mode=exact).min(1) for rows in all_rows]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def copies(distances: Tensor, of_held_out: Tensor, chance: float = 0.01) -> Tensor:
    """(n,) whether each image is nearer to a training image than all but a hundredth of the held-out images are.

    Args:
        distances: (n,) from the nearest training image.
        of_held_out: (m,) the same of images that were not trained on.
        chance: the share of held-out images that count as copies.
    """
    return distances < of_held_out.quantile(chance)
