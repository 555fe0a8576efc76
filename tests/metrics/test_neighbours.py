"""Precision, recall, density, coverage and the kernel distance, by hand and against other implementations."""

import math

import pytest
import torch

from ilvr_lightning.metrics import neighbours
from ilvr_lightning.metrics.neighbours import copies, kernel_distance, nearest, neighbour_figures


def normal(n: int, seed: int, d: int = 6) -> torch.Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sets_are_precise_and_cover_each_other() -> None:
    a = normal(200, 0)
    same = neighbour_figures(a, a)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    other = neighbour_figures(a, normal(200, 1))
    assert 0.7 < other["precision"] < 1
    assert other["density"] == pytest.approx(1, abs=0.15)
    far = neighbour_figures(a + 100, a)
    assert set(far.values()) == {0.0}


def test_a_lost_half_lowers_recall_and_coverage_alone() -> None:
    centre = torch.where(torch.arange(300)[:, None] % 2 == 0, 20.0, -20.0)
    references, samples = normal(300, 0) + centre, normal(300, 1) + 20
    found = neighbour_figures(samples, references)
    assert found["precision"] > 0.75
    assert 0.35 < found["recall"] < 0.5
    assert 0.35 < found["coverage"] < 0.51


def test_by_hand() -> None:
    """References at 0..5 of a line: their third neighbours are 3, 2, 2, 2, 2, 3 away, the fifth 5, 4, 3, 3, 4, 5."""
    y = torch.arange(6.0, dtype=torch.float64)[:, None]
    x = torch.tensor([2.5, 3.0, 100.0, 101.0, 102.0, 103.0], dtype=torch.float64)[:, None]
    found = neighbour_figures(x, y)
    assert found["precision"] == pytest.approx(2 / 6)
    assert found["density"] == pytest.approx((6 + 6) / 5 / 6)
    assert found["coverage"] == 1
    assert math.isnan(neighbour_figures(x, y[:5])["coverage"])  # no fifth neighbour
    assert neighbour_figures(x, y[:5])["precision"] >= 0


def test_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(70, 0), normal(50, 1) + 0.5
    whole = [*neighbour_figures(a, b).values(), kernel_distance(a, b), *nearest(a, b)[0].tolist()]
    monkeypatch.setattr(neighbours, "ROWS", 7)
    assert [*neighbour_figures(a, b).values(), kernel_distance(a, b), *nearest(a, b)[0].tolist()] == pytest.approx(
        whole, rel=1e-9
    )


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(80, 0), normal(60, 1) + 0.3
    assert kernel_distance(a, b[:60]) != 0
    assert kernel_distance(a[:60], b) == pytest.approx(float(poly_mmd(a[:60], b)), rel=1e-9)


def test_kernel_distance_has_no_bias() -> None:
    values = torch.tensor([kernel_distance(normal(20, 2 * i), normal(30, 2 * i + 1)) for i in range(400)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 20


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_prc", reason="torch-fidelity is not installed")
    a, b = normal(120, 0), 0.7 * normal(100, 1) + 0.2
    theirs = metric.calculate_precision_recall_full(a, b, neighborhood=3)
    found = neighbour_figures(a, b)
    assert (found["precision"], found["recall"]) == pytest.approx(theirs, abs=1e-6)


def test_copies_are_nearer_than_all_but_a_hundredth_of_held_out_images() -> None:
    distances, held_out = torch.tensor([0.0, 0.5, 2.0]), torch.linspace(1, 2, 101)
    assert copies(distances, held_out).tolist() == [True, True, False]
    assert copies(held_out, held_out).float().mean() == pytest.approx(0.01, abs=0.001)


def test_equal_rows_are_at_no_distance() -> None:
    rows = torch.rand(60, 200, generator=torch.Generator().manual_seed(0))
    assert nearest(rows, rows.flip(0))[0].tolist() == [0.0] * 60
