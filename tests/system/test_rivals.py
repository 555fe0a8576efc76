"""The rivals of benchmarks/rivals.py against what is known: a Gaussian's conditional, the low band, and their cost."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.mixture import Mixture, mcgdiff
from benchmarks.rivals import (
    Prior,
    Problem,
    Rival,
    conjugate_gradients,
    ddnm,
    dps,
    ilvr,
    jfps,
    mmps,
    pigdm,
    repaint,
    resampled,
    sdedit,
    smcdiff,
    soft_ilvr,
    tds,
    travels,
)
from ilvr_lightning.diffusion.low_pass import dct_basis, low_pass_matrix
from ilvr_lightning.metrics.bands import bures
from tests.support.gaussian import SCHEDULE, Gaussian, solver

LENGTH, FACTOR = 8, 4
double: dict[str, Any] = {"dtype": torch.float64}


def covariance() -> Tensor:
    """Smooth signals, which no filter diagonalises."""
    basis = dct_basis(LENGTH)
    amplitude = torch.linspace(0.5, 1.5, LENGTH, **double)
    smooth = basis.mT @ torch.diag(1 / (1 + torch.arange(LENGTH, **double)) ** 2) @ basis
    return amplitude[:, None] * smooth * amplitude * 3


def problem(count: int, seed: int = 0) -> Problem:
    """So many samples for one reference."""
    C = covariance()
    data = Mixture(torch.zeros(1, LENGTH, **double), C)
    generator = torch.Generator().manual_seed(seed)
    y = data.draw(1, torch.Generator().manual_seed(7)).reshape(1, 1, 1, -1).expand(count, 1, 1, LENGTH)
    values, vectors = data.eigen
    prior = Prior(torch.eye(1, **double), vectors.mT, values[None])
    x_T = torch.randn(y.shape, generator=generator, **double)
    return Problem(data, SCHEDULE, y, FACTOR, prior, x_T, generator)


def distance(p: Problem, x: Tensor) -> float:
    """Squared 2-Wasserstein distance of the samples' normal from the conditional, over its variance."""
    phi = low_pass_matrix(LENGTH, FACTOR, orthogonal=True)
    gain, true = Gaussian((1, LENGTH), covariance()).conditional(phi)
    x = x.flatten(1)
    off = x.mean(0) - gain @ p.y[0].flatten()
    return (float(off.square().sum()) + bures(x.mT.cov(), true)) / float(true.trace())


NEARLY_EXACT: dict[str, tuple[Rival, int, float]] = {
    "JFPS": (partial(jfps, steps=100), 3000, 0.01),
    "ILVR": (partial(ilvr, plan=solver(20, eta=1.0)), 3000, 0.01),
    "ILVR, corrected": (partial(ilvr, plan=solver(20, eta=1.0, high_band_correction=1.0)), 3000, 0.01),
    "MMPS": (partial(mmps, steps=100, iterations=2), 3000, 0.01),
    "TDS": (partial(tds, steps=30, particles=16), 1000, 0.03),
    "TDS, twist of unit variance": (partial(tds, steps=30, particles=16, informed=False), 1000, 0.03),
    "TDS without Jacobian": (partial(tds, steps=30, particles=16, jacobian=False), 1000, 0.03),
    "SMCDiff": (partial(smcdiff, steps=30, particles=16), 1000, 0.03),
    "PiGDM": (partial(pigdm, steps=200), 3000, 0.05),
    "DDNM": (partial(ddnm, steps=200), 3000, 0.05),
    "RePaint": (partial(repaint, steps=50, length=5, repeats=3), 2000, 0.05),
    "soft ILVR": (partial(soft_ilvr, steps=200), 2000, 0.05),
}
"""Each with its number of samples, and how near it is to be; the floor is 0.002 for 3000 samples."""


@pytest.mark.parametrize("name", NEARLY_EXACT)
def test_nearly_exact_on_a_gaussian(name: str) -> None:
    rival, count, tolerance = NEARLY_EXACT[name]
    p = problem(count)
    found = distance(p, rival(p))
    assert found < tolerance


