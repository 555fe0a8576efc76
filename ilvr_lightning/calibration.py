"""The gain at which ILVR samples have the high band's energy of real images, set on held-out ones."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ilvr_lightning.callbacks import sampling_weights
from ilvr_lightning.diffusion.denoiser import Denoise
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.evaluation.bands import high_band_energy

if TYPE_CHECKING:
    from ilvr_lightning.module import DDPM

PRESETS = ("fast", "draft")
PROBE = 0.01
"""How far a gain is moved to see what it does."""
FARTHEST = 0.05
"""A gain is kept within so much of 1."""
BATCH = 64


def calibrate(
    denoise: Denoise, schedule: NoiseSchedule, plan: SamplingPlan, images: Tensor, seeds: Sequence[int]
) -> tuple[float, float]:
    """The high_band_gain at which samples have the high band's energy of their references, and the energy without it.

    A secant step in the logarithm of the energy, which grows by a constant factor for each hundredth of gain.

    Args:
        denoise: the network as a callable.
        schedule: its own.
        plan: with one factor; its own gain is not looked at.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain, one sample each.
        seeds: one an image.
    """

    def energy(gain: float) -> float:
        made = [
            generate(
                denoise, schedule, replace(plan, high_band_gain=gain), seeds=seeds[i : i + BATCH],
                shape=(images.shape[1], images.shape[2], images.shape[3]), reference=images[i : i + BATCH],
                device=images.device,
            )
            for i in range(0, len(images), BATCH)
        ]  # fmt: skip
        assert isinstance(plan.factor, int)
        return high_band_energy(torch.cat(made).clamp(-1, 1), images, plan.factor)

    before = energy(1.0)
    probe = 1 + (PROBE if before < 1 else -PROBE)
    slope = math.log(energy(probe) / before) / (probe - 1) if before > 0 else 0.0
    if not slope > 0:
        return 1.0, before
    return 1 + min(FARTHEST, max(-FARTHEST, -math.log(before) / slope)), before


def calibrate_presets(
    denoise: Denoise, schedule: NoiseSchedule, images: Tensor, seed: int = 0
) -> dict[str, dict[int, float]]:
    """{preset: {factor: high_band_gain}} for PRESETS and the powers of two as factors.

    Args:
        denoise: the network as a callable.
        schedule: its own.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain.
        seed: of the noise.
    """
    seeds = [derive_seed(seed, "calibration", i) for i in range(len(images))]
    height, width = images.shape[2:]
    factors = [n for n in (2, 4, 8, 16, 32, 64) if height % n == width % n == 0 and 2 * n <= min(height, width)]
    plans = {preset: SamplingPlan.preset(preset) for preset in PRESETS}
    return {
        preset: {n: round(calibrate(denoise, schedule, replace(plan, factor=n), images, seeds)[0], 4) for n in factors}
        for preset, plan in plans.items()
        if plan.num_steps <= schedule.num_timesteps
    }


class Calibration(Callback):
    """Sets high_band_gain for the presets in the last epoch, on held-out images, with the average of the weights.

    Every rank computes the same; the checkpoint keeps it.

    Args:
        images: how many; 0 sets none.
        seed: of the noise.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.gains: dict[str, dict[int, float]] = {}
        self.calibrated_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {"high_band_gain": self.gains, "calibrated_at": self.calibrated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gains, self.calibrated_at = state_dict["high_band_gain"], state_dict["calibrated_at"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.images and (
            trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        ):
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        held_out = trainer.datamodule.validation  # type: ignore[attr-defined]
        images = torch.stack([held_out[i][0] for i in range(min(self.images, len(held_out)))])
        module = cast("DDPM", pl_module)
        with sampling_weights(trainer, pl_module):
            self.gains = calibrate_presets(module.denoiser, module.schedule, images.to(module.device), self.seed)
        self.calibrated_at = trainer.global_step
