"""The intervals of figures: they hold what they should in 95 of 100 cases."""

import math

import pytest
import torch
from torch import Tensor

from ilvr_lightning.metrics.bands import frechet_distance
from ilvr_lightning.metrics.intervals import Figure, with_intervals

SETS, IMAGES, REPLICATES = 1000, 100, 30


def test_intervals_cover_the_truth_in_93_to_97_of_100_cases() -> None:
    """The mean of one set, and the Frechet distance of two, which has a bias: its interval is about its own mean."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(SETS):
        a = torch.randn((IMAGES, 1), generator=generator, dtype=torch.float64)
        b = 1 + 2 * torch.randn((IMAGES, 1), generator=generator, dtype=torch.float64)

        def figures(i: Tensor, j: Tensor, a: Tensor = a, b: Tensor = b) -> dict[str, float]:
            shift, scale = a[i].mean() - b[j].mean(), a[i].std() - b[j].std()
            return {"mean": float(a[i].mean()), "distance": float(shift.square() + scale.square())}

        found.append(with_intervals(figures, [torch.arange(IMAGES)] * 2, REPLICATES, number))
    truth = {"mean": 0.0, "distance": sum(each["distance"].value for each in found) / SETS}
    assert truth["distance"] == pytest.approx(1 + 1, rel=0.1)
    for name, true in truth.items():
        covered = sum(abs(each[name].value - true) < each[name].margin for each in found) / SETS
        assert 0.93 <= covered <= 0.97, (name, covered)


def test_error_of_a_mean_is_known() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = with_intervals(lambda i: {"mean": float(values[i].mean())}, [torch.arange(400)], 2000)["mean"]
    assert figure.value == float(values.mean())
    assert figure.error == pytest.approx(float(values.std()) / 20, rel=0.05)


def test_samples_of_one_source_are_drawn_together() -> None:
    """Ten equal samples per source say no more than one."""
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each, unit = values.repeat_interleave(10), torch.arange(100).repeat_interleave(10)
    together = with_intervals(lambda i: {"mean": float(each[i].mean())}, [unit], 1000)["mean"]
    apart = with_intervals(lambda i: {"mean": float(each[i].mean())}, [torch.arange(1000)], 1000)["mean"]
    assert together.error == pytest.approx(float(values.std()) / 10, rel=0.1)
    assert apart.error == pytest.approx(float(values.std()) / 10 / math.sqrt(10), rel=0.1)


def test_large_sets_give_the_same_error_from_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilvr_lightning.metrics.intervals.MOST_DRAWN", 50)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = with_intervals(lambda i: {"mean": float(values[i].mean())}, [torch.arange(1000)], 2000)["mean"]
    assert figure.error == pytest.approx(float(values.std()) / math.sqrt(1000), rel=0.05)


@pytest.mark.parametrize(("images", "replicates"), [(3, 100), (50, 0)])
def test_no_interval(images: int, replicates: int) -> None:
    figure = with_intervals(lambda i: {"count": float(len(i))}, [torch.arange(images)], replicates)["count"]
    assert figure.value == images
    assert math.isnan(figure.margin)
    assert Figure(value=1.0, error=2.0).margin == pytest.approx(3.92, rel=1e-4)
    assert Figure(value=1.0, error=1.0, degrees=9).margin == pytest.approx(2.262, rel=1e-2)  # from a table


def test_no_interval_where_too_few_of_a_small_set_would_be_drawn() -> None:
    units = [torch.arange(8), torch.arange(12_000)]
    figure = with_intervals(lambda i, j: {"both": float(len(i) + len(j))}, units, 10)["both"]
    assert figure.value == 12_008
    assert math.isnan(figure.margin)


def test_frechet_distance_of_known_normals() -> None:
    """Of N(0, 1) and N(m, diag s^2): |m|^2 and the sum of (s - 1)^2, within its interval; alike for few images."""
    generator = torch.Generator().manual_seed(0)
    m, s = torch.tensor([1.0, 0, 0, 2], dtype=torch.float64), torch.tensor([1, 2, 3, 0.5], dtype=torch.float64)
    a = torch.randn((4000, 4), generator=generator, dtype=torch.float64)
    b = m + s * torch.randn((4000, 4), generator=generator, dtype=torch.float64)
    rows = [torch.arange(4000)] * 2
    figure = with_intervals(lambda i, j: {"FD": frechet_distance(a[i], b[j])}, rows, 50)["FD"]
    assert abs(figure.value - float((m**2).sum() + ((s - 1) ** 2).sum())) < figure.margin
    assert figure.margin < 0.5
    wide = torch.randn((4, 40), generator=generator, dtype=torch.float64)
    assert (
        frechet_distance(a[:30] @ wide, b[:30] @ wide)
        == pytest.approx(  # 40 features of 30 images, and of 45
            frechet_distance(a[:30].repeat(50, 1) @ wide, b[:30].repeat(50, 1) @ wide), rel=0.2
        )
    )


def test_frechet_distance_is_that_of_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    generator = torch.Generator().manual_seed(0)
    for n, m in ((400, 300), (40, 30)):
        a = torch.randn((n, 64), generator=generator)
        b = 1.3 * torch.randn((m, 64), generator=generator) + 0.2
        ours = frechet_distance(a, b)
        theirs = metric.fid_statistics_to_metric(
            metric.fid_features_to_statistics(a), metric.fid_features_to_statistics(b), verbose=False
        )["frechet_inception_distance"]
        assert ours == pytest.approx(theirs, rel=1e-3)
