"""The reference implementation's figures (tests/golden, from ADM and ilvr_adm), and its small U-Nets in ours."""

import json
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet

FOLDER = Path(__file__).parent / "golden"
ModelName = Literal["ilvr", "improved", "adm_new_attention", "plain"]
MODELS: tuple[ModelName, ...] = ("ilvr", "improved", "adm_new_attention", "plain")

RENAMED = {
    r"^time_embed\.": "time_embedding.",
    r"^middle_block\.0\.": "middle.0.block.",
    r"^middle_block\.1\.": "middle.0.attention.",
    r"^middle_block\.2\.": "middle.1.block.",
    r"^out\.0\.": "norm.",
    r"^out\.2\.": "out.",
    r"^(in|out)put_blocks\.(\d+)\.0\.": r"\1put_blocks.\2.block.",
    # What follows a residual block is attention where it has queries, else it changes the size.
    r"^(in|out)put_blocks\.(\d+)\.1\.(norm|qkv|proj_out)\.": r"\1put_blocks.\2.attention.\3.",
    r"^(in|out)put_blocks\.(\d+)\.[12]\.": r"\1put_blocks.\2.resampler.",
    r"^input_blocks\.": "encoder.",
    r"^output_blocks\.": "decoder.",
    r"\.in_layers\.0\.": ".norm1.",
    r"\.in_layers\.2\.": ".conv1.",
    r"\.emb_layers\.1\.": ".embedding.",
    r"\.out_layers\.0\.": ".norm2.",
    r"\.out_layers\.3\.": ".conv2.",
    r"\.skip_connection\.": ".skip.",
    r"\.op\.": ".conv.",
    r"\.proj_out\.": ".out.",
}
"""ADM's key names to ours, applied in this order."""


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


def renamed_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ADM's state dict under our names; its attention's 1-d convolutions are linear layers here."""
    renamed = {}
    for name, value in state.items():
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        renamed[name] = value.squeeze(-1) if re.search(r"attention\.(qkv|out)\.weight$", name) else value
    return renamed


@cache
def network(model: ModelName) -> UNet:
    h = hparams(model)
    config = UNetConfig(
        channels=h["num_channels"],
        channel_mult=tuple(map(int, h["channel_mult"].split(","))),
        attention_resolutions=tuple(map(int, h["attention_resolutions"].split(","))),
        **{
            name: h[name]
            for name in (
                "num_res_blocks",
                "num_head_channels",
                "num_heads",
                "resblock_updown",
                "use_scale_shift_norm",
                "use_new_attention_order",
                "dropout",
                "learn_sigma",
            )
        },
    )
    unet = UNet(config, (h["image_size"], h["image_size"]))
    unet.load_state_dict(renamed_state(filled_state(model)))
    return unet.eval()


def denoiser(model: ModelName) -> Denoiser:
    T = hparams(model)["diffusion_steps"]
    schedule = NoiseSchedule.linear(T) if hparams(model)["noise_schedule"] == "linear" else NoiseSchedule.cosine(T)
    return Denoiser(network(model), schedule)
