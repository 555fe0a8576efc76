"""Calibration: at the end of training, sets what the presets leave to each network, on held-out images."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.diffusion.components import Components, principal_components
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.plan import MAX_SCORED, FitScores, Gains
from ilvr_lightning.errors import first_line
from ilvr_lightning.metrics.calibration import CALIBRATED_PRESETS, calibrate_presets
from ilvr_lightning.metrics.fit import are_enough, check_reference, recommend
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.hardware import fastest_copy
from ilvr_lightning.runtime.signals import reached_max_steps
from ilvr_lightning.training.ema import ema_weights, sampling_batch_size
from ilvr_lightning.training.grid import ILVRGrid
from ilvr_lightning.training.module import DDPM

MIN_IMAGES, MAX_IMAGES, STREAMED_IMAGES = 8, 4000, 500
"""Components are computed from so many training images: from fewer they say nothing, more add little."""


class Calibration(Callback):
    """Calibrates in the last epoch, with the average of the weights; the checkpoint keeps the gains.

    Every rank computes the same. A trial run (fast_dev_run, limit_train_batches) is not calibrated.

    Args:
        images: how many held-out images to follow as references; 0 skips it.
        seed: of the noise.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.spectrum: tuple[float, ...] = ()
        self.components: dict[str, Any] | None = None
        self.low_band: dict[str, dict[str, float]] = {}
        self.gains: dict[str, dict[int, Gains]] = {}
        self.fit_scores: FitScores = {}
        self.calibrated_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {
            "spectrum": self.spectrum, "components": self.components, "low_band": self.low_band,
            "octave_gains": self.gains, "fit_scores": self.fit_scores,
            "calibrated_at": self.calibrated_at,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gains, self.calibrated_at = state_dict["octave_gains"], state_dict["calibrated_at"]
        self.spectrum, self.low_band = state_dict.get("spectrum", ()), state_dict.get("low_band", {})
        self.components, self.fit_scores = state_dict.get("components"), state_dict.get("fit_scores", {})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs or reached_max_steps(trainer)
        trial = isinstance(pl_module, DDPM) and (
            trainer.fast_dev_run or pl_module.config.trainer.limit_train_batches is not None  # type: ignore[attr-defined]
        )
        if self.images and last_epoch and not trial:
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DDPM)
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        held_out = data.validation
        assert held_out is not None
        chosen = held_out.some(self.images)
        others = [i for i in held_out.some(self.images + MAX_SCORED) if i not in set(chosen)][: 4 * self.images]
        images = torch.stack([held_out[i][0] for i in chosen])
        scored = torch.stack([held_out[i][0] for i in others]).to(pl_module.device) if others else None
        batch_size = sampling_batch_size(trainer, pl_module.config.data.batch_size, 64)
        say(f"\ncalibrating  {' and '.join(CALIBRATED_PRESETS)} on {len(images)} held-out images")
        try:
            with ema_weights(trainer, pl_module):
                forward = fastest_copy(pl_module.network, pl_module.device)
                denoiser = Denoiser(forward, pl_module.schedule, pl_module.denoiser.prediction_type)
                images = images.to(pl_module.device)
                found = calibrate_presets(
                    denoiser, images, _components(data), scored, seed=self.seed, batch=batch_size, say=say
                )
                denoiser.fit_scores = found.fit_scores
                _check_references(trainer, denoiser, pl_module.device)
            self.spectrum, self.low_band, self.gains = found.spectrum, found.low_band, found.octave_gains
            self.fit_scores = found.fit_scores
            self.components = found.components.plain() if found.components is not None else None
            self.calibrated_at = trainer.global_step
        except Exception as error:  # such as no memory; what was trained must still be saved
            warnings.warn(
                f"the presets were not calibrated ({first_line(error)}); "
                "python -m ilvr_lightning.checkpoints export --calibrate does it later",
                stacklevel=2,
            )


def _check_references(trainer: pl.Trainer, denoiser: Denoiser, device: torch.device) -> None:
    """Say at which N the references of the grids fit."""
    grids = [callback for callback in trainer.callbacks if isinstance(callback, ILVRGrid)]  # type: ignore[attr-defined]
    for reference in (reference for grid in grids for reference in grid.references if reference.mask is None):
        if are_enough(denoiser.fit_scores):
            y = reference.tensor[None].to(device)
            words = recommend(check_reference(denoiser, y), (y.shape[2], y.shape[3]))[1]
            say(f"check        {reference.name}: {words}")


def _components(data: ImageDataModule) -> Components | None:
    """The principal components of the training images; None of fewer than MIN_IMAGES."""
    images = data.train
    assert images is not None
    flip, rotate90 = data.config.mirrors, data.config.rotate90
    # Of images that are turned or mirrored in four or eight ways fewer tell as much, in the same memory.
    limit = MAX_IMAGES // (4 if rotate90 else 2 if flip == "both" else 1)
    count = min(len(images), STREAMED_IMAGES if data.config.streaming else limit)
    if count < MIN_IMAGES:
        return None
    chosen = images.some(count)
    parts = (chosen[first : first + 64] for first in range(0, count, 64))
    return principal_components((torch.stack([images[i][0] for i in part]) for part in parts), flip, rotate90)
