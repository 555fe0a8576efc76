"""The figure of benchmarks.posterior: ranks, coverage and reliability of each row. Needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.exchangeability import RankTest

if TYPE_CHECKING:
    from benchmarks.posterior import Result

BAND = {"color": "0.85", "linewidth": 0}
"""What a right sampler gives in 95 of 100 runs."""


def draw(results: "dict[str, Result]", factor: int, path: Path) -> None:
    """Write the figure, one line of panels per row of the table."""
    mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9.5, 1.75 * len(results) + 0.5), layout="constrained")
    axes = figure.subplots(len(results), 4, squeeze=False)
    for (name, result), panels in zip(results.items(), axes, strict=True):
        _ranks(panels[0], result.octaves)
        _ranks(panels[1], result.attributes)
        _coverage(panels[2], result)
        _reliability(panels[3], result)
        panels[0].set_ylabel(name.replace(", ", ",\n"), fontweight="bold")
    titles = ("rank in octave energies", "rank in attributes", "TARP: coverage", "attributes: reliability")
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    labels = ("rank of the image", "rank of the image", "credibility", "share of samples")
    for panel, label in zip(axes[-1], labels, strict=True):
        panel.set_xlabel(label)
    axes[0][2].legend(fontsize=7, frameon=False, loc="upper left")
    figure.suptitle(f"N={factor}; grey: a right sampler, 95%", fontsize=9)
    figure.savefig(path, dpi=100)


def _ranks(panel: Any, test: RankTest) -> None:
    """Density of the ranks over 0..1, averaged over the scalars; 1 if uniform."""
    members = test.histogram.shape[1]
    edges = (torch.arange(members + 1) / members).tolist()
    low, high = ((members * each).tolist() for each in test.band)
    panel.fill_between(edges, [*low, low[-1]], [*high, high[-1]], step="post", **BAND)
    panel.stairs((members * test.histogram.mean(0)).tolist(), edges, baseline=None, color="C0", linewidth=1.2)
    panel.axhline(1, color="0.5", linewidth=0.6)
    panel.set(xlim=(0, 1), ylim=(0, None), xticks=(0, 0.5, 1))


def _coverage(panel: Any, result: "Result") -> None:
    members = result.pixels.histogram.shape[1]
    credibility = (torch.arange(members + 1) / members).tolist()
    panel.fill_between(credibility, *([0.0, *each.tolist()] for each in result.pixels.coverage_band), **BAND)
    panel.plot((0, 1), (0, 1), color="0.5", linewidth=0.6)
    for label, test, colour in (("pixels", result.pixels, "C0"), ("features", result.features, "C1")):
        panel.plot(
            credibility, [0.0, *test.histogram.mean(0).cumsum(0).tolist()], label=label, color=colour, linewidth=1.2
        )
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))


def _reliability(panel: Any, result: "Result") -> None:
    curve = result.reliability
    known = ~curve.share.isnan()
    low, high = (each[known].tolist() for each in curve.band)
    panel.fill_between(curve.share[known].tolist(), low, high, **BAND)
    panel.plot((0, 1), (0, 1), color="0.5", linewidth=0.6)
    panel.plot(curve.share[known].tolist(), curve.observed[known].tolist(), "o-", color="C0", markersize=3, linewidth=1)
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