LOW_BAND: dict[str, tuple[Rival, float]] = {
    "DDNM": (partial(ddnm, steps=10), 1e-9),
    "DDNM, time travel": (partial(ddnm, steps=10, length=3, repeats=2), 1e-9),
    "RePaint": (partial(repaint, steps=10, length=3, repeats=2), 1e-9),
    "JFPS": (partial(jfps, steps=10), 1e-9),
    "TDS": (partial(tds, steps=10, particles=2), 1e-9),
    "SMCDiff": (partial(smcdiff, steps=10, particles=2), 1e-9),
    "MMPS": (partial(mmps, steps=10, iterations=2), 1e-2),
    "PiGDM": (partial(pigdm, steps=100), 1e-2),
    "soft ILVR": (partial(soft_ilvr, steps=100), 2e-2),
    "DPS": (partial(dps, steps=100, zeta=0.3), 0.1),
}
"""How nearly each meets the reference's low band, RMS in pixels; SDEdit does not promise it."""


@pytest.mark.parametrize("name", LOW_BAND)
def test_low_band_is_the_references(name: str) -> None:
    rival, tolerance = LOW_BAND[name]
    p = problem(20)
    x = rival(p)
    assert x.shape == p.y.shape
    assert float(p.band.pixels(p.off(x)).square().mean().sqrt()) < tolerance


def test_cost_counts_particles_and_jacobians() -> None:
    cases: list[tuple[Rival, float]] = [
        (partial(ddnm, steps=20), 20),
        (partial(sdedit, steps=20), 20),
        (partial(pigdm, steps=10), 30),
        (partial(mmps, steps=20, iterations=1), 100),
        (partial(tds, steps=20, particles=4), 232),  # the last step needs no Jacobian
        (partial(smcdiff, steps=20, particles=4), 80),
    ]
    for rival, cost in cases:
        p = problem(3)
        rival(p)
        assert p.cost == cost


def test_travels_go_back_from_every_so_manieth_level() -> None:
    assert list(travels([3, 2, 1], 1, 1)) == [(3, 2), (2, 1), (1, 0)]
    assert list(travels([3, 2, 1], 1, 2)) == [(3, 2), (2, 3), (3, 2), (2, 1), (1, 2), (2, 1), (1, 0)]


def test_resampling_keeps_the_mean_and_leaves_even_groups_alone() -> None:
    p = problem(2000)
    weights = torch.tensor([0.97, 0.01, 0.01, 0.01], **double)
    log_w = weights.log().repeat(2000, 1)
    index, new = resampled(p, log_w)
    counts = torch.bincount(index % 4, minlength=4) / 8000
    torch.testing.assert_close(counts.double(), weights, atol=0.01, rtol=0)
    assert float(new.abs().max()) == 0
    even = torch.zeros(2, 4, **double)
    assert resampled(p, even)[0].tolist() == list(range(8))


def test_conjugate_gradients_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn((3, 3), generator=generator, **double)
    matrix, b = root @ root.mT + torch.eye(3, **double), torch.randn((5, 1, 1, 3), generator=generator, **double)
    x = conjugate_gradients(lambda v: v @ matrix, b, 3)
    torch.testing.assert_close(x @ matrix, b)


def test_denoiser_of_a_weighted_mixture_is_tweedies() -> None:
    data = mcgdiff(8)
    assert data.weights is not None
    t = torch.full((4,), 500)
    a = float(SCHEDULE.alphas_cumprod[500])
    x = 5 * torch.randn((4, 8), generator=torch.Generator().manual_seed(0), **double).requires_grad_()
    squares = (x[:, None] - math.sqrt(a) * data.means).square().sum(2)
    log_density = torch.logsumexp(data.weights.log() - 0.5 * squares, dim=1)  # of unit variance at every t
    (score,) = torch.autograd.grad(log_density.sum(), x)
    found = data.denoise(x.detach().reshape(4, 1, 1, 8), t).eps.flatten(1)
    torch.testing.assert_close(found, -math.sqrt(1 - a) * score)
