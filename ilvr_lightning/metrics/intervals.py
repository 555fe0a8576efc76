"""Intervals of figures of sets of images, whatever the figure is: from random halves of the sets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Figures = Callable[..., Mapping[str, float]]
"""Takes the rows (n,) that are chosen of each set, and gives figures of them by their names."""
REPLICATES = 100
"""So many halves are drawn. The width of an interval is then known to 7%."""
MOST_DRAWN = 2000
"""A half has at most so many units; of larger sets a smaller part is drawn."""
FEWEST_UNITS = 4
"""A set of fewer units gives no interval."""
FEWEST_DRAWN = 2
"""Nor does one of which so few would be drawn that no distance can be computed."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure and what is known about its chance."""

    value: float
    error: float = math.nan
    """The standard error; NaN where it is not known."""
    degrees: float = math.inf
    """The degrees of freedom of the error."""

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval: the quantile of Student's t by Cornish and Fisher's series."""
        return (1.95996 + 2.3722 / self.degrees + 2.8225 / self.degrees**2) * self.error


def with_intervals(
    figures: Figures, units: Sequence[Tensor], replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Figure]:
    """Figures of all images, with standard errors from random halves of the sets (Shao and Wu 1989).

    Halves are drawn without replacement, unlike those of the bootstrap: an image that is drawn twice would be its own
    nearest neighbour and raise Frechet distances. Half of n independent values deviates from all of them by as much as
    all of them deviate from the truth, so that the spread of the halves is the standard error. It is that of the figure
    for so many images: a bias that depends on their number, as that of the Frechet distance, is no part of it.

    Args:
        figures: what is computed, of rows of each set.
        units: for each set the unit (n,) of each row; rows of one unit, such as the samples of one source, are drawn
            together.
        replicates: the number of halves; 0 gives no errors.
        seed: of the halves.
    """
    values = figures(*(torch.arange(len(each)) for each in units))
    numbered = [torch.unique(each, return_inverse=True)[1] for each in units]
    counts = [int(each.max()) + 1 for each in numbered]
    share = min(0.5, MOST_DRAWN / max(counts))
    if replicates < 2 or min(counts) < FEWEST_UNITS or round(share * min(counts)) < FEWEST_DRAWN:
        return {name: Figure(value=value) for name, value in values.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(replicates):
        rows = []
        for unit, count in zip(numbered, counts, strict=True):
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[torch.randperm(count, generator=generator)[: round(share * count)]] = True
            rows.append(chosen[unit].nonzero()[:, 0])
        drawn.append(figures(*rows))
    scale, degrees = math.sqrt(share / (1 - share)), min(replicates, *counts) - 1
    return {
        name: Figure(value=value, error=scale * _deviation([each[name] for each in drawn]), degrees=degrees)
        for name, value in values.items()
    }


def _deviation(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std())
