"""config.json of diffusers' UNet2DModel: read as a UNetConfig, and written from one."""

from collections.abc import Sequence
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, model_config, multipliers
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
"""UNet has one behaviour for these settings of UNet2DModel; the first value is UNet2DModel's default."""

PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}
"""Levels without attention that change the size by convolutions are of these types."""

ATTENTION = {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D"}
"""Levels with attention are of these types."""

RESIDUAL = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
"""Levels without attention that change the size in residual blocks are of these types."""

MAX_NUMBER = 65536
"""No setting that counts something is larger than this."""


def read_config(config: dict[str, Any], overrides: Overrides) -> tuple[UNetConfig, tuple[int, int, int]]:
    """The architecture and the image shape (C, H, W); what a config leaves out has UNet2DModel's default.

    Args:
        config: the content of config.json.
        overrides: may give the image size.

    Raises:
        UserError: it is no network that UNet can be.
    """
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"a UNet2DModel with {key}={config[key]!s:.100} does not load; {allowed[0]} does")
    size = overrides.given.get("image_size", config.get("sample_size"))
    if size is None:
        size = overrides.get("image_size", 32, "a guess, since the folder does not contain it")
    try:
        height, width = map(int, size if isinstance(size, list | tuple) else (size, size))
        channels = _count(config, "in_channels", 3)
        learn_sigma = int(config.get("out_channels", 3)) == 2 * channels
        return _model(config, height, learn_sigma), (channels, height, width)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"config.json describes no readable UNet2DModel ({error!r:.100})") from None


def _model(config: dict[str, Any], height: int, learn_sigma: bool) -> UNetConfig:
    downs = config.get("down_block_types", (PLAIN["down"], *[ATTENTION["down"]] * 3))
    ups = config.get("up_block_types", (*[ATTENTION["up"]] * 3, PLAIN["up"]))
    widths = list(config.get("block_out_channels", (224, 448, 672, 896)))
    attention = _attention_levels(list(downs), list(ups))
    for width in widths:
        _count({"block_out_channels": width}, "block_out_channels", 0)
    head_dim = None if config.get("attention_head_dim", 8) is None else _count(config, "attention_head_dim", 8)
    scale_shift = config.get("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
        raise UserError(f"a UNet2DModel with resnet_time_scale_shift={scale_shift} does not load; scale_shift does")
    groups = _count(config, "norm_num_groups", 32)
    if scale_shift == "scale_shift" and config.get("attn_norm_num_groups") != groups:
        raise UserError("a UNet2DModel whose middle attention is not normalised (attn_norm_num_groups) does not load")
    return model_config(
        channels=widths[0],
        channel_mult=multipliers(widths, widths[0]),
        num_res_blocks=_count(config, "layers_per_block", 2),
        attention_resolutions=tuple(height // 2**level for level in attention),
        num_head_channels=-1 if head_dim is None else head_dim,
        num_heads=1,
        resblock_updown=_is_residual(config, list(downs), list(ups)),
        use_scale_shift_norm=scale_shift == "scale_shift",
        use_new_attention_order=True,
        dropout=config.get("dropout", 0.0),
        learn_sigma=learn_sigma,
        downsample_padding=config.get("downsample_padding", 1),
        flip_sin_to_cos=config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        norm_num_groups=groups,
        norm_eps=config.get("norm_eps", 1e-5),
        patch_size=1,
    )


def _count(config: dict[str, Any], key: str, default: int) -> int:
    """A setting that must be a positive integer."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_NUMBER:
        raise UserError(f"a UNet2DModel with {key}={value!r:.40} does not load; it must be a positive integer")
    return value


def _attention_levels(downs: Sequence[str], ups: Sequence[str]) -> list[int]:
    """The levels that have attention, counted from the image; they must be the same down and up."""
    for side, kinds in (("down", downs), ("up", ups)):
        for kind in kinds:
            if kind not in (PLAIN[side], ATTENTION[side], RESIDUAL[side]):
                raise UserError(
                    f"a UNet2DModel with a {kind!s:.100} does not load; {PLAIN[side]}, {ATTENTION[side]} and "
                    f"{RESIDUAL[side]} do"
                )
    attention = [level for level, kind in enumerate(downs) if kind == ATTENTION["down"]]
    if attention != sorted(len(ups) - 1 - i for i, kind in enumerate(ups) if kind == ATTENTION["up"]):
        raise UserError("a UNet2DModel with attention at other levels down than up does not load; they must match")
    return attention


def _is_residual(config: dict[str, Any], downs: Sequence[str], ups: Sequence[str]) -> bool:
    """Whether sizes change in residual blocks; all levels that change the size must do it in the same way."""
    kinds = {
        config.get(f"{side}sample_type", "conv") == "resnet" if kind == ATTENTION[side] else kind == RESIDUAL[side]
        for side, types in (("down", downs), ("up", ups))
        for kind in types[:-1]
    }
    if len(kinds) > 1:
        raise UserError(
            "a UNet2DModel that changes the size by convolutions at some levels and in residual blocks at others does "
            "not load"
        )
    return kinds == {True}


def refusal(description: ModelDescription) -> str | None:
    """The reason why UNet2DModel cannot be a network; None if it can."""
    model = description.model
    for name in ("patch_size", "timestep_scale"):
        if getattr(model, name) != 1:
            return f"UNet2DModel has no model.{name}={getattr(model, name)}"
    if model.channel_mult[0] != 1:
        return (
            "UNet2DModel embeds the timestep in as many channels as its first level has, so model.channel_mult must "
            f"begin with 1: it is {list(model.channel_mult)}"
        )
    if any(model.channels * mult % model.norm_num_groups for mult in model.channel_mult):
        return f"UNet2DModel needs widths that model.norm_num_groups={model.norm_num_groups} divides"
    if len(_head_dims(description)) > 1:
        return "UNet2DModel has attention heads of one width at all levels, and here the widths differ"
    return None


def _head_dims(description: ModelDescription) -> set[int | None]:
    """The channels per attention head; None where every attention has a single head, however wide."""
    heads = {width: description.model.heads(width) for width in description.attention_widths}
    return {None} if set(heads.values()) == {1} else {width // count for width, count in heads.items()}


def config_of(description: ModelDescription) -> dict[str, Any]:
    """config.json of a UNet2DModel that is this network (see refusal)."""
    model = description.model
    channels, height, width = description.image_shape
    has_attention = [height // 2**level in model.attention_resolutions for level in range(len(model.channel_mult))]
    plain = RESIDUAL if model.resblock_updown else PLAIN
    kind = "resnet" if model.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * (2 if model.learn_sigma else 1),
        "block_out_channels": [model.channels * mult for mult in model.channel_mult],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": [ATTENTION["down"] if a else plain["down"] for a in has_attention],
        "up_block_types": [ATTENTION["up"] if a else plain["up"] for a in reversed(has_attention)],
        "downsample_type": kind,
        "upsample_type": kind,
        "downsample_padding": model.downsample_padding,
        "attention_head_dim": _head_dims(description).pop(),
        "norm_num_groups": model.norm_num_groups,
        "attn_norm_num_groups": model.norm_num_groups,
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "flip_sin_to_cos": model.flip_sin_to_cos,
        "freq_shift": model.freq_shift,
        "dropout": model.dropout,
        "act_fn": "silu",
    }
