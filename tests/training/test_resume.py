"""A run that is resumed ends as one that was never stopped, to the bit."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from ilvr_lightning.training.checkpointing import AtomicCheckpointIO
from ilvr_lightning.training.module import DDPM
from tests.support.runs import TrainRun, assert_same_training, at_call, crash, crashing, last, scalars, signalling


def test_resume_after_an_epoch(train_run: TrainRun, straight: Path) -> None:
    folder = train_run("after_an_epoch")
    train_run("after_an_epoch", "trainer.max_epochs=3", "resume=auto")
    assert_same_training(folder, straight)
    assert [step for step, _ in scalars(folder, "val/loss")] == [4, 8, 12]
    assert scalars(folder, "val/loss") == scalars(straight, "val/loss")
    assert scalars(folder, "train/loss") == scalars(straight, "train/loss")
    assert len({loss for _, loss in scalars(folder, "val/loss")}) == 3


def test_resume_in_mid_epoch(train_run: TrainRun, tiny_config: Path, straight: Path) -> None:
    """A crash at step 7; the last save was at step 6, the second of its epoch's four."""
    with crashing(DDPM, "training_step", 8), pytest.raises(LookupError):
        train_run("crashed", "trainer.max_epochs=3", "checkpoint.every_n_steps=3")
    folder = tiny_config.parent / "runs" / "tiny" / "crashed"
    assert last(folder)["global_step"] == 6
    train_run("crashed", "trainer.max_epochs=3", f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, straight)


def test_resume_with_moments_in_another_memory_format(train_run: TrainRun, straight: Path) -> None:
    """As a GPU left them: they take the layout of the weights here before the first step."""
    folder = train_run("from_a_gpu")
    content = last(folder)
    for state in content["optimizer_states"][0]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].ndim == 4:
                state[name] = state[name].to(memory_format=torch.channels_last)
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    train_run("from_a_gpu", "trainer.max_epochs=3", "resume=auto")
    assert_same_training(folder, straight)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("step", [6, 8])
def test_resume_with_another_accumulation(
    before: int, after: int, step: int, train_run: TrainRun, tiny_config: Path, straight: Path
) -> None:
    name = f"accumulation_{before}_{after}_{step}"
    with signalling(DDPM, "training_step", step * before, signal.SIGTERM):
        settings = [f"run.name={name}", "trainer.max_epochs=3", f"trainer.accumulate_grad_batches={before}"]
        assert train.main([str(tiny_config), *settings]) == 75
    folder = train_run(name, "trainer.max_epochs=3", f"trainer.accumulate_grad_batches={after}", "resume=auto")
    assert last(folder)["global_step"] == 12
    assert [s for s, _ in scalars(folder, "val/loss")] == [4, 8, 12]
    one, two = (dict(scalars(f, "train/loss")) for f in (folder, straight))
    assert one == pytest.approx(two, rel=2e-5)


def test_resume_takes_the_last_before_the_best(train_run: TrainRun, straight: Path) -> None:
    """A run that was killed between the two saves of an epoch's end resumes from before both."""
    with at_call(AtomicCheckpointIO, "save_checkpoint", 4, crash), pytest.raises(LookupError):  # best, last, best
        train_run("between", "trainer.max_epochs=3")
    folder = straight.parent / "between"
    assert [last(folder, name)["global_step"] for name in ("best", "last")] == [8, 4]
    train_run("between", "trainer.max_epochs=3", "resume=auto")
    assert_same_training(folder, straight)


def test_a_longer_run_stretches_the_decay(
    train_run: TrainRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """decay_steps=auto is the last step; a resumed run with another number says so and follows it."""
    settings = ("optim.decay_steps=auto", "optim.warmup_steps=0")
    folder = train_run("stretched", *settings, "data.batch_size=2")
    assert last(folder)["decay_steps"] == 9
    capsys.readouterr()
    train_run("stretched", *settings, "data.batch_size=2", "trainer.max_epochs=2", "resume=auto")
    out = capsys.readouterr().out
    assert out.count("note  ") == 1
    assert "note         optim.decay_steps is now 18 and was 9 up to step 9: the learning rate follows" in out
    assert last(folder)["decay_steps"] == 18
    rates = [rate for _, rate in scalars(folder, "train/lr")]
    assert rates[8] == pytest.approx(0) and rates[-1] == pytest.approx(0)
    assert rates[9:17] == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 18)) / 2 for step in range(10, 18)])
    capsys.readouterr()
    train_run("stretched", *settings, "data.batch_size=2", "trainer.max_epochs=2", "resume=auto")
    assert "decay_steps" not in capsys.readouterr().out


def test_max_steps_on_the_command_line_replaces_the_epochs_of_the_config(train_run: TrainRun) -> None:
    folder = train_run(
        "by_steps", "trainer.max_steps=11", "optim.decay_steps=auto", "trainer.accumulate_grad_batches=2"
    )
    assert (last(folder)["global_step"], last(folder)["decay_steps"]) == (11, 11)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
def test_resume_takes_the_newest_that_is_whole(
    damage: str, train_run: TrainRun, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_run(f"damaged_{damage}", "trainer.max_epochs=2")
    path = folder / "checkpoints" / "last.ckpt"
    shutil.copy(path, folder / "checkpoints" / "best.ckpt")
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    content = {"truncated": whole[:-1], "flipped": flipped, "empty": b""}.get(damage)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    os.utime(folder / "checkpoints" / "best.ckpt", (1, 1))
    capsys.readouterr()
    train_run(f"damaged_{damage}", "trainer.max_epochs=3", "resume=auto")
    assert ("last.ckpt is damaged" in capsys.readouterr().out) == (damage != "gone")
    assert_same_training(folder, straight)


def test_saving_every_step_does_not_disturb_accumulation(train_run: TrainRun, accumulated: Path) -> None:
    with crashing(DDPM, "training_step", 12), pytest.raises(LookupError):
        train_run("saving", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=1")
    train_run("saving", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "resume=auto")
    assert_same_training(accumulated.parent / "saving", accumulated)
