"""State dicts of ADM and its kin: guided-diffusion, improved-diffusion, ilvr_adm, P2-weighting."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, model_config, multipliers
from ilvr_lightning.checkpoints.files import Shape
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

OVERRIDABLE = {
    "image_size": int,
    "num_heads": int,
    "num_head_channels": int,
    "use_new_attention_order": bool,
    "noise_schedule": str,
    "diffusion_steps": int,
    "predict_xstart": bool,
    "rescale_timesteps": bool,
}
"""ADM's flags that neither names nor shapes tell."""


RENAMED = {
    r"^time_embedding\.": "time_embed.",
    r"^middle\.0\.block\.": "middle_block.0.",
    r"^middle\.0\.attention\.": "middle_block.1.",
    r"^middle\.1\.block\.": "middle_block.2.",
    r"^out\.": "out.2.",
    r"^norm\.": "out.0.",
    r"^encoder\.(\d+)\.block\.conv\.": r"input_blocks.\1.0.op.",
    r"^encoder\.(\d+)\.block\.": r"input_blocks.\1.0.",
    r"^encoder\.(\d+)\.attention\.": r"input_blocks.\1.1.",
    r"^decoder\.(\d+)\.block\.": r"output_blocks.\1.0.",
    r"^decoder\.(\d+)\.attention\.": r"output_blocks.\1.1.",
    r"\.norm1\.": ".in_layers.0.",
    r"\.conv1\.": ".in_layers.2.",
    r"\.embedding\.": ".emb_layers.1.",
    r"\.norm2\.": ".out_layers.0.",
    r"\.conv2\.": ".out_layers.3.",
    r"\.skip\.": ".skip_connection.",
    r"^((?:input_blocks|output_blocks|middle_block)\..*)\.out\.": r"\1.proj_out.",
}
"""Our names to ADM's, applied in this order."""


def recognises(shapes: Mapping[str, Shape]) -> bool:
    """Whether a state dict is of this family."""
    return "input_blocks.0.0.weight" in shapes and "time_embed.0.weight" in shapes


def names(ours: Iterable[str], config: UNetConfig) -> dict[str, tuple[str, ...]]:
    """ADM's name of each of our parameters."""
    known = set(ours)
    renamed: dict[str, tuple[str, ...]] = {}
    for name in known:
        theirs = name
        for pattern, replacement in RENAMED.items():
            theirs = re.sub(pattern, replacement, theirs)
        if match := re.match(r"decoder\.(\d+)\.resampler\.", theirs):
            place = 2 if f"decoder.{match[1]}.attention.norm.weight" in known else 1
            theirs = f"output_blocks.{match[1]}.{place}.{theirs[match.end() :]}"
        renamed[name] = (theirs,)
    return renamed


