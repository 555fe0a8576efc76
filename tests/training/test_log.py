"""What a run logs."""

import csv
import importlib.util
import itertools
import math
import re
from pathlib import Path

import pytest

import train
from ilvr_lightning.training.log import _end
from tests.support import cli
from tests.support.runs import TrainRun, events, last, scalars


def test_tags(trained: Path) -> None:
    log = events(trained)[0]
    tags = log.Tags()
    assert {
        "train/loss", "train/loss_q1", "train/loss_q2", "train/loss_q3", "train/loss_q4", "train/lr", "train/grad_norm",
        "train/images_per_second", "val/loss",
    } <= set(tags["scalars"])  # fmt: skip
    assert set(tags["images"]) == {"grids/N2", "grids/N4", "grids/unconditional"}
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


def test_a_card_of_a_grid_is_as_wide_as_tensorboard_shows_it(trained: Path) -> None:
    """Reference, low-pass image and one sample at three rows, in place of the whole grid's seven columns."""
    (first, second) = events(trained)[0].Images("grids/N2")
    assert (first.step, second.step) == (4, 8)
    assert (first.width, first.height) == (2 * 12 + 96 + 12 + 194, 24 + 12 + 3 * 98)
    free = events(trained)[0].Images("grids/unconditional")[0]
    assert (free.width, free.height) == (2 * 12 + 96, first.height)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_and_its_rows_after_a_resume(train_run: TrainRun, trained: Path) -> None:
    """A resumed run writes each step once, as one that never stopped."""
    folder = train_run("csv", "logger=[csv]", "trainer.max_epochs=2", "checkpoint.every_n_steps=6")
    assert not list(folder.glob("events.*"))
    logged = rows(folder)
    losses = [(int(row["step"]), float(row["train/loss"])) for row in logged if row["train/loss"]]
    assert dict(losses) == pytest.approx(dict(scalars(trained, "train/loss")))
    assert [int(row["step"]) for row in logged if row["val/loss"]] == [4, 8]
    assert "data.batch_size: 4" in (folder / "csv" / "hparams.yaml").read_text()
    best = folder / "checkpoints" / "best.ckpt"
    step = last(folder, "best")["global_step"]
    train_run("csv", "logger=[csv]", "trainer.max_epochs=3", f"resume={best}")
    again = [int(row["step"]) for row in rows(folder) if row["train/loss"]]
    assert again == list(range(1, 13)), f"resumed from {step}"
    before = rows(folder)
    train_run("csv", "logger=[csv]", "trainer.max_epochs=3", "resume=auto")  # nothing is left to do
    assert rows(folder) == before


def test_several_loggers_and_none(train_run: TrainRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_run("both", "logger=[tensorboard,csv]")
    assert [step for step, _ in scalars(folder, "train/loss")] == [int(r["step"]) for r in rows(folder)[:4]]
    capsys.readouterr()
    folder = train_run("neither", "logger=[]", "grid.every_n_epochs=1")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "grids"]
    assert "tensorboard" not in capsys.readouterr().out


def test_wandb_is_asked_for_and_missing(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    error = cli.refused(train.main, capsys, str(tiny_config), "logger=wandb", "run.name=no_wandb")
    assert error.endswith("pip install -e '.[wandb]'\n")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_offline(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, settings and pictures; a resumed run has the id of the one before."""
    import wandb

    for name, value in (("MODE", "offline"), ("CONSOLE", "off"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = train_run("wandb", "logger=[csv,wandb]", "grid.every_n_epochs=1")
    assert wandb.run is not None
    assert (wandb.run.project, wandb.run.name, wandb.run.config["data.batch_size"]) == ("tiny", "wandb", 4)
    logged = dict(wandb.run.summary)
    assert {"train/loss", "train/lr", "val/loss", "grids/N2", "grids/N4", "grids/unconditional"} <= set(logged), logged
    wandb.finish()
    (run,) = folder.glob("wandb/offline-run-*")
    assert len(list(run.glob("files/media/images/grids/*.png"))) == 3
    train_run("wandb", "logger=wandb", "trainer.max_epochs=2", "resume=auto")
    wandb.finish()
    assert {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")} == {
        run.name.rpartition("-")[2]
    }
