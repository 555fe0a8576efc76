"""The tint of unconditional samples during training."""

import statistics
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from ilvr_lightning.training.grid import ILVRGrid
from ilvr_lightning.training.tint import ColourMeans, Tint
from tests.support.runs import scalars


def pictures(count: int, shift: tuple[float, float, float] = (0, 0, 0), seed: int = 0) -> Tensor:
    """Pictures whose mean colours vary by 0.2 around the shift."""
    noise = 0.2 * torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (noise + torch.tensor(shift).reshape(3, 1, 1)).expand(-1, -1, 4, 4)


def tint_of(samples: Tensor) -> Tint:
    colours = ColourMeans()
    for part in torch.split(pictures(400, seed=1), 50):
        colours.add({"image": part})
    tint = colours.tint(samples)
    assert tint is not None
    return tint


def test_a_tint_is_found_with_its_interval() -> None:
    tint = tint_of(pictures(64, (0.3, 0, -0.1)))
    red, green, blue = tint.channels.values()
    assert red.value == pytest.approx(0.3 * 127.5, abs=8) and blue.value < 0 < tint.size
    assert green.margin == pytest.approx(2 * 0.2 * 127.5 / 8, rel=0.25)
    assert tint.is_certain and tint.metrics()["samples/tint_red"] == red.value
    assert str(tint).startswith(f"red +{red.value:.0f} ±")


def test_chance_is_no_tint() -> None:
    """The interval of 95% covers zero about so often, and hardly ever is a difference called certain."""
    tints = [tint_of(pictures(8, seed=seed)) for seed in range(10, 110)]
    covered = [abs(each.value) <= each.margin for tint in tints for each in tint.channels.values()]
    assert 0.90 < statistics.mean(covered) < 0.99
    assert sum(tint.is_certain for tint in tints) <= 3


def test_what_is_no_training_batch_counts_nothing() -> None:
    colours = ColourMeans()
    for batch in (None, [torch.zeros(2, 3, 4, 4)], {"image": "none"}, {"image": torch.zeros(2, 4, 4, 4)}):
        colours.add(batch)
    assert colours.tint(pictures(8)) is None
    colours.add({"image": torch.zeros(2, 1, 4, 4)})
    assert colours.tint(pictures(8)) is None and colours.tint(torch.zeros(1, 1, 4, 4)) is None
    assert colours.tint(torch.zeros(2, 1, 4, 4)) is not None


def test_a_run_logs_it(trained: Path) -> None:
    for name in ("tint", "tint_red", "tint_blue_interval"):
        assert [step for step, _ in scalars(trained, f"samples/{name}")] == [4, 8]


def test_one_warning_where_it_grows(capsys: pytest.CaptureFixture[str]) -> None:
    grid, trainer = ILVRGrid(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for shift in (0.4, 0.2, 0.3, 0.5):
        grid._note_tint(trainer, tint_of(pictures(64, (shift, 0, 0))))
        assert ("drift in colour: red +" in capsys.readouterr().out) == (shift == 0.3)
