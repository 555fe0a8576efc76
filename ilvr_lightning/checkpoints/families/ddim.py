"""State dicts of the DDIM repository: Ho et al.'s network in PyTorch (CelebA-HQ and LSUN files, SDEdit, DDRM)."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, multipliers
from ilvr_lightning.checkpoints.families.family import Family, ParameterNames, StateDict
from ilvr_lightning.checkpoints.families.naming import by_level, replaced, split_qkv
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

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
}
"""Ho et al.'s network has these settings of UNet; most differ from ADM's, and no shape shows them."""

RENAMED = {
    r"^encoder\.0\.block\.": "conv_in.",
    r"^time_embedding\.0\.": "temb.dense.0.",
    r"^time_embedding\.2\.": "temb.dense.1.",
    r"^middle\.0\.block\.": "mid.block_1.",
    r"^middle\.0\.attention\.": "mid.attn_1.",
    r"^middle\.1\.block\.": "mid.block_2.",
    r"^norm\.": "norm_out.",
    r"^out\.": "conv_out.",
    r"^(down|up)\.(\d+)\.resampler\.\d+\.": r"\1.\2.\1sample.",
    r"\.attention\.": ".attn.",
    r"\.embedding\.": ".temb_proj.",
    r"\.skip\.": ".nin_shortcut.",
    r"\.out\.": ".proj_out.",
}
"""UNet's names by level become the family's by these replacements."""


class DDIM(Family):
    """State dicts of the DDIM repository."""

    name = "ddim"
    loads = "a state dict of the DDIM repository (CelebA-HQ, LSUN)"
    overridable: Mapping[str, type] = {"image_size": int, "noise_schedule": str, "diffusion_steps": int}

    def recognises(self, state: StateDict) -> bool:
        return {"down.0.block.0.norm1.weight", "temb.dense.0.weight"} <= state.tensors.keys()

    def names(self, parameters: Iterable[str], config: UNetConfig, in_file: Collection[str] = ()) -> ParameterNames:
        renamed = {name: replaced(by_level(name, config, up_from_image=True), RENAMED) for name in parameters}
        return {name: split_qkv(in_ddim, ("q", "k", "v")) for name, in_ddim in renamed.items()}

    def describe(self, state: StateDict, overrides: Overrides) -> ModelDescription:
        """The architecture from names and shapes."""
        shapes = state.shapes
        found = (re.match(r"down\.(\d+)\.block\.(\d+)\.norm1\.weight", name) for name in shapes)
        places = {(int(match[1]), int(match[2])) for match in found if match}
        levels, blocks = (len(set(values)) for values in zip(*places, strict=True))
        if places != {(level, j) for level in range(levels) for j in range(blocks)}:
            raise UserError("a DDIM state dict whose levels have different numbers of blocks; it is another network")
        channels = shapes["temb.dense.0.weight"][1]
        mult = multipliers([shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)], channels)
        attention = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in shapes]
        size = overrides.image_size(mult, attention)
        image_channels, out_channels = shapes["conv_in.weight"][1], shapes["conv_out.weight"][0]
        model = UNetConfig(
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


FAMILY = DDIM()
