"""Grids during training."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.runs import TrainRun, assert_same_training


def test_grids_leave_the_weights_alone(trained: Path, train_run: TrainRun) -> None:
    assert_same_training(train_run("no_grids", "trainer.max_epochs=2"), trained)
    assert not (trained.parent / "no_grids" / "grids").exists()


def test_grid_files(trained: Path, images: Path) -> None:
    """Three validation images down; across: reference, two factors of low-pass and sample, one unconditional."""
    assert sorted(p.name for p in (trained / "grids").iterdir()) == ["step_0000004.png", "step_0000008.png"]
    sheets = [np.asarray(Image.open(p)) for p in sorted((trained / "grids").iterdir())]
    assert sheets[0].shape == (44 + 12 + 3 * 98, 2 * 12 + 3 * 12 + 96 + 2 * 194 + 96, 3)
    low_pass, sample = (slice(44, 140), slice(120, 216)), (slice(44, 140), slice(218, 314))
    assert (sheets[0][low_pass] == sheets[1][low_pass]).all()
    assert (sheets[0][sample] != sheets[1][sample]).any()
