"""Schedulers of diffusers: their betas, prediction type and clipping, in and out."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.checkpoints.files import read_json
from ilvr_lightning.config.schema import MAX_TIMESTEPS, DiffusionConfig
from ilvr_lightning.diffusion.denoiser import PredictionType
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


CLIPPING = ("DDPMScheduler", "DDIMScheduler")
"""Schedulers that clip x_0 unless told otherwise."""


SCHEDULERS = (
    *CLIPPING, "DDIMInverseScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler",
)  # fmt: skip
"""Schedulers of variance-preserving diffusion in discrete timesteps; a network for others wants other input."""


def read_scheduler(folder: Path) -> dict[str, Any] | None:
    file = scheduler_file(folder)
    return None if file is None else read_json(file)


def scheduler_file(folder: Path) -> Path | None:
    """scheduler_config.json of a network's folder: in it, in scheduler/ below, or, for unet/, beside it."""
    beside = [folder.parent / "scheduler"] if folder.name == "unet" else []
    for candidate in (folder, folder / "scheduler", *beside):
        if (candidate / "scheduler_config.json").is_file():
            return candidate / "scheduler_config.json"
    return None


def diffusion_of(scheduler: dict[str, Any], folder: Path) -> DiffusionConfig:
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in SCHEDULERS:
        raise UserError(
            f"{folder}: its network is for a {kind}; those for variance-preserving diffusion load (DDPM, ...)"
        )
    T = scheduler.get("num_train_timesteps", 1000)
    low, high = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    name = scheduler.get("beta_schedule", "linear")
    prediction = PREDICTIONS.get(str(scheduler.get("prediction_type", "epsilon")))
    if prediction is None:
        raise UserError(f"{folder}: prediction_type={scheduler['prediction_type']}; {', '.join(PREDICTIONS)} load")
    if not isinstance(T, int) or not 1 <= T <= MAX_TIMESTEPS:
        raise UserError(f"{folder}: num_train_timesteps must be a whole number up to {MAX_TIMESTEPS:,}: got {T!r:.40}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"{folder}: a schedule rescaled to zero SNR ends at a beta of 1, where eps says nothing")
    try:
        if scheduler.get("trained_betas") is not None:
            return DiffusionConfig(betas=tuple(scheduler["trained_betas"]), prediction=prediction)
        if name == "squaredcos_cap_v2":
            return DiffusionConfig(schedule="cosine", num_timesteps=T, prediction=prediction)
        if not isinstance(name, str) or name not in BETAS:
            raise UserError(f"{folder}: beta_schedule={name}; {', '.join(BETAS)} and squaredcos_cap_v2 load")
        betas = BETAS[name](low, high, T)
        if name == "linear" and T > 20 and torch.allclose(betas, make_schedule("linear", T).betas, rtol=1e-9, atol=0):
            return DiffusionConfig(schedule="linear", num_timesteps=T, prediction=prediction)
        return DiffusionConfig(betas=tuple(betas.tolist()), prediction=prediction)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"{folder}: its scheduler makes no schedule ({str(error).partition(chr(10))[0]:.100})"
        ) from None


def _linear(low: float, high: float, T: int) -> Tensor:
    return torch.linspace(low, high, T, dtype=torch.float64)


def _scaled_linear(low: float, high: float, T: int) -> Tensor:
    return _linear(low**0.5, high**0.5, T) ** 2


def _sigmoid(low: float, high: float, T: int) -> Tensor:
    return torch.sigmoid(_linear(-6, 6, T)) * (high - low) + low


BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "sigmoid": _sigmoid}
"""diffusers' beta_schedule, beside squaredcos_cap_v2, which is our cosine."""


def scheduler_config(description: ModelDescription) -> dict[str, Any]:
    """scheduler_config.json of a DDPMScheduler that samples as the network was trained."""
    diffusion = description.diffusion
    schedule: dict[str, Any] = {"trained_betas": list(diffusion.betas)} if diffusion.betas is not None else {}
    if not schedule:
        betas = make_schedule(diffusion.schedule, diffusion.num_timesteps).betas
        schedule = {"beta_schedule": "squaredcos_cap_v2"}
        if diffusion.schedule == "linear":
            schedule = {"beta_schedule": "linear", "beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.T,
        "prediction_type": next(theirs for theirs, ours in PREDICTIONS.items() if ours == diffusion.prediction),
        "variance_type": "learned_range" if description.model.learn_sigma else "fixed_small",
        "clip_sample": description.clip,
        "clip_sample_range": 1.0,
        **schedule,
    }
