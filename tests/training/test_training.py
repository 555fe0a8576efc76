"""Training: the average, checkpoints, resume to the bit, grids that change nothing, faults, what is logged."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import train
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.config.load import load_config
from ilvr_lightning.config.schema import OptimConfig
from ilvr_lightning.data.images import fit_image, read_image, to_pixels, to_tensor
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.loss import training_losses
from ilvr_lightning.training.calibration import Calibration
from ilvr_lightning.training.checkpointing import AtomicCheckpointIO, SaveCheckpoints
from ilvr_lightning.training.ema import EMA
from ilvr_lightning.training.events import Events, mend_events
from ilvr_lightning.training.grid import ILVRGrid
from ilvr_lightning.training.log import TrainingLog
from ilvr_lightning.training.module import DDPM, lr_factor
from tests.system.kill.runs import equal

TrainRun = Callable[..., Path]
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


@pytest.fixture(scope="module")
def straight(train_run: TrainRun) -> Path:
    """Three epochs of four steps, without grids."""
    return train_run("straight", "trainer.max_epochs=3")


GRIDS = ("trainer.max_epochs=3", "grid.every_n_steps=3", "grid.every_n_epochs=1")


@pytest.fixture(scope="module")
def with_grids(train_run: TrainRun) -> Path:
    """The same with grids at steps 3, 4, 6, 8, 9 and 12."""
    return train_run("with_grids", *GRIDS)


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
    for tag in ("ilvr/grid", "samples/unconditional"):
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


# The average


class Scalar(pl.LightningModule):
    """One weight, which a test sets by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))


