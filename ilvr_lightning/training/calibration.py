"""The gains at which ILVR samples have the energy of real images above the filter's frequencies."""

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.plan import Gains
from ilvr_lightning.runtime.signals import stop_callback
from ilvr_lightning.training.ema import ema_weights, sampling_batch_size

if TYPE_CHECKING:
    from ilvr_lightning.training.module import DDPM
from ilvr_lightning.metrics.calibration import PRESETS, calibrate_presets


class Calibration(Callback):
    """Sets octave_gains for the presets in the last epoch, on held-out images, with the average of the weights.

    Every rank computes the same; the checkpoint keeps it.

    Args:
        images: how many; 0 sets none.
        seed: of the noise.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.gains: dict[str, dict[int, Gains]] = {}
        self.calibrated_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {"octave_gains": self.gains, "calibrated_at": self.calibrated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gains, self.calibrated_at = state_dict["octave_gains"], state_dict["calibrated_at"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.images and (
            trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        ):
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        held_out = trainer.datamodule.validation  # type: ignore[attr-defined]
        images = torch.stack([held_out[i][0] for i in range(min(self.images, len(held_out)))])
        module = cast("DDPM", pl_module)
        at_once = sampling_batch_size(trainer, module.config.data.global_batch, 64)
        if trainer.is_global_zero:
            print(f"\ncalibrating  {' and '.join(PRESETS)} on {len(images)} held-out images", flush=True)
        stop = stop_callback(trainer)

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            if stop is not None and stop.asked:
                raise RuntimeError("stopped")
            return module.denoiser(x, t)

        try:
            with nullcontext() if stop is None else stop.at_once(trainer), ema_weights(trainer, pl_module):
                self.gains = calibrate_presets(
                    denoise, module.schedule, images.to(module.device), seed=self.seed, batch=at_once
                )
            self.calibrated_at = trainer.global_step
        except RuntimeError as error:  # stopped, or out of memory: what was trained must still be saved
            warnings.warn(
                f"the presets were not calibrated ({str(error).partition(chr(10))[0]:.200}); "
                "python -m ilvr_lightning.pretrained export --calibrate does it later",
                stacklevel=2,
            )
