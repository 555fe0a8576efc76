"""What a run logs."""

import itertools
import math
import re
from pathlib import Path

import pytest

from ilvr_lightning.training.log import _end
from tests.support.runs import TrainRun, events, last, scalars


def test_tags(trained: Path) -> None:
    log = events(trained)[0]
    tags = log.Tags()
    assert {
        "train/loss", "train/loss_q1", "train/loss_q2", "train/loss_q3", "train/loss_q4", "train/lr", "train/grad_norm",
        "train/images_per_second", "val/loss",
    } <= set(tags["scalars"])  # fmt: skip
    assert set(tags["images"]) == {"ilvr/grid", "samples/unconditional"}
    text = log.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "batch_size: 4" in text
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(log.summary_metadata)


def test_the_cost_is_said_after_twenty_steps(train_run: TrainRun, capsys: pytest.CaptureFixture[str]) -> None:
    """At each start, where it has so many steps."""
    settings = ("data.batch_size=2", "trainer.accumulate_grad_batches=2")
    cost = re.compile(
        r"cost         [\d,]+\.\d images/s, \d+\.\d GB of memory; the (\d+) steps left take 0:00:\d\d h, "
        r"until \d\d:\d\d, without validation, grids and calibration\n"
    )
    for steps, left in ((19, []), (25, []), (50, ["5"])):
        capsys.readouterr()
        train_run("cost", *settings, f"trainer.max_steps={steps}", *(["resume=auto"] if steps > 19 else []))
        assert cost.findall(capsys.readouterr().out) == left
    train_run("costs", *settings, "trainer.max_steps=20")
    assert cost.findall(capsys.readouterr().out) == ["0"]


def test_speed_after_a_resume_counts_the_steps_of_this_start(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch, by a clock that advances by a second whenever it is read."""
    monkeypatch.setattr("ilvr_lightning.training.log.time.perf_counter", itertools.count().__next__)
    for steps, resume in ((2, []), (4, ["resume=auto"])):
        folder = train_run("speed", f"trainer.max_steps={steps}", *resume)
    rates = [value for _, value in scalars(folder, "train/images_per_second")]
    assert rates == pytest.approx([rates[0]] * 4)


def test_when_a_run_ends() -> None:
    assert _end(math.inf, 1) == "the run has no last step"
    assert "the 9,980 steps left take 1 day, 3:43:20 h, until 20" in _end(9980, 10)


def test_logged_steps_and_values(trained: Path) -> None:
    assert [step for step, _ in scalars(trained, "train/loss")] == list(range(1, 9))
    assert [step for step, _ in scalars(trained, "val/loss")] == [4, 8]
    lr = [value for _, value in scalars(trained, "train/lr")]
    assert lr[0] == pytest.approx(1e-3 * 2 / 3)  # of the step to come: a warm-up of two steps
    assert lr[1:] == pytest.approx([1e-3] * 7)
    best, final = last(trained, "best"), last(trained)
    losses = dict(scalars(trained, "val/loss"))
    assert losses[best["global_step"]] == min(losses.values())
    assert final["global_step"] == 8
