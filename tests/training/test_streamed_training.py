"""Training on streamed shards: resumed in mid-epoch, accumulated, on two ranks, with broken rows."""

import threading
from pathlib import Path

import pytest

from ilvr_lightning.training.module import DDPM
from tests.support.image_sets import STREAM, write_noise_shards, write_shards
from tests.support.ranks import run_ranks
from tests.support.runs import TrainRun, assert_same_training, crashing, last, scalars


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The images of the tiny config as shards that do not divide."""
    folder = tmp_path_factory.mktemp("noisy")
    write_noise_shards(folder, images)
    return folder


@pytest.fixture(scope="module")
def streamed(train_run: TrainRun, noisy: Path) -> Path:
    """36 rows, six held out: 15 steps in epochs of four, where a pass has six."""
    return train_run("streamed", f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25")


def test_epochs_of_a_number_of_images(streamed: Path) -> None:
    assert last(streamed)["global_step"] == 12
    assert [step for step, _ in scalars(streamed, "val/loss")] == [4, 8, 12]


def test_epochs_of_a_number_of_images_map_style(train_run: TrainRun) -> None:
    """Only when an epoch ends is another matter: the order is that of passes over the whole set."""
    five = train_run("epochs_of_three", "data.epoch_images=13", "trainer.max_epochs=4")
    three = train_run("epochs_of_four", "trainer.max_epochs=3")
    assert [step for step, _ in scalars(five, "val/loss")] == [3, 6, 9, 12]
    assert scalars(five, "train/loss") == scalars(three, "train/loss")
    assert_same_training(five, three)


@pytest.mark.parametrize("call", [8, 9, 11])
def test_resume_in_mid_epoch(call: int, train_run: TrainRun, tiny_config: Path, noisy: Path, streamed: Path) -> None:
    name = f"streamed_crash_{call}"
    overrides = [f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25"]
    threads = threading.active_count()
    with crashing(DDPM, "training_step", call), pytest.raises(LookupError):
        train_run(name, *overrides, "checkpoint.every_n_steps=3")
    folder = tiny_config.parent / "runs" / "tiny" / name
    assert last(folder)["global_step"] == {8: 6, 9: 8, 11: 9}[call]
    train_run(name, *overrides, f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, streamed)
    assert threading.active_count() == threads


def test_accumulation_gives_the_same_losses(train_run: TrainRun, noisy: Path, streamed: Path) -> None:
    folder = train_run(
        "streamed_accumulated", f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25",
        "trainer.accumulate_grad_batches=2", "data.num_workers=1",
    )  # fmt: skip
    found, expected = (dict(scalars(f, "train/loss")) for f in (folder, streamed))
    assert found == pytest.approx(expected, rel=2e-5)


def test_broken_rows_are_told_of(train_run: TrainRun, tmp_path: Path) -> None:
    write_shards(tmp_path, broken=[9])
    with pytest.warns(UserWarning) as caught:
        train_run("streamed_broken", f"data.path={tmp_path}", *STREAM, "trainer.max_epochs=3")
    said = {str(w.message) for w in caught if "is skipped" in str(w.message)}
    assert said == {
        f"row 9 of {tmp_path.name}/train is skipped: an image cannot be read as an image: Truncated File Read"
    }


def test_two_ranks_have_the_losses_of_one(tiny_config: Path, noisy: Path, streamed: Path) -> None:
    """They end, too: five shards, one of them empty, over two ranks."""
    root = tiny_config.parent / "streamed_pair"
    ended = run_ranks(
        "train", 2, tiny_config, f"data.path={noisy}", *STREAM, "trainer.max_epochs=3", "data.epoch_images=25",
        "trainer.devices=2", "trainer.strategy=ddp", f"trainer.default_root_dir={root}",
    )  # fmt: skip
    assert [rank.status for rank in ended] == [0, 0], ended
    (folder,) = (root / "tiny").iterdir()
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert dict(scalars(folder, tag)) == pytest.approx(dict(scalars(streamed, tag)), rel=1e-5), tag
