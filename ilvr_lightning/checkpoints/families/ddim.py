"""State dicts of the DDIM repository: Ho et al.'s network in PyTorch (CelebA-HQ and LSUN files, SDEdit, DDRM)."""

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, model_config, multipliers
from ilvr_lightning.checkpoints.families.family import Family, ParameterNames
from ilvr_lightning.checkpoints.families.naming import NameTable, names_by_level
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

if TYPE_CHECKING:
    from ilvr_lightning.checkpoints.files import StateDict

HO_ET_AL: dict[str, Any] = {
    "num_head_channels": -1,
    "num_heads": 1,
    "use_scale_shift_norm": False,
    "use_new_attention_order": True,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "patch_size": 1,
}
"""Ho et al.'s network has these settings of UNet; most differ from ADM's, and no shape shows them."""

NAMES = NameTable(
    top_level={
        "encoder.0.block": "conv_in",
        "time_embedding.0": "temb.dense.0",
        "time_embedding.2": "temb.dense.1",
        "middle.0.block": "mid.block_1",
        "middle.0.attention": "mid.attn_1",
        "middle.1.block": "mid.block_2",
        "norm": "norm_out",
        "out": "conv_out",
    },
    down_block="down.{level}.block.{j}",
    down_attention="down.{level}.attn.{j}",
    downsample="down.{level}.downsample",
    up_block="up.{level}.block.{j}",
    up_attention="up.{level}.attn.{j}",
    upsample="up.{level}.upsample",
    block={"embedding": "temb_proj", "skip": "nin_shortcut"},
    attention={"norm": ("norm",), "qkv": ("q", "k", "v"), "out": ("proj_out",)},
)


def recognises(state: "StateDict") -> bool:
    """Whether a state dict is of this family."""
    return "down.0.block.0.norm1.weight" in state.tensors and "temb.dense.0.weight" in state.tensors


def parameter_names(parameters: Iterable[str], config: UNetConfig, in_file: Collection[str] = ()) -> ParameterNames:
    """The family's names of UNet's parameters."""
    return names_by_level(parameters, config, NAMES)


def describe(state: "StateDict", overrides: Overrides) -> ModelDescription:
    """The architecture from names and shapes.

    Raises:
        UserError: it makes no network of this kind.
    """
    shapes = state.shapes
    places = {(int(m[1]), int(m[2])) for n in shapes if (m := re.match(r"down\.(\d+)\.block\.(\d+)\.norm1\.weight", n))}
    levels, blocks = (len(set(values)) for values in zip(*places, strict=True))
    if places != {(level, j) for level in range(levels) for j in range(blocks)}:
        raise UserError("a DDIM state dict whose levels have different numbers of blocks; it is another network")
    channels = shapes["temb.dense.0.weight"][1]
    mult = multipliers([shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)], channels)
    attention = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in shapes]
    size = overrides.image_size(mult, attention)
    image_channels, out_channels = shapes["conv_in.weight"][1], shapes["conv_out.weight"][0]
    model = model_config(
        channels=channels,
        channel_mult=mult,
        num_res_blocks=blocks,
        attention_resolutions=tuple(size // 2**level for level in attention),
        learn_sigma=out_channels == 2 * image_channels,
        **HO_ET_AL,
    )
    return ModelDescription(
        kind="DDIM state dict (Ho et al. 2020)",
        model=model,
        image_shape=(image_channels, size, size),
        diffusion=overrides.diffusion(),
        assumed=tuple(overrides.assumed),
    )


FAMILY = Family(
    name="ddim",
    loads="a state dict of the DDIM repository (CelebA-HQ, LSUN)",
    recognises=recognises,
    describe=describe,
    parameter_names=parameter_names,
    overridable={"image_size": int, "noise_schedule": str, "diffusion_steps": int},
)
