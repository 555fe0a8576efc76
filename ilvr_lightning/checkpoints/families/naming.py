"""Names by level and position, as Ho et al.'s descendants (the DDIM authors, diffusers) have them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ilvr_lightning.models.config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """One family's words; {level} counts from the image, {up} from the middle, {j} within a level."""

    whole: dict[str, str]
    """Modules that stand alone."""
    down_block: str
    down_attention: str
    downsample: str
    up_block: str
    up_attention: str
    upsample: str
    block: dict[str, str]
    """Parts of a residual block."""
    attention: dict[str, tuple[str, ...]]
    """Parts of an attention; three names where ours are stacked."""


def names_by_level(ours: Iterable[str], config: UNetConfig, words: NameTable) -> dict[str, tuple[str, ...]]:
    """The family's names of each of our parameters."""
    return {name: _prefix_errors(name, config, words) for name in ours}


def _prefix_errors(name: str, config: UNetConfig, words: NameTable) -> tuple[str, ...]:
    module, parameter = name.rsplit(".", 1)
    if module in words.whole:
        return (f"{words.whole[module]}.{parameter}",)
    match = re.fullmatch(r"(encoder|middle|decoder)\.(\d+)\.(block|attention|resampler)\.(\w+)", module)
    assert match, f"a parameter without a place: {name}"
    side, index, kind, part = match[1], int(match[2]), match[3], match[4]
    if side == "middle":
        home = words.whole[f"middle.{index}.{kind}"]
    else:
        home = _module_path(side, index, kind, config, words)
    if kind == "attention":
        return tuple(f"{home}.{word}.{parameter}" for word in words.attention[part])
    return (f"{home}.{words.block.get(part, part)}.{parameter}",)


def _module_path(side: str, index: int, kind: str, config: UNetConfig, words: NameTable) -> str:
    """Where a stage's module lives in the family."""
    blocks = config.num_res_blocks
    levels = len(config.channel_mult)
    if side == "encoder":
        level, j = divmod(index - 1, blocks + 1)  # a level's blocks, then its downsampling
        pattern = words.down_attention if kind == "attention" else words.down_block
        if j == blocks:
            pattern = words.downsample
    else:
        up, j = divmod(index, blocks + 1)
        level = levels - 1 - up
        pattern = {"block": words.up_block, "attention": words.up_attention, "resampler": words.upsample}[kind]
    return pattern.format(level=level, up=levels - 1 - level, j=j)
