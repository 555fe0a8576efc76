"""The names of parameters in a file: UNet's names after replacements, for some families by level and position."""

import re
from collections.abc import Mapping

from ilvr_lightning.models.config import UNetConfig


def replaced(name: str, replacements: Mapping[str, str]) -> str:
    """A name after regular expressions were replaced in it, one after another."""
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name


def by_level(name: str, config: UNetConfig, *, up_from_image: bool) -> str:
    """UNet's name with the level and the position in it for the number of the stage: down.LEVEL.KIND.POSITION.

    Args:
        name: UNet's name of a parameter; those that belong to no level stay as they are.
        config: the architecture.
        up_from_image: count the decoder's levels from the image, like the encoder's, not from the middle.
    """
    match = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(\w+)\.(.+)", name)
    if match is None or name.startswith("encoder.0."):
        return name
    side, stage, kind, rest = match[1], int(match[2]), match[3], match[4]
    blocks = config.num_res_blocks
    if side == "encoder":
        level, position = divmod(stage - 1, blocks + 1)  # a level's blocks, then its downsampling
        return f"down.{level}.{'resampler' if position == blocks else kind}.{position}.{rest}"
    level, position = divmod(stage, blocks + 1)
    if up_from_image:
        level = len(config.channel_mult) - 1 - level
    return f"up.{level}.{kind}.{position}.{rest}"


def split_qkv(name: str, parts: tuple[str, str, str]) -> tuple[str, ...]:
    """A file's names of one parameter: three where UNet stacks queries, keys and values."""
    return tuple(name.replace(".qkv.", f".{part}.") for part in parts) if ".qkv." in name else (name,)
