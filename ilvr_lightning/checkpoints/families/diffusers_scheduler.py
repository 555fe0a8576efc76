"""scheduler_config.json of diffusers: betas, prediction type and clipping, read and written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.config.schema import MAX_TIMESTEPS, DiffusionConfig
from ilvr_lightning.diffusion.denoiser import PredictionType
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' prediction_type, and this project's."""

BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": lambda low, high, T: torch.linspace(low, high, T, dtype=torch.float64),
    "scaled_linear": lambda low, high, T: torch.linspace(low**0.5, high**0.5, T, dtype=torch.float64) ** 2,
    "sigmoid": lambda low, high, T: torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (high - low) + low,
}
"""diffusers' beta_schedule -> (T,) betas; squaredcos_cap_v2 is missing here because it is this project's cosine."""

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
"""DDPMScheduler has these settings, with these defaults."""

CLIPPING = ("DDPMScheduler", "DDIMScheduler")
"""These schedulers clip x_0 by default."""

SCHEDULERS = (
    *CLIPPING, "DDIMInverseScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler",
)  # fmt: skip
"""These schedulers are of variance-preserving diffusion in discrete timesteps; networks of others have other inputs."""


def clips(scheduler: dict[str, Any]) -> bool:
    """Whether a scheduler clips the predicted x_0."""
    return bool(scheduler.get("clip_sample", scheduler.get("_class_name") in CLIPPING))


def read_config(scheduler: dict[str, Any]) -> DiffusionConfig:
    """The schedule and the prediction type; what a config leaves out has DDPMScheduler's default.

    Args:
        scheduler: the content of scheduler_config.json.

    Raises:
        UserError: the network is for another kind of diffusion.
        TypeError, ValueError: the settings make no schedule.
    """
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in SCHEDULERS:
        raise UserError(
            f"its network is for a {kind!s:.100}; those for variance-preserving diffusion load (DDPMScheduler ...)"
        )
    settings = {**DEFAULTS, **scheduler}
    T, schedule, prediction_type = (settings[k] for k in ("num_train_timesteps", "beta_schedule", "prediction_type"))
    if prediction_type not in tuple(PREDICTIONS):
        raise UserError(f"prediction_type={prediction_type!s:.100} cannot be loaded; only {', '.join(PREDICTIONS)} can")
    prediction = PREDICTIONS[prediction_type]
    if not isinstance(T, int) or not 1 <= T <= MAX_TIMESTEPS:
        raise UserError(f"num_train_timesteps must be an integer up to {MAX_TIMESTEPS:,}: got {T!r:.40}")
    if settings["rescale_betas_zero_snr"]:
        raise UserError(
            "a schedule rescaled to zero SNR cannot be loaded: it ends at a beta of 1, where eps says nothing"
        )
    if settings["trained_betas"] is not None:
        return DiffusionConfig(betas=tuple(settings["trained_betas"]), prediction=prediction)
    if schedule == "squaredcos_cap_v2":
        return DiffusionConfig(schedule="cosine", num_timesteps=T, prediction=prediction)
    if schedule not in tuple(BETAS):
        raise UserError(
            f"beta_schedule={schedule!s:.100} cannot be loaded; only {', '.join(BETAS)} and squaredcos_cap_v2 can"
        )
    betas = BETAS[schedule](settings["beta_start"], settings["beta_end"], T)
    if schedule == "linear" and T > 20 and torch.allclose(betas, make_schedule("linear", T).betas, rtol=1e-9, atol=0):
        return DiffusionConfig(schedule="linear", num_timesteps=T, prediction=prediction)
    return DiffusionConfig(betas=tuple(betas.tolist()), prediction=prediction)


def config_of(description: ModelDescription) -> dict[str, Any]:
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
        "prediction_type": next(name for name, kind in PREDICTIONS.items() if kind == diffusion.prediction),
        "variance_type": "learned_range" if description.model.learn_sigma else "fixed_small",
        "clip_sample": description.clip,
        "clip_sample_range": 1.0,
        **schedule,
    }
