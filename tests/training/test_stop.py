"""Signals stop a run between two optimizer steps."""

import re
import signal
from pathlib import Path

import pytest

import train
from ilvr_lightning.training.calibration import Calibration
from ilvr_lightning.training.checkpointing import SaveCheckpoints
from ilvr_lightning.training.grid import ILVRGrid
from ilvr_lightning.training.module import DDPM
from tests.support.runs import (
    GRIDS,
    STATES,
    TrainRun,
    assert_same_logs,
    assert_same_training,
    crashing,
    equal,
    last,
    signalling,
)


@pytest.mark.parametrize(
    ("owner", "method", "call", "saved"),
    [
        (DDPM, "training_step", 6, 6),
        (DDPM, "training_step", 8, 8),  # the last step of its epoch: the epoch's end comes first
        (DDPM, "validation_step", 2, 8),  # so does a validation that is under way,
        (ILVRGrid, "_sample", 4, 8),  # and a grid
        (ILVRGrid, "_sample", 3, 6),  # one of those that are drawn every three steps
        (SaveCheckpoints, "on_train_epoch_end", 2, 8),
    ],
)
def test_control_c_saves_and_says_how_to_resume(
    owner: type, method: str, call: int, saved: int, train_run: TrainRun, tiny_config: Path, with_grids: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f"interrupted_{owner.__name__}_{method}_{call}"
    with signalling(owner, method, call, signal.SIGINT):
        assert train.main([str(tiny_config), f"run.name={name}", *GRIDS]) == 130
    folder = tiny_config.parent / "runs" / "tiny" / name
    said = (
        f"a checkpoint is saved. To resume: python train.py {folder}/config.yaml resume={folder}/checkpoints/last.ckpt"
    )
    assert f"stopped at step {saved}; {said}" in capsys.readouterr().out
    assert last(folder)["global_step"] == saved
    train_run(name, *GRIDS, f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, with_grids)
    assert_same_logs(folder, with_grids, tmp=tiny_config.parent)


ENDS = {
    "without validation": ("trainer.limit_val_batches=0", "trainer.max_epochs=3"),
    "validation every other epoch": ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"),
    "by steps": ("trainer.max_epochs=-1", "trainer.max_steps=6"),
    "by steps, at an epoch's end": ("trainer.max_epochs=-1", "trainer.max_steps=8"),
}


@pytest.mark.parametrize("kind", ["stopped", "crashed"])
@pytest.mark.parametrize("ends", ENDS)
def test_other_ends_of_a_run(ends: str, kind: str, train_run: TrainRun, tiny_config: Path) -> None:
    """Whatever ends an epoch or a run: grids, losses and gains come once, and are those of a run left alone."""
    settings = (*ENDS[ends], "grid.every_n_epochs=1", "calibration.images=2", "checkpoint.every_n_steps=2")
    tag = re.sub(r"\W", "", ends)
    alone = tiny_config.parent / "runs" / "tiny" / f"ends_{tag}"
    if not alone.exists():
        train_run(alone.name, *settings)
    name = f"ends_{tag}_{kind}"
    if kind == "stopped":
        with signalling(DDPM, "training_step", 4, signal.SIGTERM):
            assert train.main([str(tiny_config), f"run.name={name}", *settings]) == 75
    else:
        with crashing(ILVRGrid, "_sample", 1), pytest.raises(LookupError):
            train.main([str(tiny_config), f"run.name={name}", *settings])
    train_run(name, *settings, "resume=auto")
    assert_same_logs(alone.parent / name, alone, tmp=tiny_config.parent)
    first, second = last(alone.parent / name), last(alone)
    assert {key: equal(first[key], second[key]) for key in STATES} == dict.fromkeys(STATES, True)
    for content in (first, second):
        for state in content["callbacks"].values():
            state.pop("training_seconds", None)
    assert first["callbacks"] == second["callbacks"]


def test_a_signal_in_the_calibration_waits_for_its_end(train_run: TrainRun, tiny_config: Path) -> None:
    """All steps are done then, and the run ends as if nothing had come."""
    settings = ("calibration.images=2", "trainer.max_epochs=2")
    alone = train_run("left_to_calibrate", *settings)
    with signalling(Calibration, "_calibrate", 1, signal.SIGTERM):
        assert train.main([str(tiny_config), "run.name=calibrated_signalled", *settings]) == 0
    folder = alone.parent / "calibrated_signalled"
    one, two = (last(each)["callbacks"]["Calibration"] for each in (folder, alone))
    assert one == two
    assert one["calibrated_at"] == 8
    assert_same_training(folder, alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_notice_of_a_scheduler(number: signal.Signals, train_run: TrainRun, tiny_config: Path, straight: Path) -> None:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    name = f"requeued_{number.name}"
    with signalling(DDPM, "training_step", 7, number):
        assert train.main([str(tiny_config), f"run.name={name}", "trainer.max_epochs=3", "resume=auto"]) == 75
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    assert last(straight.parent / name)["global_step"] == 7
    train_run(name, "trainer.max_epochs=3", "resume=auto")
    assert_same_training(straight.parent / name, straight)


@pytest.mark.parametrize("call", [12, 13])
def test_control_c_within_an_accumulated_step(
    call: int, train_run: TrainRun, tiny_config: Path, accumulated: Path
) -> None:
    name = f"interrupted_accumulation_{call}"
    overrides = ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"]
    with signalling(DDPM, "training_step", call, signal.SIGINT):
        assert train.main([str(tiny_config), f"run.name={name}", *overrides]) == 130
    folder = tiny_config.parent / "runs" / "tiny" / name
    assert last(folder)["global_step"] == -(-call // 2)
    train_run(name, *overrides, f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, accumulated)
