"""Grids during training."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from ilvr_lightning import ILVRGrid
from ilvr_lightning.training.grid import is_due
from tests.support.browser import Page
from tests.support.runs import TrainRun, assert_same_training


def test_grids_leave_the_weights_alone(trained: Path, train_run: TrainRun) -> None:
    assert_same_training(train_run("no_grids", "trainer.max_epochs=2"), trained)
    assert not (trained.parent / "no_grids" / "grids").exists()


def test_grid_files(trained: Path, images: Path) -> None:
    """Three validation images down; across: reference, two factors of low-pass and sample, one unconditional."""
    files = sorted((trained / "grids").iterdir())
    assert [p.name for p in files] == ["index.html", "step_0000004.png", "step_0000008.png"]
    grids = [np.asarray(Image.open(p)) for p in files[1:]]
    assert grids[0].shape == (44 + 12 + 3 * 98, 2 * 12 + 3 * 12 + 96 + 2 * 194 + 96, 3)
    low_pass, sample = (slice(44, 140), slice(120, 216)), (slice(44, 140), slice(218, 314))
    assert (grids[0][low_pass] == grids[1][low_pass]).all()
    assert (grids[0][sample] != grids[1][sample]).any()


@pytest.mark.parametrize(
    ("every", "last", "steps"),
    [
        (0, 10, []),
        (4, 10, [4, 8]),
        ("auto", 10, list(range(1, 11))),
        ("auto", 100, list(range(4, 101, 4))),
        ("auto", math.inf, [1000, 2000]),
    ],
)
def test_when_a_grid_is_due(every: Any, last: float, steps: list[int]) -> None:
    assert [step for step in range(1, int(min(last, 2500)) + 1) if is_due(step, every, last)] == steps


@pytest.mark.parametrize("last", [30, 31, 59, 500, 2652, 10_000, 123_457])
def test_about_thirty_grids_the_last_one_at_the_end(last: int) -> None:
    drawn = [step for step in range(1, last + 1) if is_due(step, "auto", last)]
    assert 15 < len(drawn) <= 30 and drawn[-1] == last


def test_grids_by_the_length_of_the_run(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilvr_lightning.training.grid.ABOUT", 3)
    folder = train_run(
        "by_length", "trainer.max_epochs=2", "grid.every_n_steps=auto", "trainer.accumulate_grad_batches=2"
    )
    assert [path.stem for path in sorted((folder / "grids").glob("*.png"))] == [
        "step_0000002",
        "step_0000005",
        "step_0000008",
    ]


def test_a_module_without_a_denoiser_is_refused_before_the_training(tmp_path: Path) -> None:
    grid = ILVRGrid(torch.zeros(1, 3, 8, 8), factors=[2], folder=tmp_path)
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[grid], enable_progress_bar=False)
    with pytest.raises(TypeError, match="needs a LightningModule with a denoiser and a schedule; BoringModel does not"):
        trainer.fit(BoringModel())


def test_the_page_has_a_slider_over_the_steps(trained: Path, page: Page) -> None:
    page.goto((trained / "grids" / "index.html").as_uri())
    page.wait_for_function("document.activeElement.id === 'slider'")
    for key, step in (("Home", 4), ("ArrowRight", 8), ("ArrowRight", 8), ("ArrowLeft", 4)):
        page.keyboard.press(key)
        page.wait_for_function("document.querySelector('img').complete")
        assert page.locator("output").inner_text() == f"step {step}"
        assert page.locator("main a").get_attribute("href") == f"step_{step:07}.png"
        assert page.evaluate("document.querySelector('img').naturalWidth") > 400
