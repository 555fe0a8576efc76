"""State dicts of ADM and of the code derived from it: guided-diffusion, improved-diffusion, ilvr_adm, P2-weighting."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides, attention_widths, multipliers
from ilvr_lightning.checkpoints.families.family import Family, FileContent, ParameterNames, StateDict, TensorDict
from ilvr_lightning.checkpoints.families.naming import replaced
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

SETTINGS: dict[str, Any] = {
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
"""ADM's network has these settings of UNet, always."""

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
"""UNet's names become ADM's by these replacements, applied in this order."""


def _levels_and_blocks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """The number of levels, and of residual blocks per level on the way down."""
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


def _heads(overrides: Overrides, updown: bool) -> tuple[int, int]:
    """(num_head_channels, num_heads): the first counts unless it is -1, as it is if the second alone is given."""
    given = overrides.given
    if "num_heads" in given:
        channels = given.get("num_head_channels", -1)
    elif updown or "num_head_channels" in given:
        channels = overrides.get("num_head_channels", 64, "the published default")
    else:
        channels = -1
    heads = overrides.get("num_heads", 4, "the published default") if channels == -1 else given.get("num_heads", 4)
    return channels, heads


def _refuse_conditional(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError for the networks of ADM's code that predict no noise, or need more than the noised image."""
    if "out.2.weight" not in shapes or not any(name.startswith("output_blocks.") for name in shapes):
        other = "a classifier or encoder"
    elif "label_emb.weight" in shapes:
        other = "a class-conditional network"
    elif any("transformer_blocks" in name for name in shapes):
        other = "a latent or text-conditional network"
    else:
        inputs, outputs = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
        if outputs in (inputs, 2 * inputs):
            return
        other = f"a network with {inputs} input and {outputs} output channels, as for super-resolution"
    raise UserError(f"an ADM state dict of {other}; ILVR needs an unconditional diffusion network on pixels")


def _refuse_export(description: ModelDescription) -> None:
    """Raise a UserError for a network that ADM's code cannot run."""
    model, diffusion = description.model, description.diffusion
    for name, value in SETTINGS.items():
        if getattr(model, name) != value:
            raise UserError(f"ADM's network has model.{name}={value}, and this one {getattr(model, name)}")
    if model.timestep_scale not in (1.0, 1000 / diffusion.T):
        raise UserError(f"ADM's code has no model.timestep_scale={model.timestep_scale}")
    if any(model.channels * mult % 32 for mult in model.channel_mult):
        raise UserError("ADM's network needs widths that 32 divides")
    widths = attention_widths(model, description.image_shape[1])
    if model.num_head_channels != -1 and any(width % model.num_head_channels for width in widths):
        raise UserError(f"ADM's network needs widths that model.num_head_channels={model.num_head_channels} divides")
    if description.image_shape[1] != description.image_shape[2]:
        raise UserError("ADM's images are square")
    if diffusion.prediction == "v":
        raise UserError("ADM's code has no diffusion.prediction=v")
    if diffusion.betas is not None:
        raise UserError("ADM's code has no explicit betas")


class ADM(Family):
    """State dicts of ADM and of the code derived from it."""

    name = "adm"
    loads = "a state dict of ADM (guided-diffusion), improved-diffusion, ilvr_adm or P2-weighting"
    overridable: Mapping[str, type] = {
        "image_size": int,
        "num_heads": int,
        "num_head_channels": int,
        "use_new_attention_order": bool,
        "noise_schedule": str,
        "diffusion_steps": int,
        "predict_xstart": bool,
        "rescale_timesteps": bool,
    }
    export_name = "adm"
    writes = "a file for guided-diffusion and ilvr_adm (no v-prediction)"

    def recognises(self, state: StateDict) -> bool:
        return {"input_blocks.0.0.weight", "time_embed.0.weight"} <= state.tensors.keys()

    def names(self, parameters: Iterable[str], config: UNetConfig, in_file: Collection[str] = ()) -> ParameterNames:
        known = set(parameters)
        renamed: ParameterNames = {}
        for name in known:
            in_adm = replaced(name, RENAMED)
            if match := re.match(r"decoder\.(\d+)\.resampler\.", in_adm):
                place = 2 if f"decoder.{match[1]}.attention.norm.weight" in known else 1
                in_adm = f"output_blocks.{match[1]}.{place}.{in_adm[match.end() :]}"
            renamed[name] = (in_adm,)
        return renamed

    def describe(self, state: StateDict, overrides: Overrides) -> ModelDescription:
        """The architecture from names and shapes; the rest from overrides or the published defaults."""
        shapes = state.shapes
        _refuse_conditional(shapes)
        levels, blocks = _levels_and_blocks(shapes)
        updown = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", n) for n in shapes)
        author = "ADM" if updown else "improved-diffusion"

        channels = shapes["time_embed.0.weight"][1]
        first = [1 + level * (blocks + 1) for level in range(levels)]
        widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
        mult = multipliers(widths, channels)
        attention = [level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes]
        size = overrides.image_size(mult, attention)
        num_head_channels, num_heads = _heads(overrides, updown)
        new_order = overrides.get("use_new_attention_order", False, "the published default")
        predicts_x0 = overrides.get("predict_xstart", False, "the published default")
        diffusion = overrides.diffusion("x0" if predicts_x0 else "eps")
        rescaled = diffusion.T != 1000 and overrides.get("rescale_timesteps", not updown, f"the default of {author}")
        image_channels, out_channels = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
        model = UNetConfig(
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
            **SETTINGS,
        )
        return ModelDescription(
            kind=f"{author} state dict",
            model=model,
            image_shape=(image_channels, size, size),
            diffusion=diffusion,
            assumed=tuple(overrides.assumed),
        )

    def exported_files(self, description: ModelDescription, weights: TensorDict, out: Path) -> dict[Path, FileContent]:
        _refuse_export(description)
        if out.is_dir() or not out.suffix:
            raise UserError(f"it writes a file: give a name such as {out}.pt")
        return {out: (self.state_dict(description.model, weights), {})}

    def state_dict(self, model: UNetConfig, weights: TensorDict) -> TensorDict:
        """Weights under ADM's names, in ADM's shapes: attention's linear layers are convolutions there."""
        renamed = self.names(weights, model)
        is_linear = ("attention.qkv.weight", "attention.out.weight")
        return {
            renamed[name][0]: value[..., None] if name.endswith(is_linear) else value for name, value in weights.items()
        }

    def overrides_for(self, description: ModelDescription, weights: TensorDict) -> dict[str, Any]:
        model, diffusion = description.model, description.diffusion
        one_way_of_heads = "num_heads" if model.num_head_channels == -1 else "num_head_channels"
        settings: dict[str, Any] = {
            "image_size": description.image_shape[1],
            one_way_of_heads: getattr(model, one_way_of_heads),
            "use_new_attention_order": model.use_new_attention_order,
            "noise_schedule": diffusion.schedule,
            "diffusion_steps": diffusion.T,
            "predict_xstart": diffusion.prediction == "x0",
        }
        if diffusion.T != 1000:
            settings["rescale_timesteps"] = model.timestep_scale != 1
        exported = StateDict(path=Path(), tensors=self.state_dict(model, weights))
        assumed = self.describe(exported, Overrides(None, self.overridable, self.name)).assumed
        written = {text.partition(" ")[0] for text in assumed}
        return {name: value for name, value in settings.items() if f"{name}={value}" not in written}


FAMILY = ADM()
