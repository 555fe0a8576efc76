"""Runs of the tiny config: what they left behind, and things that happen in their middle."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TrainRun = Callable[..., Path]
TINY_CONFIG = """\
data: {{path: {data}, image_size: 8, batch_size: 4, validation_fraction: 0.15, num_workers: 0}}
model: {{channels: 8, channel_mult: [1], num_res_blocks: 1, attention_resolutions: []}}
diffusion: {{schedule: cosine, num_timesteps: 25}}
optim: {{lr: 1.0e-3, warmup_steps: 2}}
sampling: {{num_steps: 4}}
grid: {{factors: [2, 4], samples: 1, every_n_epochs: 0}}
calibration: {{images: 0}}
trainer:
  max_epochs: 1
  default_root_dir: {root}
  accelerator: cpu
  precision: 32-true
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  num_sanity_val_steps: 0
"""
"""Trains in a second."""
GRIDS = ("trainer.max_epochs=3", "grid.every_n_steps=3", "grid.every_n_epochs=1")
"""The settings of a run with grids within its three epochs and at their ends."""
STATES = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers")


def last(folder: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def events(folder: Path) -> list[EventAccumulator]:
    """Of each start of the run, in order."""
    files = sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    return [EventAccumulator(str(f), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload() for f in files]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of all starts; what was done again counts once."""
    values = {e.step: e.value for part in events(folder) if tag in part.Tags()["scalars"] for e in part.Scalars(tag)}
    return sorted(values.items())


def assert_same_training(a: Path, b: Path) -> None:
    first, second = last(a), last(b)
    assert first["global_step"] == second["global_step"]
    assert {key: equal(first[key], second[key]) for key in STATES} == dict.fromkeys(STATES, True)
    assert scalars(a, "val/loss")[-1] == scalars(b, "val/loss")[-1]


@contextmanager
def at_call(owner: type, method: str, call: int, act: Callable[[], None]) -> Iterator[None]:
    """Something that happens right before the nth call of a method."""
    original, calls = getattr(owner, method), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            act()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, wrapped)
        yield


def signalling(owner: type, method: str, call: int, number: int) -> AbstractContextManager[None]:
    """A signal to this process."""
    return at_call(owner, method, call, lambda: os.kill(os.getpid(), number))


def crash() -> None:
    raise LookupError


def crashing(owner: type, method: str, call: int) -> AbstractContextManager[None]:
    """A LookupError."""
    return at_call(owner, method, call, crash)


def assert_same_logs(a: Path, b: Path, tmp: Path) -> None:
    """As TensorBoard shows them: all starts in order, what was purged left out."""
    first, second = (as_shown(folder, tmp) for folder in (a, b))
    assert set(first.Tags()["scalars"]) == set(second.Tags()["scalars"])
    for tag in {"train/loss", "train/lr", "val/loss"} & set(second.Tags()["scalars"]):
        assert [(e.step, e.value) for e in first.Scalars(tag)] == [(e.step, e.value) for e in second.Scalars(tag)]
    for tag in ("grids/N2", "grids/N4", "grids/unconditional"):
        one, two = (log.Images(tag) for log in (first, second))
        assert [e.step for e in one] == [e.step for e in two]
        assert [e.encoded_image_string for e in one] == [e.encoded_image_string for e in two]
    assert sorted(p.name for p in (a / "grids").iterdir()) == sorted(p.name for p in (b / "grids").iterdir())


def as_shown(folder: Path, tmp: Path) -> EventAccumulator:
    """All event files as one log; they are named by the second, and these starts share one."""
    copies = tmp / "events" / folder.name
    copies.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)):
        shutil.copy(file, copies / f"events.out.tfevents.{number:010}.x")
    return EventAccumulator(str(copies), size_guidance={"images": 0, "scalars": 0}).Reload()


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, in nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
