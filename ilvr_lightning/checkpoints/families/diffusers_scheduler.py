"""scheduler_config.json of diffusers: betas, prediction type and clipping, read and written."""

from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.config.schema import MAX_TIMESTEPS, DiffusionConfig
from ilvr_lightning.diffusion.denoiser import PredictionType
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError, first_line

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' prediction_type, and this project's."""

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
        UserError: the network is for another kind of diffusion, or the settings make no schedule.
    """
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in SCHEDULERS:
        raise UserError(
            f"its network is for a {kind!s:.100}; those for variance-preserving diffusion load (DDPMScheduler ...)"
        )
    T = scheduler.get("num_train_timesteps", 1000)
    low, high = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    name = scheduler.get("beta_schedule", "linear")
    prediction = PREDICTIONS.get(str(scheduler.get("prediction_type", "epsilon")))
    if prediction is None:
        raise UserError(
            f"prediction_type={scheduler['prediction_type']!s:.100} does not load; {', '.join(PREDICTIONS)} do"
        )
    if not isinstance(T, int) or not 1 <= T <= MAX_TIMESTEPS:
        raise UserError(f"num_train_timesteps must be an integer up to {MAX_TIMESTEPS:,}: got {T!r:.40}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError("a schedule rescaled to zero SNR does not load: it ends at a beta of 1, where eps says nothing")
    try:
        if scheduler.get("trained_betas") is not None:
            return DiffusionConfig(betas=tuple(scheduler["trained_betas"]), prediction=prediction)
        if name == "squaredcos_cap_v2":
            return DiffusionConfig(schedule="cosine", num_timesteps=T, prediction=prediction)
        if not isinstance(name, str) or name not in BETAS:
            raise UserError(f"beta_schedule={name!s:.100} does not load; {', '.join(BETAS)} and squaredcos_cap_v2 do")
        betas = BETAS[name](low, high, T)
        if name == "linear" and T > 20 and torch.allclose(betas, make_schedule("linear", T).betas, rtol=1e-9, atol=0):
            return DiffusionConfig(schedule="linear", num_timesteps=T, prediction=prediction)
        return DiffusionConfig(betas=tuple(betas.tolist()), prediction=prediction)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"the folder's scheduler makes no schedule ({first_line(error, 100)})") from None


def _linear(low: float, high: float, T: int) -> Tensor:
    return torch.linspace(low, high, T, dtype=torch.float64)


def _scaled_linear(low: float, high: float, T: int) -> Tensor:
    return _linear(low**0.5, high**0.5, T) ** 2


def _sigmoid(low: float, high: float, T: int) -> Tensor:
    return torch.sigmoid(_linear(-6, 6, T)) * (high - low) + low


BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "sigmoid": _sigmoid}
"""diffusers' beta_schedule -> (T,) betas; squaredcos_cap_v2 is missing here because it is this project's cosine."""


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
