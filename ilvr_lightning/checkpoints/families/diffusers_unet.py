"""config.json of diffusers' UNet2DModel: read as a UNetConfig, and written from one."""

from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, attention_widths, multipliers
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
"""UNet2DModel has these settings, with these defaults, apart from sample_size, which has none."""

PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}
"""Levels without attention that change the size by convolutions are of these types."""

ATTENTION = {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D"}
"""Levels with attention are of these types; downsample_type and upsample_type say how they change the size."""

RESIDUAL = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
"""Levels without attention that change the size in residual blocks are of these types."""


def read_config(config: dict[str, Any], overrides: Overrides) -> tuple[UNetConfig, tuple[int, int, int]]:
    """The architecture and the image shape (C, H, W).

    A setting that UNet cannot have is found by writing the config of what was read, and comparing.

    Args:
        config: the content of config.json; what it leaves out has UNet2DModel's default.
        overrides: may give the image size.

    Raises:
        UserError: it is no network that UNet can be.
        ArithmeticError, LookupError, TypeError, ValueError: its values are of other types, or make no network.
    """
    settings = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    size = overrides.given.get("image_size", config.get("sample_size"))
    if size is None:
        size = overrides.get("image_size", 32, "a guess, since the folder does not contain it")
    height, width = map(int, size if isinstance(size, list | tuple) else (size, size))
    given = _effects(settings)
    model, image_shape = _model(settings, given, height), (int(settings["in_channels"]), height, width)
    written = DEFAULTS | config_of(model, image_shape)
    expected = _effects(written)
    head_dim, narrowest = settings["attention_head_dim"], min(attention_widths(model, height))
    if head_dim is not None and not 1 <= head_dim <= narrowest:
        raise UserError(f"a UNet2DModel with attention_head_dim={head_dim!s:.40} for {narrowest} channels is broken")
    for key, value in given.items():
        if value != expected[key]:
            raise UserError(
                f"a UNet2DModel with {key}={settings[key]!s:.100} cannot be loaded; only {written[key]} can"
            )
    return model, image_shape


def _model(settings: dict[str, Any], effects: dict[str, Any], height: int) -> UNetConfig:
    """The architecture that is nearest to the settings of a UNet2DModel."""
    widths, downs, ups = (effects[key] for key in ("block_out_channels", "down_block_types", "up_block_types"))
    head_dim = settings["attention_head_dim"]
    return UNetConfig(
        channels=widths[0],
        channel_mult=multipliers(widths, widths[0]),
        num_res_blocks=settings["layers_per_block"],
        attention_resolutions=tuple(height // 2**i for i, (attention, _) in enumerate(downs) if attention),
        num_head_channels=-1 if head_dim is None else head_dim,
        num_heads=1,
        resblock_updown=any(resampling == "resnet" for _, resampling in (*downs, *ups)),
        use_scale_shift_norm=settings["resnet_time_scale_shift"] == "scale_shift",
        use_new_attention_order=True,
        dropout=settings["dropout"],
        learn_sigma=settings["out_channels"] == 2 * settings["in_channels"],
        downsample_padding=settings["downsample_padding"],
        flip_sin_to_cos=settings["flip_sin_to_cos"],
        freq_shift=settings["freq_shift"],
        norm_num_groups=settings["norm_num_groups"],
        norm_eps=settings["norm_eps"],
    )


def _effects(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in a form that is equal where UNet2DModel does the same; attention_head_dim is not compared."""
    effects = dict(settings)
    for side in ("down", "up"):
        by_type = effects.pop(f"{side}sample_type")
        meanings = {PLAIN[side]: (False, "conv"), RESIDUAL[side]: (False, "resnet"), ATTENTION[side]: (True, by_type)}
        levels = [meanings.get(kind, (kind, "conv")) for kind in settings[f"{side}_block_types"]]
        effects[f"{side}_block_types"] = [*levels[:-1], (levels[-1][0], None)]  # the last does not change the size
    effects["act_fn"] = {"swish": "silu"}.get(settings["act_fn"], settings["act_fn"])
    if settings["attn_norm_num_groups"] is None and settings["resnet_time_scale_shift"] != "scale_shift":
        effects["attn_norm_num_groups"] = settings["norm_num_groups"]
    del effects["attention_head_dim"]
    return effects


def refuse_export(description: ModelDescription) -> None:
    """Raise a UserError for a network that UNet2DModel cannot be."""
    model = description.model
    if model.timestep_scale != 1:
        raise UserError(f"UNet2DModel has no model.timestep_scale={model.timestep_scale}")
    if model.channel_mult[0] != 1:  # it embeds the timestep in as many channels as its first level has
        raise UserError(f"in UNet2DModel model.channel_mult must begin with 1: it is {list(model.channel_mult)}")
    if any(model.channels * mult % model.norm_num_groups for mult in model.channel_mult):
        raise UserError(f"UNet2DModel needs widths that model.norm_num_groups={model.norm_num_groups} divides")
    if len(_head_dims(model, description.image_shape[1])) > 1:
        raise UserError("UNet2DModel has attention heads of one width at all levels, and here the widths differ")


def _head_dims(model: UNetConfig, height: int) -> set[int | None]:
    """The channels per attention head; None where every attention has a single head, however wide."""
    heads = {width: model.heads(width) for width in attention_widths(model, height)}
    return {None} if set(heads.values()) == {1} else {width // count for width, count in heads.items()}


def config_of(model: UNetConfig, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """config.json of a UNet2DModel that is this network (see refuse_export)."""
    channels, height, width = image_shape
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
        "attention_head_dim": _head_dims(model, height).pop(),
        "norm_num_groups": model.norm_num_groups,
        "attn_norm_num_groups": model.norm_num_groups,
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "flip_sin_to_cos": model.flip_sin_to_cos,
        "freq_shift": model.freq_shift,
        "dropout": model.dropout,
        "act_fn": "silu",
    }
