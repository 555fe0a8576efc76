"""Fine-tuning: the weights of any checkpoint that loads, copied into the network of a run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.checkpoints.load import copy_weights, describe_weights, identify
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.blocks import Attention
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet

MAY_DIFFER = ("dropout", "attention_resolutions", "num_heads", "num_head_channels", "learn_sigma")
"""These settings of a network need not be those of the checkpoint, or are compared by their effect."""

ADM_FLAG_NAMES = {
    "timestep_scale": "rescale_timesteps",
    "schedule": "noise_schedule",
    "num_timesteps": "diffusion_steps",
}
"""The names of these settings in ModelDescription.assumed; other settings have one name."""


def load_weights_into(
    network: UNet,
    path: str | Path,
    diffusion: DiffusionConfig | None = None,
    remake_head: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Copy the (averaged) weights of a checkpoint of any family into the network of a run.

    Args:
        network: the network of the run.
        path: a path that load_denoiser takes.
        diffusion: the run's settings. They stand in for what the file does not contain; a note says where the
            checkpoint was trained with others.
        remake_head: if learned variance differs, keep the part of the output layer that predicts the mean; new
            variances start halfway between their bounds (at an output of 0).
        say: is called with lines that say what was copied, and the notes.

    Raises:
        UserError: the checkpoint cannot be read, or has another network; the message lists the settings to give.
    """
    info = identify(Path(path))
    from_run = info.description.assumed_names
    if "diffusion_steps" in from_run and diffusion is not None and diffusion.betas is None:
        schedule = {"noise_schedule": diffusion.schedule, "diffusion_steps": diffusion.num_timesteps}
        info = describe_weights(info.state, schedule)
    checkpoint = info.description
    empty, weights = info.empty_network()
    notes = _notes_on_differences(network, empty, checkpoint, path)
    remade = ""
    if network.config.learn_sigma != checkpoint.model.learn_sigma:
        if not remake_head:
            raise UserError(
                f"{path} has model.learn_sigma={str(checkpoint.model.learn_sigma).lower()}; give that, or "
                "init_remake_head=true to keep the part of its output layer that predicts the mean"
            )
        head = "pixels.out" if network.pixels is not None else "out"
        expected = network.state_dict()
        for name in (f"{head}.weight", f"{head}.bias"):
            weights[name] = _remade(weights[name], expected[name])
        remade = "; the output layer was re-made, its part for the mean kept"
    copy_weights(network, weights, info.state)
    count = sum(value.numel() for value in weights.values())
    say(f"init_from    {path}: {checkpoint.kind}, {count:,} weights copied{remade}")
    if from_run:
        say(f"             taken from this run, since the file does not say: {', '.join(sorted(from_run))}")
    for field in ("schedule", "num_timesteps", "betas", "prediction") if diffusion is not None else ():
        trained, now = getattr(checkpoint.diffusion, field), getattr(diffusion, field)
        if trained != now and ADM_FLAG_NAMES.get(field, field) not in checkpoint.assumed_names:
            notes.append(f"it was trained with diffusion.{field}={trained}, this run has {now}")
    for note in notes:
        say(f"             note: {note}")


def _notes_on_differences(network: UNet, empty: UNet, checkpoint: ModelDescription, path: str | Path) -> list[str]:
    """Notes on differences between a run's network and a checkpoint's in what the file does not contain.

    Raises:
        UserError: they differ in what it contains, apart from the output layer.
    """
    run, model, assumed = network.config, checkpoint.model, checkpoint.assumed_names
    differing = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(UNetConfig)
        if f.name not in MAY_DIFFER and getattr(model, f.name) != getattr(run, f.name)
    }
    notes = [
        f"its published default is model.{name}={_in_yaml(differing.pop(name))}, this run has "
        f"{_in_yaml(getattr(run, name))}"
        for name in list(differing)
        if ADM_FLAG_NAMES.get(name, name) in assumed
    ]
    if differing.keys().isdisjoint({"channels", "channel_mult", "num_res_blocks"}):
        overridable = {"num_head_channels": model.num_head_channels, "num_heads": model.num_heads}
        heads, heads_in_checkpoint = _heads(network), _heads(empty)
        if heads.keys() != heads_in_checkpoint.keys():
            # The levels count, not the heights: a model may be fine-tuned at another size.
            top, height = checkpoint.image_shape[1], network.image_size[0]
            differing["attention_resolutions"] = tuple(r * height // top for r in model.attention_resolutions)
        elif heads != heads_in_checkpoint and not assumed & overridable.keys():
            differing |= overridable
        elif heads != heads_in_checkpoint:
            settings = " ".join(f"model.{k}={v}" for k, v in overridable.items())
            notes.append(f"its published default is {settings}; this run's attention has other heads")
    settings_to_give = [f"model.{k}={_in_yaml(v)}" for k, v in differing.items()]
    if checkpoint.image_shape[0] != network.image_channels:
        settings_to_give.append(f"data.channels={checkpoint.image_shape[0]}")
    if settings_to_give:
        raise UserError(f"{path} ({checkpoint.kind}) does not fit the network; give {' '.join(settings_to_give)}")
    return notes


def _heads(network: nn.Module) -> dict[str, int]:
    """The number of heads of each attention, by its name."""
    return {name: m.num_heads for name, m in network.named_modules() if isinstance(m, Attention)}


def _in_yaml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _remade(in_checkpoint: Tensor, in_run: Tensor) -> Tensor:
    """An output layer of the run's size: the checkpoint's rows for the mean, and zeros for a variance that is new."""
    remade = in_run.new_zeros(in_run.shape)
    rows = min(len(in_checkpoint), len(in_run))
    remade[:rows] = in_checkpoint[:rows]
    return remade
