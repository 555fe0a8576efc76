"""load_denoiser(): a checkpoint's path in, a callable (x, t) -> Prediction out."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ilvr_lightning.configure import config_from_plain
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.unet import UNet

Weights = Literal["ema", "raw"]


class LoadedDenoiser(Denoiser):
    """A Denoiser with what its checkpoint says of it: image_shape (C, H, W)."""

    image_shape: tuple[int, int, int]


def load_denoiser(path: str | Path, weights: Weights = "ema") -> LoadedDenoiser:
    """Load a checkpoint of this project, in float32 on the CPU, in eval mode.

    Args:
        path: a last.ckpt or best.ckpt.
        weights: the average, or the raw weights.

    Raises:
        UserError: the file is missing, damaged, or no checkpoint.
    """
    checkpoint = read_checkpoint(Path(path))
    config = config_from_plain(checkpoint["hyper_parameters"]["config"])
    key = "state_dict" if weights == "ema" else "current_model_state"
    if key not in checkpoint:
        raise UserError(f"{path} holds no raw weights; give --weights ema")
    network = UNet(config.model, config.data.size, config.data.channels)
    load_strictly(network, without_prefix(checkpoint[key], "network."), path)
    diffusion = config.diffusion
    denoiser = LoadedDenoiser(
        network.float().eval(),
        make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas),
        config.diffusion.prediction,
    )
    denoiser.image_shape = (config.data.channels, *config.data.size)
    return denoiser


def initialise(network: UNet, path: str | Path) -> None:
    """Give a network the averaged weights of a checkpoint, to fine-tune them.

    Raises:
        UserError: the checkpoint cannot be read, or its architecture differs.
    """
    load_strictly(network, without_prefix(read_checkpoint(Path(path))["state_dict"], "network."), path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, read without executing anything.

    Raises:
        UserError: the file is missing, damaged, or no checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            first = "it holds other things than tensors and plain values"
        raise UserError(f"{path} is no checkpoint, or a damaged one ({first[:120] or type(error).__name__})") from None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("hyper_parameters"), dict)
        or not isinstance(content["hyper_parameters"].get("config"), dict)
        or "state_dict" not in content
    ):
        raise UserError(f"{path} is no checkpoint of this project: give a last.ckpt or best.ckpt that train.py wrote")
    for key in ("state_dict", "current_model_state"):
        weights = content.get(key, {})
        if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
            raise UserError(f"{path} is a damaged checkpoint: {key} holds something else than weights")
    return content


def without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_strictly(network: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load weights; missing, unexpected and misshapen ones are an error that lists the first five.

    Raises:
        UserError: the weights do not fit.
    """
    wanted = network.state_dict()
    faults = [f"{k} is missing" for k in wanted if k not in state]
    faults += [f"{k} is unexpected" for k in state if k not in wanted]
    faults += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if faults:
        raise UserError(f"{path} does not fit the network ({len(faults)} faults): {'; '.join(faults[:5])}")
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(
            f"{path} holds weights that are not finite ({len(broken)} tensors, {broken[0]} first); give an earlier one"
        )
    network.load_state_dict(state)
