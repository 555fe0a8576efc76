"""The reference implementation's figures (tests/golden, from ADM and ilvr_adm), and its small U-Nets in ours."""

import json
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.models.unet import UNet

FOLDER = Path(__file__).parent / "golden_data"
ModelName = Literal["ilvr", "improved", "adm_new_attention", "plain"]
MODELS: tuple[ModelName, ...] = ("ilvr", "improved", "adm_new_attention", "plain")


@cache
def _arrays() -> dict[str, Tensor]:
    with np.load(FOLDER / "reference.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def _description() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((FOLDER / "reference.json").read_text()))


def array(name: str) -> Tensor:
    return _arrays()[name].clone()


def names(prefix: str) -> list[str]:
    return [name for name in _arrays() if name.startswith(prefix)]


def hparams(model: ModelName) -> dict[str, Any]:
    return cast(dict[str, Any], _description()["models"][model]["hparams"])


def filled_state(model: ModelName) -> dict[str, Tensor]:
    """The weights under ADM's names, by the rule `fill` of reference.json."""
    state, seed = {}, _description()["seed"]
    for name, shape in _description()["models"][model]["state"].items():
        phase = zlib.crc32(name.encode()) % 1000 + seed
        size = int(np.prod(shape))
        value = (0.02 if name.startswith("out.2.") else 0.08) * np.sin(0.7 * np.arange(size) + phase)
        if len(shape) == 1 and name.endswith(".weight"):
            value = value + 1
        state[name] = torch.from_numpy(value.reshape(shape).astype(np.float32))
    return state


OPEN = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "noise_schedule", "diffusion_steps")
"""What a state dict does not tell."""


def overrides(model: ModelName) -> dict[str, Any]:
    return {name: hparams(model)[name] for name in OPEN}


@cache
def denoiser(model: ModelName) -> LoadedDenoiser:
    """Through a file in ADM's own key names."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adm.pt"
        torch.save(filled_state(model), path)
        return load_denoiser(path, overrides=overrides(model), say=None)


def network(model: ModelName) -> UNet:
    return denoiser(model).network
