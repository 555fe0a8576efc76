"""Folders of diffusers: a UNet2DModel, as google/ddpm-* have it, and its scheduler."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.checkpoints.families import diffusers_unet
from ilvr_lightning.checkpoints.families.family import Family, FileContent, ParameterNames, StateDict, TensorDict
from ilvr_lightning.checkpoints.families.naming import by_level, replaced, split_qkv
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.models.config import UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "diffusion_pytorch_model"
"""A folder's file of weights has this name, with one of several suffixes."""

WEIGHT_FILES = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.*.safetensors", f"{WEIGHTS}.*.bin")
"""The first of these that a folder holds is read; the last two are variants such as fp16."""

MAX_JSON_BYTES = 4_000_000
"""A settings file is at most this long; 100,000 explicit betas need half of it."""

RENAMED = {
    r"^encoder\.0\.block\.": "conv_in.",
    r"^time_embedding\.0\.": "time_embedding.linear_1.",
    r"^time_embedding\.2\.": "time_embedding.linear_2.",
    r"^middle\.(\d)\.block\.": r"mid_block.resnets.\1.",
    r"^middle\.0\.attention\.": "mid_block.attentions.0.",
    r"^norm\.": "conv_norm_out.",
    r"^out\.": "conv_out.",
    r"^(down|up)\.(\d+)\.resampler\.\d+\.": r"\1_blocks.\2.\1samplers.0.",
    r"^(down|up)\.(\d+)\.block\.": r"\1_blocks.\2.resnets.",
    r"^(down|up)\.(\d+)\.attention\.": r"\1_blocks.\2.attentions.",
    r"\.embedding\.": ".time_emb_proj.",
    r"\.skip\.": ".conv_shortcut.",
    r"\.norm\.": ".group_norm.",
}
"""UNet's names by level become diffusers' by these replacements, but for those of attention's linear layers."""

LINEAR_LAYERS = (("to_q", "to_k", "to_v"), "to_out.0")
"""Attention's linear layers have these names; files of diffusers from before they were renamed have the next ones."""

OLD_LINEAR_LAYERS = (("query", "key", "value"), "proj_attn")


def _scheduler_file(folder: Path) -> Path | None:
    """scheduler_config.json of a network's folder: in it, in scheduler/ below, or, for unet/, beside it."""
    beside = [folder.parent / "scheduler"] if folder.name == "unet" else []
    for candidate in (folder, folder / "scheduler", *beside):
        if (candidate / "scheduler_config.json").is_file():
            return candidate / "scheduler_config.json"
    return None


def _diffusion(folder: Path, overrides: Overrides) -> tuple[DiffusionConfig, bool]:
    """The schedule, and whether x_0 is clipped."""
    file = _scheduler_file(folder)
    if file is None:
        return overrides.diffusion(), True
    from ilvr_lightning.checkpoints.families import diffusers_scheduler  # it imports torch, for which no help waits

    scheduler = read_json(file)
    if given := {"noise_schedule", "diffusion_steps"} & overrides.given.keys():
        raise UserError(f"override {', '.join(sorted(given))}: the folder's scheduler says it; leave the override out")
    clip = diffusers_scheduler.clips(scheduler)
    if scheduler.get("thresholding"):
        overrides.assumed.append("clip=True (its dynamic thresholding is not done here)")
    if clip and scheduler.get("clip_sample_range", 1.0) != 1.0:
        overrides.assumed.append(f"clip to 1 (it clips to {str(scheduler['clip_sample_range'])[:40]})")
    return diffusers_scheduler.read_config(scheduler), clip


