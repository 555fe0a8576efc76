"""Fine-tuning: the weights of any checkpoint that loads, copied into the network of a run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ilvr_lightning.checkpoints.load import copy_weights, describe_weights, identify
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.blocks import Attention
from ilvr_lightning.models.unet import UNet

MAY_DIFFER = ("dropout", "attention_resolutions", "num_heads", "num_head_channels", "learn_sigma")
"""These settings of a network need not be those of the checkpoint, or are compared by their effect."""

HEADS = {"num_head_channels", "num_heads"}
"""These settings say together how many attention heads there are."""

CONFIG_NAMES = {
    "rescale_timesteps": "timestep_scale",
    "noise_schedule": "schedule",
    "diffusion_steps": "num_timesteps",
}
"""The names in a config of what ModelDescription.assumed_names has under ADM's; other settings have one name."""


def load_weights_into(
    network: UNet,
    path: str | Path | None,
    diffusion: DiffusionConfig | None = None,
    remake_head: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Copy the (averaged) weights of a checkpoint of any family into the network of a run.

    Args:
        network: the network of the run.
        path: what load_denoiser takes; None leaves the network as it is.
        diffusion: the run's settings. They stand in for what the file does not contain; a note says where the
            checkpoint was trained with others.
        remake_head: if learned variance differs, keep the part of the output layer that predicts the mean; new
            variances start halfway between their bounds (at an output of 0).
        say: is called with lines that say what was copied, and the notes.

    Raises:
        UserError: the checkpoint cannot be read, or has another network; the message lists the settings to give.
    """
    if path is None:
        return
    try:
        info = identify(path)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    from_run = info.description.assumed_names
    if "diffusion_steps" in from_run and diffusion is not None and diffusion.betas is None:
        schedule = {"noise_schedule": diffusion.schedule, "diffusion_steps": diffusion.num_timesteps}
        info = describe_weights(info.state, schedule)
    checkpoint = info.description
    empty, weights = info.empty_network()
    unknown = {CONFIG_NAMES.get(flag, flag) for flag in checkpoint.assumed_names}
    if unknown & HEADS:
        unknown |= HEADS
    differing = _differing_settings(network, empty)
    to_give = [f"model.{name}={_in_yaml(value)}" for name, value in differing.items() if name not in unknown]
    if empty.image_channels != network.image_channels:
        to_give.append(f"data.channels={empty.image_channels}")
    if to_give:
        raise UserError(f"{path} ({checkpoint.kind}) does not fit the network; give {' '.join(to_give)}")
    remade = ""
    if network.config.learn_sigma != checkpoint.model.learn_sigma:
        if not remake_head:
            raise UserError(
                f"{path} has model.learn_sigma={_in_yaml(checkpoint.model.learn_sigma)}; give that, or "
                "init_remake_head=true to keep the part of its output layer that predicts the mean"
            )
        expected = network.state_dict()
        for name in ("out.weight", "out.bias"):
            weights[name] = _remade(weights[name], expected[name])
        remade = "; the output layer was re-made, its part for the mean kept"
    copy_weights(network, weights, info.state)
    count = sum(value.numel() for value in weights.values())
    say(f"init_from    {path}: {checkpoint.kind}, {count:,} weights copied{remade}")
    if from_run:
        say(f"             taken from this run, since the file does not say: {', '.join(sorted(from_run))}")
    for name in differing:
        default, now = _in_yaml(differing[name]), _in_yaml(getattr(network.config, name))
        say(f"             note: its published default is model.{name}={default}, this run has {now}")
    for name in ("schedule", "num_timesteps", "betas", "prediction") if diffusion is not None else ():
        trained, now = getattr(checkpoint.diffusion, name), getattr(diffusion, name)
        if trained != now and name not in unknown:
            say(f"             note: it was trained with diffusion.{name}={trained}, this run has {now}")


def _differing_settings(run: UNet, checkpoint: UNet) -> dict[str, Any]:
    """The settings with which a checkpoint's network does something else than a run's, by name."""
    settings = {name: value for name, value in dataclasses.asdict(checkpoint.config).items() if name not in MAY_DIFFER}
    heads, heads_in_checkpoint = _heads(run), _heads(checkpoint)
    if heads.keys() != heads_in_checkpoint.keys():
        # The levels count, not the heights: a model may be fine-tuned at another size.
        resolutions, top, height = checkpoint.config.attention_resolutions, checkpoint.image_size[0], run.image_size[0]
        settings["attention_resolutions"] = tuple(r * height // top for r in resolutions)
    elif heads != heads_in_checkpoint:
        settings |= {name: getattr(checkpoint.config, name) for name in sorted(HEADS)}
    return {name: value for name, value in settings.items() if value != getattr(run.config, name)}


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
