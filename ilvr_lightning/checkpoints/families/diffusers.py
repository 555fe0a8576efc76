"""Folders of diffusers: UNet2DModel as google/ddpm-* have it, and its scheduler."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, model_config, multipliers
from ilvr_lightning.checkpoints.families.diffusers_scheduler import CLIPPING, diffusion_of, read_scheduler
from ilvr_lightning.checkpoints.families.naming import NameTable, names_by_level
from ilvr_lightning.checkpoints.files import Shape, read_json
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

WEIGHTS = "diffusion_pytorch_model"


WEIGHT_FILES = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.*.safetensors", f"{WEIGHTS}.*.bin")
"""The last two are variants, as fp16."""


OVERRIDABLE = {"image_size": int, "noise_schedule": str, "diffusion_steps": int}


NAMES = NameTable(
    whole={
        "encoder.0.block": "conv_in",
        "time_embedding.0": "time_embedding.linear_1",
        "time_embedding.2": "time_embedding.linear_2",
        "middle.0.block": "mid_block.resnets.0",
        "middle.0.attention": "mid_block.attentions.0",
        "middle.1.block": "mid_block.resnets.1",
        "norm": "conv_norm_out",
        "out": "conv_out",
    },
    down_block="down_blocks.{level}.resnets.{j}",
    down_attention="down_blocks.{level}.attentions.{j}",
    downsample="down_blocks.{level}.downsamplers.0",
    up_block="up_blocks.{up}.resnets.{j}",
    up_attention="up_blocks.{up}.attentions.{j}",
    upsample="up_blocks.{up}.upsamplers.0",
    block={"embedding": "time_emb_proj", "skip": "conv_shortcut"},
    attention={"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)},
)


OLD_NAMES = replace(NAMES, attention={"norm": ("group_norm",), "qkv": ("query", "key", "value"), "out": ("proj_attn",)})
"""Of files that were written before attention was renamed, as google/ddpm-* were."""


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
"""Settings of UNet2DModel that our network has one value of."""


PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}


ATTENTION = {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D"}


RESIDUAL = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}


def recognises(shapes: Mapping[str, Shape]) -> bool:
    """Whether a state dict is of this family."""
    return "down_blocks.0.resnets.0.norm1.weight" in shapes and "time_embedding.linear_1.weight" in shapes


def names(ours: Iterable[str], config: UNetConfig, words: NameTable = NAMES) -> dict[str, tuple[str, ...]]:
    """diffusers' names of each of our parameters."""
    return names_by_level(ours, config, words)


def words_of(shapes: Mapping[str, Shape]) -> NameTable:
    """The spelling that a file has."""
    return OLD_NAMES if any(name.endswith(".query.weight") for name in shapes) else NAMES


def network_folder(folder: Path) -> Path | None:
    """The folder with the network's config.json: this one, or unet/ in it."""
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def weights_file(folder: Path) -> Path:
    """The weights in a network's folder; a variant where there is nothing else.

    Raises:
        UserError: there are none, or they are split up.
    """
    if split := next(folder.glob(f"{WEIGHTS}*.index.json"), None):
        raise UserError(f"{folder}: its weights are split into several files ({split.name}); save them as one")
    for pattern in WEIGHT_FILES:
        if file := next(iter(sorted(folder.glob(pattern))), None):
            return file
    raise UserError(f"{folder} holds no weights: {' or '.join(WEIGHT_FILES[:2])} is missing")


def describe(folder: Path, overrides: dict[str, Any] | None) -> ModelDescription:
    """The architecture and the scheduler, from a folder's JSON files.

    Args:
        folder: with the network's config.json.
        overrides: for what is missing.

    Raises:
        UserError: the folder holds another kind of model, or settings that our network has not.
    """
    config = read_json(folder / "config.json")
    kind = "diffusers folder"
    if (name := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise UserError(f"{folder} holds a {name}; of diffusers' models an unconditional UNet2DModel loads")
    o = Overrides(overrides, OVERRIDABLE, kind)
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{folder}: a UNet2DModel with {key}={config[key]} is another network; {allowed[0]} loads")
    size = o.given.get("image_size", config.get("sample_size"))
    if size is None:
        size = o.take("image_size", 32, "a guess: the folder does not tell")
    try:
        height, width = map(int, size if isinstance(size, list | tuple) else (size, size))
        image_channels = _whole(config, "in_channels", 3)
        model = _model(config, height)
        model = replace(model, learn_sigma=int(config.get("out_channels", 3)) == 2 * image_channels)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} holds no readable UNet2DModel ({error!r:.100})") from None
    scheduler = read_scheduler(folder)
    if scheduler is None:
        diffusion, clip = o.diffusion(), True
    else:
        if given := {"noise_schedule", "diffusion_steps"} & o.given.keys():
            raise UserError(f"overrides: {', '.join(sorted(given))} is in the folder's scheduler; leave it out")
        diffusion = diffusion_of(scheduler, folder)
        clip = bool(scheduler.get("clip_sample", scheduler.get("_class_name") in CLIPPING))
        if scheduler.get("thresholding"):
            o.assumed.append("clip=True (its dynamic thresholding is not done here)")
        if clip and scheduler.get("clip_sample_range", 1.0) != 1.0:
            o.assumed.append(f"clip to 1 (it clips to {scheduler['clip_sample_range']})")
    return ModelDescription(
        kind=kind,
        model=model,
        image_shape=(image_channels, height, width),
        diffusion=diffusion,
        clip=clip,
        assumed=tuple(o.assumed),
    )


