"""The commands as a user starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.checkpoints.find import DEFAULT_MODEL
from tests.support.paths import ROOT

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
    assert len(names[0]) == 6 + 4 + 2  # samples, grids, the index and its page
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


def test_one_reference_and_no_other_flag_within_a_minute(tmp_path: Path) -> None:
    """In an empty folder: a grid of four samples, of the default model, which is named."""
    reference = ROOT / "data" / "references" / "photo_astronaut.png"
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--ref", str(reference)], cwd=tmp_path, capture_output=True,
        text=True, check=True, timeout=240, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert time.perf_counter() - began < 60
    assert DEFAULT_MODEL in next(line for line in ended.stdout.splitlines() if line.startswith("checkpoint"))
    assert (tmp_path / "samples" / "photo_astronaut_grid.png").is_file()
