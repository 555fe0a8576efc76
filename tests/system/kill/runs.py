"""Start a script, kill it, start it again; compare what is left with a run that was never killed."""

import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.paths import ROOT
from tests.support.runs import equal

TINY_CONFIG = """\
data: {{path: {data}, image_size: 8, batch_size: 4, validation_fraction: 0.15, num_workers: 0}}
model: {{channels: 8, channel_mult: [1], num_res_blocks: 1, attention_resolutions: [], dropout: 0.1}}
diffusion: {{schedule: cosine, num_timesteps: 25}}
optim: {{lr: 1.0e-3, warmup_steps: 2}}
sampling: {{num_steps: 4}}
grid: {{factors: [2], samples: 1}}
calibration: {{images: 3}}
checkpoint: {{every_n_steps: 3}}
run: {{name: run}}
resume: auto
trainer: {{max_epochs: -1, max_steps: {steps}, default_root_dir: {root}, accelerator: cpu, precision: 32-true,
          log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false}}
"""


def make_config(folder: Path, name: str, epochs: int) -> Path:
    """A config that trains a tiny network on 18 pictures for so many epochs of four steps, and two steps."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (21, 9, 10, 3), dtype=np.uint8)
        for number, picture in enumerate(pixels):
            Image.fromarray(picture).save(images / f"{number:02}.png")
    path = folder / f"{name}.yaml"
    path.write_text(TINY_CONFIG.format(data=images, root=folder / "runs", steps=4 * epochs + 2))
    return path


def start(*argv: object) -> subprocess.Popen[str]:
    """A script in a group of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(*argv: object) -> str:
    """Run a script to its end; what it said."""
    process = start(*argv)
    said, _ = process.communicate(timeout=900)
    if process.returncode:
        raise AssertionError(f"{' '.join(map(str, argv))} ended with {process.returncode}:\n{said}")
    return said


def kill_at(argv: Sequence[object], under_way: str, seconds: float, moment: Callable[[], bool] | None = None) -> bool:
    """Start a script, wait for a line, so many seconds, and a moment, and kill its group.

    Returns:
        Whether it was still running.
    """
    process = start(*argv)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(under_way, line):
            break
    time.sleep(seconds)
    deadline = time.monotonic() + 20
    while moment is not None and not moment() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0002)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


def kill_training(tiny_config: Path, kills: int, seed: int) -> list[str]:
    """Kill a training so often, every other time while a file is being written; then let it end.

    Returns:
        A line a kill: when, and which step was saved.

    Raises:
        AssertionError: it had ended before the last one.
    """
    generator, said = random.Random(seed), []
    folder = tiny_config.parent / "runs" / tiny_config.stem / "run"

    for kill in range(kills):
        seconds, moment = generator.uniform(0, 2), None
        if kill % 2:
            old = {path: path.stat().st_mtime_ns for path in folder.rglob(".*.partial")}
            moment = functools.partial(writes, folder, old)
        alive = kill_at(["train.py", tiny_config], "^tensorboard ", seconds, moment)
        at = "while a file was written" if moment else f"after {seconds:.2f} s"
        saved = folder / "checkpoints" / "last.ckpt"
        step = torch.load(saved, weights_only=True)["global_step"] if saved.exists() else 0
        said.append(f"kill {kill + 1:2}: {at}; step {step} is saved")
        assert alive, f"it had ended before this: {said[-1]}"
    finish("train.py", tiny_config)
    return said


def writes(folder: Path, old: Mapping[Path, int]) -> bool:
    """Whether a file is being written: its temporary one is there, and was not left by an earlier kill."""
    for path in folder.rglob(".*.partial"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            if path.stat().st_mtime_ns != old.get(path):
                return True
    return False


def difference(a: Path, b: Path) -> str | None:
    """What two runs' folders differ in: weights, average, optimizer, schedules, logs, grids; None for nothing."""
    for name in ("last.ckpt", "best.ckpt"):
        one, two = (torch.load(f / "checkpoints" / name, weights_only=True) for f in (a, b))
        for content in (one, two):
            for state in content["callbacks"].values():
                state.pop("training_seconds", None)
        weights = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers")
        for key in ("global_step", "epoch", *weights, "callbacks"):
            if not equal(one[key], two[key]):
                return f"{key} of {name}"
    first, second = (EventAccumulator(str(f), size_guidance={"images": 0, "scalars": 0}).Reload() for f in (a, b))
    for tag in ("train/loss", "train/lr", "train/grad_norm", "val/loss"):
        if [(e.step, e.value) for e in first.Scalars(tag)] != [(e.step, e.value) for e in second.Scalars(tag)]:
            return f"{tag} in TensorBoard"
    if first.Tags()["images"] != second.Tags()["images"]:
        return f"grids in TensorBoard: {first.Tags()['images']} and {second.Tags()['images']}"
    for tag in first.Tags()["images"]:
        shown = [[(e.step, e.encoded_image_string) for e in log.Images(tag)] for log in (first, second)]
        if shown[0] != shown[1]:
            return f"{tag} in TensorBoard: steps {[s for s, _ in shown[0]]} and {[s for s, _ in shown[1]]}"
    grids = [{p.name: p.read_bytes() for p in (f / "grids").iterdir()} for f in (a, b)]
    if grids[0] != grids[1]:
        return "the files of the grids"
    left = [p.name for p in a.rglob(".*")]
    return f"left behind: {left}" if left else None
