"""DDPM: what must not matter, faults, other settings."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.config.load import load_config
from ilvr_lightning.config.schema import OptimConfig
from ilvr_lightning.data.images import fit_image, read_image, to_pixels, to_tensor
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.loss import training_losses
from ilvr_lightning.training.module import DDPM, lr_factor
from tests.support.runs import TrainRun, assert_same_training, last, scalars


def test_weights_that_are_not_finite_are_not_saved(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step of the second epoch has a finite loss and a gradient that is not."""
    calls = itertools.count(1)

    def clip(self: DDPM, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 8:
            next(self.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]

    monkeypatch.setattr(DDPM, "configure_gradient_clipping", clip)
    assert train.main([str(tiny_config), "run.name=overflow", "trainer.max_epochs=2"]) == 1
    error = capsys.readouterr().err
    folder = tiny_config.parent / "runs" / "tiny" / "overflow"
    assert "the weights are not finite at step 8" in error
    assert f"last good checkpoint: {folder}/checkpoints/last.ckpt holds step 4" in error
    assert last(folder)["global_step"] == 4


@pytest.mark.parametrize("log_every", [1, 100])
def test_loss_that_is_not_finite_ends_the_run(
    log_every: int, train_run: TrainRun, tiny_config: Path, monkeypatch: pytest.MonkeyPatch,
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
    folder = tiny_config.parent / "runs" / "tiny" / name
    settings = [f"run.name={name}", "trainer.max_epochs=3", f"trainer.log_every_n_steps={log_every}", "data.flip=false"]
    assert train.main([str(tiny_config), *settings]) == 1
    error = capsys.readouterr().err
    assert "the loss was not finite at step 5, first at row" in error
    assert f"last good checkpoint: {folder}/checkpoints/last.ckpt holds step 4" in error
    found = re.search(r"row (\d+) of the training split \(the batch holds the rows (.*)\)\. Lower", error)
    assert found is not None
    rows = [int(row) for row in found[2].split(", ")]
    assert len(rows) == 4
    assert rows[2] == int(found[1])
    file = sorted(Path(load_config([str(tiny_config)]).data.path).iterdir())[rows[2]]  # as the image folder counts them
    expected = to_tensor(to_pixels(fit_image(read_image(file), (8, 8))))
    assert torch.equal(seen[0], expected)
    content = last(folder)
    assert content["global_step"] == 4
    assert all(v.isfinite().all() for v in content["current_model_state"].values())


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


@pytest.mark.parametrize(
    ("name", "overrides", "shape"),
    [
        ("min_snr", ["diffusion.loss=min_snr", "diffusion.prediction=v"], (3, 8, 8)),
        ("x0", ["diffusion.prediction=x0", "optim.name=adam", "optim.grad_clip=null"], (3, 8, 8)),
        ("learn_sigma", ["model.learn_sigma=true"], (3, 8, 8)),
        ("grey", ["data.channels=1"], (1, 8, 8)),
        ("wide", ["data.image_size=[8,12]"], (3, 8, 12)),
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
