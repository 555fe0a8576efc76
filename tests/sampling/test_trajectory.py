"""sample.py --trajectory: the strip and the animation of an image's steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.sampling.trajectory import Frame, evenly_chosen
from tests.support.samples import pixels

Run = Callable[..., Path]


def test_trajectory(run: Run, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 1, "--batch-size", 1)
    run(*asked)
    out = run(*asked, "--trajectory")  # the images are there, their steps are not
    assert "2 to make" in capsys.readouterr().out
    for name in "ab":
        with Image.open(out / f"{name}_N2_0_steps.webp") as animation:
            assert (getattr(animation, "n_frames", 0), animation.size) == (4, (256, 256))
            animation.seek(3)
            last = np.asarray(animation.convert("RGB"))[16::32, 16::32]
        assert (last == pixels(out / f"{name}_N2_0.png")).all()
        left = 12 + 4 * (96 + 12)
        assert (pixels(out / f"{name}_N2_0_steps.png")[44 : 44 + 96, left : left + 96][::12, ::12] == last).all()
    run(*asked, "--trajectory")
    assert "0 to make, 2 already there" in capsys.readouterr().out
    run(*asked, "--overwrite", "--seed", 1)
    assert not list(out.glob("*_steps.*"))  # they were of other images


def test_a_trajectory_of_many_steps_keeps_some(run: Run, references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilvr_lightning.sampling.writer.FRAMES_IN_ANIMATION", 5)
    out = run("--ref", references / "a.png", "--factor", 2, "--trajectory", "--steps", 12, "--num-samples", 3,
              "--batch-size", 2)  # fmt: skip
    for number in range(3):
        with Image.open(out / f"a_N2_{number}_steps.webp") as animation:
            assert getattr(animation, "n_frames", 0) == 5


def test_steps_are_chosen_evenly_with_both_ends() -> None:
    frames = [Frame(t, np.zeros((1, 1, 1, 3), np.uint8)) for t in range(100, 0, -1)]
    assert [f.t for f in evenly_chosen(frames, 4)] == [100, 67, 34, 1]
    assert evenly_chosen(frames[:3], 4) == frames[:3]
