"""Two ranks train as one process does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.ranks import run_ranks
from tests.support.runs import TrainRun, last, scalars


@pytest.fixture(scope="module")
def alone(train_run: TrainRun) -> Path:
    return train_run("alone", "trainer.max_epochs=2", "grid.every_n_epochs=1")


@pytest.fixture(scope="module")
def pair(tiny_config: Path) -> Path:
    """The same run on two ranks. Its folder is named by the time, and only the first rank's name is used."""
    root = tiny_config.parent / "pair"
    first, second = run_ranks(
        "train", 2, tiny_config, "trainer.max_epochs=2", "grid.every_n_epochs=1", "trainer.devices=2",
        "trainer.strategy=ddp", f"trainer.default_root_dir={root}",
    )  # fmt: skip
    assert (first.status, second.status) == (0, 0), first.error + second.error
    assert first.out.count("devices      2 (cpu), global batch 4") == 1
    assert second.out == ""
    (folder,) = (root / "tiny").iterdir()
    return folder


@pytest.mark.parametrize(
    "tag", ["train/loss", "train/loss_q1", "train/loss_q4", "train/grad_norm", "train/lr", "val/loss"]
)
def test_losses(tag: str, alone: Path, pair: Path) -> None:
    """The three validation images do not divide by two: padding must count for nothing."""
    expected = dict(scalars(alone, tag))
    assert len(expected) >= 2
    assert dict(scalars(pair, tag)) == pytest.approx(expected, rel=1e-5)


def test_weights(alone: Path, pair: Path) -> None:
    one, two = last(alone), last(pair)
    assert one["global_step"] == two["global_step"]
    for key in ("state_dict", "current_model_state"):
        weights = [torch.cat([v.flatten() for v in content[key].values()]) for content in (one, two)]
        # Adam enlarges rounding where a gradient is nearly 0: single weights may differ by parts of a step of 1e-3.
        assert (weights[0] - weights[1]).abs().max() < 5e-4
        assert (weights[0] - weights[1]).norm() < 1e-4 * weights[0].norm()


def test_grids(alone: Path, pair: Path) -> None:
    names = [sorted(p.name for p in (f / "grids").glob("*.png")) for f in (alone, pair)]
    assert names[0] == names[1] == ["step_0000004.png", "step_0000008.png"]
    for name in names[0]:
        one, two = (np.asarray(Image.open(f / "grids" / name)).astype(int) for f in (alone, pair))
        assert np.abs(one - two).max() <= 1


def test_resume_on_another_number_of_ranks(tiny_config: Path, train_run: TrainRun, straight: Path) -> None:
    """A run of one process is resumed by two ranks."""
    folder = train_run("resumed_by_two")
    ended = run_ranks(
        "train", 2, tiny_config, "trainer.max_epochs=3", "trainer.devices=2", "trainer.strategy=ddp",
        "run.name=resumed_by_two", "resume=auto",
    )  # fmt: skip
    assert [rank.status for rank in ended] == [0, 0], ended
    assert dict(scalars(folder, "val/loss")) == pytest.approx(dict(scalars(straight, "val/loss")), rel=1e-5)
    assert last(folder)["global_step"] == 12


def test_resume_auto_needs_a_name(tiny_config: Path) -> None:
    """The ranks have nowhere to agree on the run."""
    ended = run_ranks("train", 2, tiny_config, "trainer.devices=2", "trainer.strategy=ddp", "resume=auto")
    assert [rank.status for rank in ended] == [2, 2]
    assert ended[0].error == (
        "train.py: resume=auto: processes that torchrun starts must agree on the run; give run.name=NAME\n"
    )
