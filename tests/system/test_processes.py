"""The scripts as a user starts them, and two processes against one. Slow: each start imports torch anew."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
SECONDS = 4.0
"""Two, and as much again for a loaded machine."""

TrainRun = Callable[..., Path]


def start(script: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("script", "flag", "status"),
    [("train.py", "--help", 0), ("sample.py", "--help", 0), ("train.py", "optim.lr=-1", 2), ("sample.py", "--rf", 2)],
)
def test_answers_at_once(script: str, flag: str, status: int) -> None:
    began = time.perf_counter()
    ended = start(script, flag)
    assert time.perf_counter() - began < SECONDS
    assert ended.returncode == status
    assert ended.stderr.count("\n") == (1 if status else 0)
    assert ended.stderr.startswith(f"{script}: ") == (status == 2)


@pytest.fixture(scope="module")
def alone(train_run: TrainRun) -> Path:
    return train_run("alone", "trainer.max_epochs=2", "grid.every_n_epochs=1")


@pytest.fixture(scope="module")
def pair(recipe: Path) -> Path:
    """The same run on two processes; its folder is named by the time, which both must agree on."""
    ended = start(
        "train.py", recipe, "trainer.max_epochs=2", "grid.every_n_epochs=1", "trainer.devices=2",
        "trainer.strategy=ddp", f"trainer.default_root_dir={recipe.parent / 'pair'}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("devices      2 (cpu), global batch 4") == 1
    folders = list((recipe.parent / "pair" / "tiny").iterdir())
    assert len(folders) == 1
    return folders[0]


def scalars(folder: Path, tag: str) -> dict[int, float]:
    (file,) = folder.glob("events.*")
    return {e.step: e.value for e in EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload().Scalars(tag)}


@pytest.mark.parametrize(
    "tag", ["train/loss", "train/loss_q1", "train/loss_q4", "train/grad_norm", "train/lr", "val/loss"]
)
def test_two_processes_have_the_losses_of_one(tag: str, alone: Path, pair: Path) -> None:
    """The three validation images do not divide by two: padding must count for nothing."""
    expected = scalars(alone, tag)
    assert len(expected) >= 2
    assert scalars(pair, tag) == pytest.approx(expected, rel=1e-5)


def test_two_processes_train_the_same_weights(alone: Path, pair: Path) -> None:
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (alone, pair))
    assert one["global_step"] == two["global_step"]
    for key in ("state_dict", "current_model_state"):
        weights = [torch.cat([v.flatten() for v in content[key].values()]) for content in (one, two)]
        # Adam enlarges rounding where a gradient is nearly 0: single weights may differ by parts of a step of 1e-3.
        assert (weights[0] - weights[1]).abs().max() < 5e-4
        assert (weights[0] - weights[1]).norm() < 1e-4 * weights[0].norm()


def test_two_processes_share_one_grid(alone: Path, pair: Path) -> None:
    names = [sorted(p.name for p in (f / "grids").iterdir()) for f in (alone, pair)]
    assert names[0] == names[1] == ["step_0000004.png", "step_0000008.png"]
    for name in names[0]:
        one, two = (np.asarray(Image.open(f / "grids" / name)).astype(int) for f in (alone, pair))
        assert np.abs(one - two).max() <= 1


def test_two_processes_sample_the_same_pictures(alone: Path, images: Path, tmp_path: Path) -> None:
    references = sorted(images.glob("0[0-2].png"))
    checkpoint = alone / "checkpoints" / "last.ckpt"
    for devices in (1, 2):
        ended = start(
            "sample.py", "--ref", *references, "--ckpt", checkpoint, "--steps", 4, "--factor", 2, 4,
            "--num-samples", 1, "--device", "cpu", "--devices", devices, "--out", tmp_path / f"{devices}",
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    names = [sorted(p.name for p in (tmp_path / d).iterdir() if p.is_file()) for d in "12"]
    assert names[0] == names[1]
    assert len(names[0]) == 6 + 4 + 1  # samples, grids, the index
    for name in names[0]:
        if name.endswith(".png"):
            one, two = (np.asarray(Image.open(tmp_path / d / name)).astype(int) for d in "12")
            assert np.abs(one - two).max() <= 1, name
    assert [(tmp_path / d / "metadata.jsonl").read_text().count("\n") for d in "12"] == [6, 6]


def test_fewer_pictures_than_processes(alone: Path, images: Path, tmp_path: Path) -> None:
    """The process that has nothing to do must not leave the other waiting."""
    ended = start(
        "sample.py", "--ref", sorted(images.glob("*.png"))[0], "--ckpt", alone / "checkpoints" / "last.ckpt", "--steps",
        4, "--factor", 2, "--num-samples", 1, "--device", "cpu", "--devices", 2, "--out", tmp_path / "out",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