def test_ema_by_hand() -> None:
    module, trainer = Scalar(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    ema = EMA(decay=0.3)
    ema.setup(trainer, module, "fit")
    average, steps = 1.0, [5.0, -2.0, 7.0, 11.0]
    for n, value in enumerate(steps, start=1):
        module.weight.data.fill_(value)
        assert ema._average_model is not None
        ema._average_model.update_parameters(module)
        if n == 1:
            average = value  # torch copies the first weights
        else:
            decay = min(0.3, n / (9 + n))  # warm-up: 2/11, 3/12, then 0.3
            average = decay * average + (1 - decay) * value
        with ema.averaged(module):
            assert module.weight.item() == pytest.approx(average, rel=1e-6)
        assert module.weight.item() == value


def test_raw_weights_come_back_after_an_error() -> None:
    module, trainer = Scalar(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    ema = EMA()
    ema.setup(trainer, module, "fit")
    module.weight.data.fill_(3.0)
    with pytest.raises(ZeroDivisionError), ema.averaged(module):
        assert module.weight.item() == 1.0
        raise ZeroDivisionError
    assert module.weight.item() == 3.0


def test_checkpoint_holds_average_and_raw_weights(trained: Path) -> None:
    content = last(trained)
    ema, raw = content["state_dict"], content["current_model_state"]
    assert ema.keys() == raw.keys()
    assert not equal(ema, raw)
    assert content["global_step"] == 8
    assert type(content["hyper_parameters"]["config"]) is dict
    for name in ("last", "best"):
        loaded = load_denoiser(trained / "checkpoints" / f"{name}.ckpt")
        expected = last(trained, name)["state_dict"]
        assert equal({f"network.{k}": v for k, v in loaded.network.state_dict().items()}, expected)


def test_average_follows_the_raw_weights(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: list[dict[str, Tensor]] = []
    original = DDPM.on_train_batch_end

    def record(self: DDPM, *args: Any) -> None:
        raw.append({k: v.detach().double() for k, v in self.state_dict().items()})
        original(self, *args)

    monkeypatch.setattr(DDPM, "on_train_batch_end", record)
    folder = train_run("recorded", "trainer.max_epochs=2", "ema.decay=0.25")
    average = raw[0]
    for n, weights in enumerate(raw[1:], start=1):
        decay = min(0.25, (1 + n) / (10 + n))
        average = {k: decay * v + (1 - decay) * weights[k] for k, v in average.items()}
    stored = last(folder)["state_dict"]
    assert len(raw) == 8
    assert max(float((stored[k] - v).abs().max()) for k, v in average.items()) < 1e-7


# Going on


def test_resume_after_an_epoch(train_run: TrainRun, straight: Path) -> None:
    folder = train_run("after_an_epoch")
    train_run("after_an_epoch", "trainer.max_epochs=3", "resume=auto")
    assert_same_training(folder, straight)
    assert [step for step, _ in scalars(folder, "val/loss")] == [4, 8, 12]
    assert scalars(folder, "val/loss") == scalars(straight, "val/loss")
    assert scalars(folder, "train/loss") == scalars(straight, "train/loss")
    assert len({loss for _, loss in scalars(folder, "val/loss")}) == 3


def test_resume_in_mid_epoch(train_run: TrainRun, recipe: Path, straight: Path) -> None:
    """A crash at step 7; the last save was at step 6, the second of its epoch's four."""
    with crashing(DDPM, "training_step", 8), pytest.raises(LookupError):
        train_run("crashed", "trainer.max_epochs=3", "checkpoint.every_n_steps=3")
    folder = recipe.parent / "runs" / "tiny" / "crashed"
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


@pytest.mark.parametrize(
    ("owner", "method", "call", "saved"),
    [
        (DDPM, "training_step", 6, 6),
        (DDPM, "training_step", 8, 8),  # the last one of its epoch
        (DDPM, "validation_step", 2, 8),
        (ILVRGrid, "_sample", 3, 6),  # a grid every three steps
        (ILVRGrid, "_sample", 4, 8),  # and at the end of each epoch
        (EMA, "on_validation_epoch_end", 2, 8),
        (SaveCheckpoints, "on_train_epoch_end", 2, 8),
        (TrainingLog, "on_train_batch_end", 6, 6),
    ],
)
def test_control_c_saves_and_says_how_to_resume(
    owner: type, method: str, call: int, saved: int, train_run: TrainRun, recipe: Path, with_grids: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f"interrupted_{owner.__name__}_{method}_{call}"
    with signalling(owner, method, call, signal.SIGINT):
        assert train.main([str(recipe), f"run.name={name}", *GRIDS]) == 130
    folder = recipe.parent / "runs" / "tiny" / name
    said = f"and saved; go on with: python train.py {folder}/config.yaml resume={folder}/checkpoints/last.ckpt"
    assert f"stopped at step {saved} {said}" in capsys.readouterr().out
    assert last(folder)["global_step"] == saved
    train_run(name, *GRIDS, f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, with_grids)
    assert_same_logs(folder, with_grids, tmp=recipe.parent)


ENDS = {
    "without validation": ("trainer.limit_val_batches=0", "trainer.max_epochs=3"),
    "validation every other epoch": ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"),
    "validation within the epoch": ("trainer.val_check_interval=0.5", "trainer.max_epochs=3"),
    "by steps": ("trainer.max_steps=6", "trainer.max_epochs=-1"),
    "by steps, at an epoch's end": ("trainer.max_steps=8", "trainer.max_epochs=-1"),
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [
        (DDPM, "training_step", 2), (DDPM, "training_step", 4), (DDPM, "training_step", 6), (ILVRGrid, "_sample", 1),
        (ILVRGrid, "_sample", 2), (DDPM, "validation_step", 2), (Calibration, "_calibrate", 1),
    ],
)  # fmt: skip
def test_an_epochs_end_is_done_again(
    owner: type, method: str, call: int, ends: str, train_run: TrainRun, recipe: Path, request: pytest.FixtureRequest
) -> None:
    """Whatever follows the step that a signal or a crash hits: grids, losses, gains, each once."""
    settings = (
        *ENDS[ends],
        "grid.every_n_epochs=1",
        "calibration.images=2",
        "checkpoint.every_n_steps=2",
        "resume=auto",
    )
    tag = re.sub(r"\W", "", ends)
    alone = recipe.parent / "runs" / "tiny" / f"ends_{tag}"
    if not alone.exists():
        train_run(alone.name, *settings)
    for kind, at in (
        ("stopped", signalling(owner, method, call, signal.SIGTERM)),
        ("crashed", crashing(owner, method, call)),
    ):
        name = f"ends_{tag}_{kind}_{owner.__name__}_{method}_{call}"
        status = None
        with at, contextlib.suppress(LookupError):
            status = train.main([str(recipe), f"run.name={name}", *settings])
        train_run(name, *settings)
        assert_same_logs(alone.parent / name, alone, tmp=recipe.parent)
        first, second = last(alone.parent / name), last(alone)
        assert {key: equal(first[key], second[key]) for key in STATES} == dict.fromkeys(STATES, True)
        for content in (first, second):
            for state in content["callbacks"].values():
                state.pop("training_seconds", None)
        if kind == "stopped" and status == 0:  # all steps were done: a resumed run does nothing
            (name,) = (name for name in first["callbacks"] if name.startswith("Calibration"))
            left_out = first["callbacks"][name] == {"octave_gains": {}, "calibrated_at": -1}
            assert left_out or owner is not Calibration
            if left_out:
                first["callbacks"][name] = second["callbacks"][name]
        elif kind == "stopped" and owner is Calibration:
            assert (status, ends) == (75, "validation within the epoch")
        assert first["callbacks"] == second["callbacks"]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("step", [6, 8])
def test_resume_with_another_accumulation(
    before: int, after: int, step: int, train_run: TrainRun, recipe: Path, straight: Path
) -> None:
    name = f"accumulation_{before}_{after}_{step}"
    with signalling(DDPM, "training_step", step * before, signal.SIGTERM):
        settings = [f"run.name={name}", "trainer.max_epochs=3", f"trainer.accumulate_grad_batches={before}"]
        assert train.main([str(recipe), *settings]) == 75
    folder = train_run(name, "trainer.max_epochs=3", f"trainer.accumulate_grad_batches={after}", "resume=auto")
    assert last(folder)["global_step"] == 12
    assert [s for s, _ in scalars(folder, "val/loss")] == [4, 8, 12]
    one, two = (dict(scalars(f, "train/loss")) for f in (folder, straight))
    assert one == pytest.approx(two, rel=2e-5)


def test_resume_takes_the_last_before_the_best(train_run: TrainRun, straight: Path) -> None:
    """A run that was killed between the two saves of an epoch's end goes on from before both."""
    with at_call(AtomicCheckpointIO, "save_checkpoint", 4, crash), pytest.raises(LookupError):  # best, last, best
        train_run("between", "trainer.max_epochs=3")
    folder = straight.parent / "between"
    assert [last(folder, name)["global_step"] for name in ("best", "last")] == [8, 4]
    train_run("between", "trainer.max_epochs=3", "resume=auto")
    assert_same_training(folder, straight)


def test_weights_that_are_not_finite_are_not_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step of the second epoch has a finite loss and a gradient that is not."""
    calls = itertools.count(1)

    def clip(self: DDPM, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 8:
            next(self.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]

    monkeypatch.setattr(DDPM, "configure_gradient_clipping", clip)
    assert train.main([str(recipe), "run.name=overflow", "trainer.max_epochs=2"]) == 1
    error = capsys.readouterr().err
    folder = recipe.parent / "runs" / "tiny" / "overflow"
    assert "the weights are not finite at step 8" in error
    assert f"last good checkpoint: {folder}/checkpoints/last.ckpt holds step 4" in error
    assert last(folder)["global_step"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_notice_of_a_scheduler(number: signal.Signals, train_run: TrainRun, recipe: Path, straight: Path) -> None:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    name = f"requeued_{number.name}"
    with signalling(DDPM, "training_step", 7, number):
        assert train.main([str(recipe), f"run.name={name}", "trainer.max_epochs=3", "resume=auto"]) == 75
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    assert last(straight.parent / name)["global_step"] == 7
    train_run(name, "trainer.max_epochs=3", "resume=auto")
    assert_same_training(straight.parent / name, straight)


@pytest.mark.parametrize("call", [12, 13])
def test_control_c_within_an_accumulated_step(call: int, train_run: TrainRun, recipe: Path, accumulated: Path) -> None:
    name = f"interrupted_accumulation_{call}"
    overrides = ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"]
    with signalling(DDPM, "training_step", call, signal.SIGINT):
        assert train.main([str(recipe), f"run.name={name}", *overrides]) == 130
    folder = recipe.parent / "runs" / "tiny" / name
    assert last(folder)["global_step"] == -(-call // 2)
    train_run(name, *overrides, f"resume={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_training(folder, accumulated)


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


@pytest.mark.parametrize("log_every", [1, 100])
def test_loss_that_is_not_finite_ends_the_run(
    log_every: int, train_run: TrainRun, recipe: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The third image of step 5 is bad; the epoch's end, at step 4, is saved."""
    calls, seen = itertools.count(), []

    def losses(denoiser: Denoiser, x0: Tensor, *args: Any) -> Tensor:
        assert isinstance(denoiser.network, torch.nn.Module)
        bad = torch.ones(len(x0))
        if denoiser.network.training and next(calls) == 5:
            bad[2] = float("nan")
            seen.append(x0[2])
        return training_losses(denoiser, x0, *args) * bad

    monkeypatch.setattr("ilvr_lightning.training.module.training_losses", losses)
    name = f"not_finite_{log_every}"
    folder = recipe.parent / "runs" / "tiny" / name
    settings = [f"run.name={name}", "trainer.max_epochs=3", f"trainer.log_every_n_steps={log_every}", "data.flip=false"]
    assert train.main([str(recipe), *settings]) == 1
    error = capsys.readouterr().err
    assert "the loss was not finite at step 5, first at row" in error
    assert f"last good checkpoint: {folder}/checkpoints/last.ckpt holds step 4" in error
    found = re.search(r"row (\d+) of the training split \(of the batch's rows (.*)\)\. Lower", error)
    assert found is not None
    rows = [int(row) for row in found[2].split(", ")]
    assert len(rows) == 4
    assert rows[2] == int(found[1])
    file = sorted(Path(load_config([str(recipe)])[0].data.path).iterdir())[rows[2]]  # as the image folder counts them
    expected = to_tensor(to_pixels(fit_image(read_image(file), (8, 8))))
    assert torch.equal(seen[0], expected)
    content = last(folder)
    assert content["global_step"] == 4
    assert all(v.isfinite().all() for v in content["current_model_state"].values())


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB: three checkpoints or so."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))


def on_disk(recipe: Path, disk: Path, *overrides: str) -> list[str]:
    """Arguments of a run whose folder is on it; decoded images and the rest are elsewhere."""
    root = f"trainer.default_root_dir={disk}"
    return [str(recipe), "run.name=full", "trainer.max_epochs=3", "data.cache_mb=0", root, *overrides]


def test_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    recipe: Path, small_disk: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with at_call(DDPM, "training_step", 7, lambda: fill(small_disk)):
        assert train.main(on_disk(recipe, small_disk)) == 1
    error = capsys.readouterr().err
    folder = small_disk / "tiny" / "full"
    assert error.count("\n") == 1
    assert "the disk is full" in error
    assert "free some space, or write elsewhere" in error
    assert last(folder)["global_step"] == 4
    assert list(folder.rglob(".*")) == []
    (small_disk / "ballast").unlink()
    assert train.main(on_disk(recipe, small_disk, "resume=auto")) == 0
    assert_same_training(folder, straight)


def test_full_disk_may_be_waited_for(recipe: Path, small_disk: Path, straight: Path) -> None:
    """Full in the second epoch, free in the third: the run goes on meanwhile."""
    settings = ("checkpoint.on_full_disk=continue", "grid.every_n_epochs=1")
    with (
        at_call(DDPM, "training_step", 6, lambda: fill(small_disk)),
        at_call(DDPM, "training_step", 10, (small_disk / "ballast").unlink),
        pytest.warns(UserWarning, match=r"last.ckpt could not be written at step 8 .*last.ckpt holds step 4"),
    ):
        assert train.main(on_disk(recipe, small_disk, *settings)) == 0
    folder = small_disk / "tiny" / "full"
    first, second = last(folder), last(straight)
    assert {key: equal(first[key], second[key]) for key in STATES} == dict.fromkeys(STATES, True)
    assert [step for step, _ in scalars(folder, "val/loss")][-1] == 12


def test_full_disk_at_the_end_is_no_success(recipe: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        at_call(DDPM, "training_step", 10, lambda: fill(small_disk)),
        pytest.warns(UserWarning, match="last.ckpt could not be written at step 12"),
    ):
        assert train.main(on_disk(recipe, small_disk, "checkpoint.on_full_disk=continue")) == 1
    said = capsys.readouterr()
    assert re.search(r"the disk is full \(step 12 could not be saved; .*last\.ckpt holds step 8\)", said.err)
    assert "done" not in said.out


@pytest.mark.parametrize("cut", [1, 5, 12, 17, 30])
def test_half_a_record_is_cut_off(cut: int, tmp_path: Path) -> None:
    """A reader stops at it, and would show nothing that comes after."""
    for part in range(2):
        logger = Events(tmp_path, None if part == 0 else 1)
        for step in range(3):
            logger.log_metrics({"x": float(part)}, step=3 * part + step)
        logger.finalize("success")
        if part == 0:
            (file,) = tmp_path.iterdir()
            file.write_bytes(file.read_bytes()[:-cut])
            mend_events(tmp_path)
            whole = file.read_bytes()
            mend_events(tmp_path)
            assert file.read_bytes() == whole
            file.rename(tmp_path / "events.out.tfevents.0000000000.first")
    log = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in log.Scalars("x")] == [(0, 0), (1, 0), (3, 1), (4, 1), (5, 1)]


# What must not matter


def test_grids_leave_the_weights_alone(trained: Path, train_run: TrainRun) -> None:
    assert_same_training(train_run("no_grids", "trainer.max_epochs=2"), trained)
    assert not (trained.parent / "no_grids" / "grids").exists()


def test_global_generators_do_not_matter(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything that draws from them between the steps."""
    plain = train_run("plain")
    original = DDPM.training_step

    def disturbed(self: DDPM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(batch_idx)
        np.random.seed(batch_idx)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DDPM, "training_step", disturbed)
    assert_same_training(train_run("disturbed"), plain)


def test_workers_and_cache_do_not_matter(train_run: TrainRun, straight: Path) -> None:
    folder = train_run("workers", "trainer.max_epochs=3", "data.cache_mb=0", "data.num_workers=1")
    assert_same_training(folder, straight)


@pytest.fixture(scope="module")
def accumulated(train_run: TrainRun) -> Path:
    return train_run("accumulated", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2")


def test_accumulation_gives_the_same_losses(accumulated: Path, straight: Path) -> None:
    for tag in ("train/loss", "train/loss_q2", "train/grad_norm", "train/lr", "val/loss"):
        steps, expected = zip(*scalars(straight, tag), strict=True)
        found_steps, found = zip(*scalars(accumulated, tag), strict=True)
        assert (tag, found_steps) == (tag, steps)
        assert found == pytest.approx(expected, rel=2e-5), tag


def test_fine_tuning_starts_from_the_average(trained: Path, train_run: TrainRun) -> None:
    checkpoint = trained / "checkpoints" / "last.ckpt"
    folder = train_run("tuned", f"init_from={checkpoint}", "optim.lr=1e-30", "trainer.max_steps=1", "seed=5")
    source = last(trained)
    for key in ("current_model_state", "state_dict"):
        for name, value in last(folder)[key].items():
            torch.testing.assert_close(value, source["state_dict"][name], rtol=0, atol=1e-20)


# What is logged and written


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


def test_grid_files(trained: Path, images: Path) -> None:
    """Three validation images down; across: reference, two factors of low-pass and sample, one unconditional."""
    assert sorted(p.name for p in (trained / "grids").iterdir()) == ["step_0000004.png", "step_0000008.png"]
    sheets = [np.asarray(Image.open(p)) for p in sorted((trained / "grids").iterdir())]
    assert sheets[0].shape == (44 + 12 + 3 * 98, 2 * 12 + 3 * 12 + 96 + 2 * 194 + 96, 3)
    low_pass, sample = (slice(44, 140), slice(120, 216)), (slice(44, 140), slice(218, 314))
    assert (sheets[0][low_pass] == sheets[1][low_pass]).all()
    assert (sheets[0][sample] != sheets[1][sample]).any()


@pytest.mark.parametrize(
    ("name", "overrides", "shape"),
    [
        ("min_snr", ["diffusion.loss=min_snr", "diffusion.prediction=v"], (3, 8, 8)),
        ("x0", ["diffusion.prediction=x0", "optim.name=adam", "optim.grad_clip=null"], (3, 8, 8)),
        ("learn_sigma", ["model.learn_sigma=true"], (3, 8, 8)),
        ("grey", ["data.channels=1"], (1, 8, 8)),
        ("wide", ["data.image_size=[8,12]"], (3, 8, 12)),
        ("patches", ["model.patch_size=2"], (3, 8, 8)),
    ],
)
def test_other_trainings(name: str, overrides: list[str], shape: tuple[int, int, int], train_run: TrainRun) -> None:
    folder = train_run(name, *overrides, "grid.every_n_epochs=1")
    losses = [value for _, value in scalars(folder, "train/loss")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    loaded = load_denoiser(folder / "checkpoints" / "last.ckpt")
    assert loaded.image_shape == shape
    prediction = loaded(torch.zeros(2, *shape), torch.tensor([1, 25]))
    assert prediction.x0.shape == (2, *shape)
    assert (prediction.log_variance is not None) == (name == "learn_sigma")
    with Image.open(folder / "grids" / "step_0000004.png") as grid:
        assert grid.mode == "RGB"
        tile = np.asarray(grid)[44 : 44 + 96, 12 : 12 + 96].astype(int)
    assert (np.ptp(tile, axis=2).max() == 0) == (name == "grey")


@pytest.mark.parametrize(
    ("step", "settings", "expected"),
    [
        (0, {"warmup_steps": 0}, 1.0),
        (0, {"warmup_steps": 9}, 0.1),
        (4, {"warmup_steps": 9}, 0.5),
        (9, {"warmup_steps": 9}, 1.0),
        (10**6, {"warmup_steps": 9}, 1.0),
        (0, {"warmup_steps": 0, "decay_steps": 100}, 1.0),
        (50, {"warmup_steps": 0, "decay_steps": 100}, 0.5),
        (25, {"warmup_steps": 0, "decay_steps": 100}, 0.8535533905932737),
        (100, {"warmup_steps": 0, "decay_steps": 100}, 0.0),
        (900, {"warmup_steps": 0, "decay_steps": 100}, 0.0),
    ],
)
def test_learning_rate(step: int, settings: dict[str, Any], expected: float) -> None:
    assert lr_factor(step, OptimConfig(**settings)) == pytest.approx(expected, abs=1e-12)
