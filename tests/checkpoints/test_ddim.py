"""State dicts of the DDIM repository; the oracle is diffusers' UNet2DModel, which runs Ho et al.'s network too."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ilvr_lightning.checkpoints.description import Overrides
from ilvr_lightning.checkpoints.families.ddim import FAMILY
from ilvr_lightning.checkpoints.families.family import StateDict
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.models.unet import UNet
from tests.support.checkpoints import GOOGLE, assert_same_output, inputs, random_unet, refused

DDIM_WORDS = [
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", r"down.\1.attn.\2."),
    (r"^down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]
"""diffusers' names to the DDIM authors', written down apart from the package's tables."""


def ddim_state(unet: UNet2DModel) -> dict[str, Tensor]:
    levels, state = len(unet.config["block_out_channels"]), {}
    for name, value in unet.state_dict().items():
        for pattern, word in DDIM_WORDS:
            name = re.sub(pattern, word, name)
        for kind, word in (("resnets", "block"), ("attentions", "attn"), ("upsamplers", "upsample")):
            if match := re.match(rf"up_blocks\.(\d+)\.{kind}\.(\d+)\.", name):
                place = "" if kind == "upsamplers" else f".{match[2]}"
                name = f"up.{levels - 1 - int(match[1])}.{word}{place}.{name[match.end() :]}"
        is_attention = re.search(r"\.(q|k|v|proj_out)\.weight$", name)
        state[name] = value[..., None, None].clone() if is_attention else value.clone()
    return state


@pytest.mark.parametrize("mult", [(1, 2, 2), (1, 2, 2, 2)])
def test_ddim_layout_is_ho_et_als_network(mult: tuple[int, ...], tmp_path: Path) -> None:
    inner = len(mult) - 2
    settings = GOOGLE | {
        "block_out_channels": tuple(32 * m for m in mult),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * inner),
        "up_block_types": (*["UpBlock2D"] * inner, "AttnUpBlock2D", "UpBlock2D"),
    }
    unet = random_unet(settings)
    torch.save(ddim_state(unet), tmp_path / "celeba_hq.ckpt")
    loaded = load_denoiser(tmp_path / "celeba_hq.ckpt", say=None)
    assert loaded.description.kind.startswith("DDIM state dict")
    assert loaded.image_shape == (3, 32, 32)
    assert_same_output(loaded, unet)


@pytest.mark.parametrize("setting", ["downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps", "num_heads"])
def test_each_difference_of_ho_et_als_network_matters(setting: str) -> None:
    """None of them shows in the shapes: without it the weights load without complaint, and the output is another."""
    unet = random_unet(GOOGLE)
    state = ddim_state(unet)
    description = FAMILY.describe(StateDict(path=Path("x"), tensors=state), Overrides(None, FAMILY.overridable, "ddim"))
    config = description.model
    changed: dict[str, Any] = {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-2,
                               "num_heads": 4}  # fmt: skip
    outputs = []
    for model in (config, replace(config, **{setting: changed[setting]})):
        network = UNet(model, (32, 32)).eval()
        names = FAMILY.names(network.state_dict(), model)
        network.load_state_dict(
            {
                name: torch.cat([state[n] for n in in_file]).reshape(network.state_dict()[name].shape)
                for name, in_file in names.items()
            }
        )
        with torch.no_grad():
            outputs.append(network(*inputs((3, 32, 32))))
    torch.testing.assert_close(outputs[0], unet(*inputs((3, 32, 32))).sample.detach(), rtol=0, atol=2e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 2e-4


def test_levels_of_different_depth_are_refused(tmp_path: Path) -> None:
    state = ddim_state(random_unet(GOOGLE))
    del state["down.1.block.1.norm1.weight"]
    torch.save(state, tmp_path / "x.pt")
    assert "different numbers of blocks" in refused(tmp_path / "x.pt")
