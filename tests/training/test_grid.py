"""Grids during training."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from ilvr_lightning import ILVRGrid
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
