"""Names by level and position, as the descendants of Ho et al.'s code have them (the DDIM repository, diffusers)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ilvr_lightning.checkpoints.families.family import ParameterNames
from ilvr_lightning.models.config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """One family's names; {level} counts from the image, {up} from the middle, {j} within a level."""

    top_level: dict[str, str]
    """Modules that belong to no level, by UNet's name."""
    down_block: str
    down_attention: str
    downsample: str
    up_block: str
    up_attention: str
    upsample: str
    block: dict[str, str]
    """Parts of a residual block, by UNet's name."""
    attention: dict[str, tuple[str, ...]]
    """Parts of an attention, by UNet's name; three names where UNet stacks them."""


def names_by_level(parameters: Iterable[str], config: UNetConfig, table: NameTable) -> ParameterNames:
    """The family's names of UNet's parameters."""
    return {name: _names_of(name, config, table) for name in parameters}


def _names_of(name: str, config: UNetConfig, table: NameTable) -> tuple[str, ...]:
    module, parameter = name.rsplit(".", 1)
    if module in table.top_level:
        return (f"{table.top_level[module]}.{parameter}",)
    match = re.fullmatch(r"(encoder|middle|decoder)\.(\d+)\.(block|attention|resampler)\.(\w+)", module)
    assert match, f"the family has no name for {name}"
    side, index, kind, part = match[1], int(match[2]), match[3], match[4]
    if side == "middle":
        path = table.top_level[f"middle.{index}.{kind}"]
    else:
        path = _module_path(side, index, kind, config, table)
    if kind == "attention":
        return tuple(f"{path}.{word}.{parameter}" for word in table.attention[part])
    return (f"{path}.{table.block.get(part, part)}.{parameter}",)


def _module_path(side: str, index: int, kind: str, config: UNetConfig, table: NameTable) -> str:
    """The family's name of the module of one stage of UNet's encoder or decoder."""
    blocks = config.num_res_blocks
    levels = len(config.channel_mult)
    if side == "encoder":
        level, j = divmod(index - 1, blocks + 1)  # a level's blocks, then its downsampling
        pattern = table.down_attention if kind == "attention" else table.down_block
        if j == blocks:
            pattern = table.downsample
    else:
        up, j = divmod(index, blocks + 1)
        level = levels - 1 - up
        pattern = {"block": table.up_block, "attention": table.up_attention, "resampler": table.upsample}[kind]
    return pattern.format(level=level, up=levels - 1 - level, j=j)