def _read_unet_config(folder: Path) -> dict[str, Any]:
    """A network's config.json, once it is known to be that of a UNet2DModel."""
    config = read_json(folder / "config.json")
    if (name := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise UserError(
            f"{folder} holds a {name!s:.100}; of diffusers' models, only an unconditional UNet2DModel can be loaded"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: the file is missing, too long, or holds none.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes; a settings file has at most {MAX_JSON_BYTES}")
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error, 120)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings")
    return values


def _split_before_heads(value: "Tensor", config: UNetConfig) -> "Tensor":
    """Weights of stacked queries, keys and values in the new order, in which they are split before the heads."""
    if config.use_new_attention_order:
        return value
    by_head = value.reshape(config.heads(len(value) // 3), 3, -1, *value.shape[1:])
    return by_head.transpose(0, 1).reshape(value.shape)


class Diffusers(Family):
    """Folders of diffusers with a UNet2DModel."""

    name = "diffusers"
    loads = "a diffusers folder with a UNet2DModel"
    overridable: Mapping[str, type] = {"image_size": int, "noise_schedule": str, "diffusion_steps": int}
    export_name = "diffusers"
    writes = "a folder for DDPMPipeline.from_pretrained (attention heads of one width)"

    def recognises(self, state: StateDict) -> bool:
        """By its names, or as another kind of model of diffusers, which is refused."""
        names = {"down_blocks.0.resnets.0.norm1.weight", "time_embedding.linear_1.weight"}
        return names <= state.tensors.keys() or state.path.name.startswith(WEIGHTS)

    def names(self, parameters: Iterable[str], config: UNetConfig, in_file: Collection[str] = ()) -> ParameterNames:
        qkv, out = OLD_LINEAR_LAYERS if any(name.endswith(".query.weight") for name in in_file) else LINEAR_LAYERS
        replacements = {**RENAMED, r"\.out\.": f".{out}."}
        renamed = {name: replaced(by_level(name, config, up_from_image=False), replacements) for name in parameters}
        return {name: split_qkv(in_diffusers, qkv) for name, in_diffusers in renamed.items()}

    def weights_in(self, folder: Path) -> Path | None:
        """The weights in a folder or in its unet/, whose config.json is that of a UNet2DModel.

        Raises:
            UserError: it is another kind of model, or its weights are missing or split up.
        """
        for network in (folder / "unet", folder):
            if (network / "config.json").is_file():
                _read_unet_config(network)
                if split := next(network.glob(f"{WEIGHTS}*.index.json"), None):
                    raise UserError(f"{network}: its weights are split up ({split.name}); save them as one file")
                for pattern in WEIGHT_FILES:
                    if files := sorted(network.glob(pattern)):
                        return files[0]
                raise UserError(f"{network} holds no weights: {' or '.join(WEIGHT_FILES[:2])} is missing")
        return None

    def settings_files(self, path: Path) -> tuple[Path, ...]:
        scheduler = _scheduler_file(path.parent)
        return (path.parent / "config.json", *([] if scheduler is None else [scheduler]))

    def describe(self, state: StateDict, overrides: Overrides) -> ModelDescription:
        """The architecture and the scheduler, from the JSON files beside the weights."""
        folder = state.path.parent
        if not (folder / "config.json").is_file():
            raise UserError("a model of diffusers without its config.json; give the folder, not the file alone")
        model, image_shape = diffusers_unet.read_config(_read_unet_config(folder), overrides)
        diffusion, clip = _diffusion(folder, overrides)
        return ModelDescription(
            kind="diffusers folder",
            model=model,
            image_shape=image_shape,
            diffusion=diffusion,
            clip=clip,
            assumed=tuple(overrides.assumed),
        )

    def exported_files(self, description: ModelDescription, weights: TensorDict, out: Path) -> dict[Path, FileContent]:
        from ilvr_lightning.checkpoints.families import diffusers_scheduler

        diffusers_unet.refuse_export(description)
        renamed = self.names(weights, description.model)
        state: TensorDict = {}
        for name, value in weights.items():
            stacked = _split_before_heads(value, description.model) if ".attention.qkv." in name else value
            state |= dict(zip(renamed[name], stacked.chunk(len(renamed[name])), strict=True))
        settings = {
            "unet/config.json": diffusers_unet.config_of(description.model, description.image_shape),
            "scheduler/scheduler_config.json": diffusers_scheduler.config_of(description),
            "model_index.json": {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            },
        }
        texts = {out / name: json.dumps(values, indent=2) + "\n" for name, values in settings.items()}
        return {out / "unet" / WEIGHT_FILES[0]: (state, {"format": "pt"}), **texts}


FAMILY = Diffusers()
