"""ILVR (Choi et al., ICCV 2021): train an unconditional diffusion model and steer it with a reference picture.

For Lightning: DDPM, ImageDataModule, ILVRGrid, EMA, TrainingLog. For sampling: load_denoiser, generate, SamplingPlan.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ilvr_lightning.checkpoints.load import load_denoiser as load_denoiser
    from ilvr_lightning.data.datamodule import ImageDataModule as ImageDataModule
    from ilvr_lightning.diffusion.conditioning import ILVR as ILVR
    from ilvr_lightning.diffusion.denoiser import Denoiser as Denoiser
    from ilvr_lightning.diffusion.denoiser import Prediction as Prediction
    from ilvr_lightning.diffusion.generate import generate as generate
    from ilvr_lightning.diffusion.generate import generate_steps as generate_steps
    from ilvr_lightning.diffusion.low_pass import LowPassFilter as LowPassFilter
    from ilvr_lightning.diffusion.noise import PerImageNoise as PerImageNoise
    from ilvr_lightning.diffusion.plan import SamplingPlan as SamplingPlan
    from ilvr_lightning.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from ilvr_lightning.diffusion.schedule import respaced_timesteps as respaced_timesteps
    from ilvr_lightning.training.ema import EMA as EMA
    from ilvr_lightning.training.grid import ILVRGrid as ILVRGrid
    from ilvr_lightning.training.log import TrainingLog as TrainingLog
    from ilvr_lightning.training.module import DDPM as DDPM

_HOME = {
    "DDPM": "training.module",
    "Denoiser": "diffusion.denoiser",
    "EMA": "training.ema",
    "ILVR": "diffusion.conditioning",
    "ILVRGrid": "training.grid",
    "ImageDataModule": "data.datamodule",
    "LowPassFilter": "diffusion.low_pass",
    "NoiseSchedule": "diffusion.schedule",
    "PerImageNoise": "diffusion.noise",
    "Prediction": "diffusion.denoiser",
    "SamplingPlan": "diffusion.plan",
    "TrainingLog": "training.log",
    "generate": "diffusion.generate",
    "generate_steps": "diffusion.generate",
    "load_denoiser": "checkpoints.load",
    "respaced_timesteps": "diffusion.schedule",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    # Imported when first used, so that a command line answers --help without waiting for torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