def describe(shapes: Mapping[str, Shape], overrides: dict[str, Any] | None) -> ModelDescription:
    """The architecture, off names and shapes; the rest from overrides or the published defaults.

    Raises:
        UserError: it is a conditional network, no denoiser, or makes no network of this kind.
    """
    _refuse_conditional(shapes)
    levels, blocks = _levels_and_blocks(shapes)
    updown = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", n) for n in shapes)
    author = "ADM" if updown else "improved-diffusion"
    o = Overrides(overrides, OVERRIDABLE, f"an {author} state dict")

    channels = shapes["time_embed.0.weight"][1]
    first = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
    mult = multipliers(widths, channels)
    attention = [level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes]
    size = o.image_size(mult, attention)
    num_head_channels, num_heads = _heads(o, updown)
    new_order = o.take("use_new_attention_order", False, "the published default")
    prediction = "x0" if o.take("predict_xstart", False, "the published default") else "eps"
    diffusion = o.diffusion(prediction=prediction)
    rescaled = diffusion.T != 1000 and o.take("rescale_timesteps", not updown, f"the default of {author}")
    image_channels, out_channels = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    model = model_config(
        channels=channels,
        channel_mult=mult,
        num_res_blocks=blocks,
        attention_resolutions=tuple(size // 2**level for level in attention),
        num_head_channels=num_head_channels,
        num_heads=num_heads,
        resblock_updown=updown,
        use_scale_shift_norm=shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        use_new_attention_order=new_order,
        learn_sigma=out_channels == 2 * image_channels,
        timestep_scale=1000 / diffusion.T if rescaled else 1.0,
    )
    return ModelDescription(
        kind=f"{author} state dict",
        model=model,
        image_shape=(image_channels, size, size),
        diffusion=diffusion,
        assumed=tuple(o.assumed),
    )


def _levels_and_blocks(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """How many levels, and residual blocks a level on the way down."""
    outputs = {int(m[1]) for n in shapes if (m := re.match(r"output_blocks\.(\d+)\.", n))}
    # The last block of each level but the finest ends in an upsampling: a convolution, or a residual block.
    upsampling = r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.0)\.weight"
    levels = 1 + len({m[1] for n in shapes if (m := re.match(upsampling, n))})
    blocks, remainder = divmod(len(outputs), levels)
    if remainder or blocks < 2 or outputs != set(range(len(outputs))):
        raise UserError(
            f"an ADM state dict whose {len(outputs)} output blocks do not make {levels} levels; "
            "it is damaged, or another network"
        )
    return levels, blocks - 1


def _heads(o: Overrides, updown: bool) -> tuple[int, int]:
    """num_head_channels and num_heads; the first wins unless it is -1, and whoever gives the second alone means it."""
    if "num_heads" in o.given:
        channels = o.given.get("num_head_channels", -1)
    elif updown or "num_head_channels" in o.given:
        channels = o.take("num_head_channels", 64, "the published default")
    else:
        channels = -1
    return channels, o.take("num_heads", 4, "the published default") if channels == -1 else o.given.get("num_heads", 4)


def _refuse_conditional(shapes: Mapping[str, Shape]) -> None:
    if "label_emb.weight" in shapes:
        raise UserError("an ADM state dict of a class-conditional network; ILVR needs an unconditional one")
    if any("transformer_blocks" in name for name in shapes):
        raise UserError(
            "a state dict of a latent or text-conditional network; ILVR needs an unconditional one on pixels"
        )
    if not any(name.startswith("output_blocks.") for name in shapes) or "out.2.weight" not in shapes:
        raise UserError("a state dict of an ADM classifier or encoder; ILVR needs the diffusion network")
    inputs, outputs = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    if outputs not in (inputs, 2 * inputs):
        raise UserError(
            f"an ADM state dict with {inputs} input and {outputs} output channels, as for super-resolution; "
            "ILVR needs an unconditional network"
        )


def refusal(description: ModelDescription) -> str | None:
    """Why ADM's code could not run a network, or None."""
    model, default, diffusion = description.model, UNetConfig(), description.diffusion
    for name in ("patch_size", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_num_groups", "norm_eps"):
        if getattr(model, name) != getattr(default, name):
            return f"ADM's network has no model.{name}={getattr(model, name)}"
    if model.timestep_scale not in (1.0, 1000 / diffusion.T):
        return f"ADM's code knows no model.timestep_scale={model.timestep_scale}"
    if any(model.channels * mult % 32 for mult in model.channel_mult):
        return "ADM's network needs widths that 32 divides"
    if any(model.channels * m % model.num_head_channels for m in model.channel_mult if model.num_head_channels != -1):
        return f"ADM's network needs widths that model.num_head_channels={model.num_head_channels} divides"
    if description.image_shape[1] != description.image_shape[2]:
        return "ADM's images are square"
    if diffusion.prediction == "v":
        return "ADM's code knows no diffusion.prediction=v"
    if diffusion.betas is not None:
        return "ADM's code knows no explicit betas"
    return None


def needed_overrides(description: ModelDescription, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What must be said beside a state dict of ADM so that it is read as this network."""
    model, diffusion = description.model, description.diffusion
    whole = {
        "image_size": description.image_shape[1],
        "num_head_channels": model.num_head_channels,
        "num_heads": model.num_heads,
        "use_new_attention_order": model.use_new_attention_order,
        "noise_schedule": diffusion.schedule,
        "diffusion_steps": diffusion.T,
        "predict_xstart": diffusion.prediction == "x0",
        "rescale_timesteps": model.timestep_scale != 1,
    }
    if model.num_head_channels != -1:
        del whole["num_heads"]
    if diffusion.T == 1000:
        del whole["rescale_timesteps"]
    for name in list(whole):
        without = {key: value for key, value in whole.items() if key != name}
        if _same(describe(shapes, without), description):
            whole = without
    return whole


def _same(a: ModelDescription, b: ModelDescription) -> bool:
    """Whether two descriptions are of one network, whatever they say of how they were made."""
    heads = [[d.model.heads(d.model.channels * m) for m in d.model.channel_mult] for d in (a, b)]
    models = [dataclasses.replace(d.model, dropout=0.0, num_heads=1, num_head_channels=-1) for d in (a, b)]
    diffusions = [(d.diffusion.schedule, d.diffusion.T, d.diffusion.prediction) for d in (a, b)]
    return heads[0] == heads[1] and models[0] == models[1] and diffusions[0] == diffusions[1]