def _model(config: dict[str, Any], height: int) -> UNetConfig:
    """UNet2DModel's settings as ours; what its config leaves out has its defaults."""
    downs = config.get("down_block_types", (PLAIN["down"], *[ATTENTION["down"]] * 3))
    ups = config.get("up_block_types", (*[ATTENTION["up"]] * 3, PLAIN["up"]))
    widths = config.get("block_out_channels", (224, 448, 672, 896))
    attention = _attention_levels(downs, ups)
    for width in widths:
        _whole({"block_out_channels": width}, "block_out_channels", 0)
    mult = multipliers(list(widths), widths[0])
    head_dim = None if config.get("attention_head_dim", 8) is None else _whole(config, "attention_head_dim", 8)
    scale_shift = config.get("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
        raise UserError(f"a UNet2DModel with resnet_time_scale_shift={scale_shift}; default and scale_shift load")
    groups = _whole(config, "norm_num_groups", 32)
    if scale_shift == "scale_shift" and config.get("attn_norm_num_groups") != groups:
        raise UserError("a UNet2DModel whose middle attention is not normalised (attn_norm_num_groups); it must be")
    return model_config(
        channels=widths[0],
        channel_mult=mult,
        num_res_blocks=_whole(config, "layers_per_block", 2),
        attention_resolutions=tuple(height // 2**level for level in attention),
        num_head_channels=-1 if head_dim is None else head_dim,
        num_heads=1,
        resblock_updown=_residual(config, downs, ups),
        use_scale_shift_norm=scale_shift == "scale_shift",
        use_new_attention_order=True,
        dropout=config.get("dropout", 0.0),
        downsample_padding=config.get("downsample_padding", 1),
        flip_sin_to_cos=config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        norm_num_groups=groups,
        norm_eps=config.get("norm_eps", 1e-5),
    )


def _whole(config: dict[str, Any], key: str, default: int) -> int:
    """A setting that must be a whole number within reason."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65536:
        raise UserError(f"a UNet2DModel with {key}={value!r:.40}; it must be a whole number above 0")
    return value


def _attention_levels(downs: Iterable[str], ups: Iterable[str]) -> list[int]:
    downs, ups = list(downs), list(ups)
    for side, kinds in (("down", downs), ("up", ups)):
        for kind in kinds:
            if kind not in (PLAIN[side], ATTENTION[side], RESIDUAL[side]):
                raise UserError(
                    f"a UNet2DModel with a {kind}; {PLAIN[side]}, {ATTENTION[side]} and {RESIDUAL[side]} load"
                )
    attention = [level for level, kind in enumerate(downs) if kind == ATTENTION["down"]]
    if attention != sorted(len(ups) - 1 - i for i, kind in enumerate(ups) if kind == ATTENTION["up"]):
        raise UserError(f"a UNet2DModel with attention at other levels down {downs} than up {ups}; they must match")
    return attention


def _residual(config: dict[str, Any], downs: Iterable[str], ups: Iterable[str]) -> bool:
    """Whether sizes change in residual blocks; all levels that change the size must say the same."""
    kinds = {
        (config.get("downsample_type", "conv") == "resnet") if kind == ATTENTION["down"] else kind == RESIDUAL["down"]
        for kind in list(downs)[:-1]
    } | {
        (config.get("upsample_type", "conv") == "resnet") if kind == ATTENTION["up"] else kind == RESIDUAL["up"]
        for kind in list(ups)[:-1]
    }
    if len(kinds) > 1:
        raise UserError("a UNet2DModel that resamples by convolutions in some levels and residual blocks in others")
    return kinds == {True}


def refusal(description: ModelDescription) -> str | None:
    """Why UNet2DModel could not run a network, or None."""
    model = description.model
    for name in ("patch_size", "timestep_scale"):
        if getattr(model, name) != 1:
            return f"UNet2DModel has no model.{name}={getattr(model, name)}"
    if len(_head_dims(description)) > 1:
        return "UNet2DModel has one width of attention heads for all levels, and here they differ"
    if any(model.channels * mult % model.norm_num_groups for mult in model.channel_mult):
        return f"UNet2DModel needs widths that model.norm_num_groups={model.norm_num_groups} divides"
    return None


def _head_dims(description: ModelDescription) -> set[int]:
    """Channels a head at the levels that have attention, the middle among them."""
    model = description.model
    heights = [description.image_shape[1] // 2**level for level in range(len(model.channel_mult))]
    widths = {
        model.channels * m for m, h in zip(model.channel_mult, heights, strict=True) if h in model.attention_resolutions
    }
    widths.add(model.channels * model.channel_mult[-1])
    return {width // model.heads(width) for width in widths}


def unet_config(description: ModelDescription) -> dict[str, Any]:
    """config.json of a UNet2DModel that is this network."""
    model = description.model
    channels, height, width = description.image_shape
    has_attention = [height // 2**level in model.attention_resolutions for level in range(len(model.channel_mult))]
    plain = RESIDUAL if model.resblock_updown else PLAIN
    downs = [ATTENTION["down"] if a else plain["down"] for a in has_attention]
    ups = [ATTENTION["up"] if a else plain["up"] for a in reversed(has_attention)]
    kind = "resnet" if model.resblock_updown else "conv"
    head_dims = _head_dims(description)
    one_head = model.num_head_channels == -1 and model.num_heads == 1
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * (2 if model.learn_sigma else 1),
        "block_out_channels": [model.channels * mult for mult in model.channel_mult],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": downs,
        "up_block_types": ups,
        "downsample_type": kind,
        "upsample_type": kind,
        "downsample_padding": model.downsample_padding,
        "attention_head_dim": None if one_head else head_dims.pop(),
        "norm_num_groups": model.norm_num_groups,
        "attn_norm_num_groups": model.norm_num_groups,
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "flip_sin_to_cos": model.flip_sin_to_cos,
        "freq_shift": model.freq_shift,
        "dropout": model.dropout,
        "act_fn": "silu",
    }
