"""Fine-tuning: a network's weights from any checkpoint that loads."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ilvr_lightning.config import DiffusionConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.blocks import Attention
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.pretrained.description import Description
from ilvr_lightning.pretrained.load import load_denoiser, make_network

FREE = ("dropout", "attention_resolutions", "num_heads", "num_head_channels", "learn_sigma")
"""Settings that may differ, or are compared by what they come to."""
DIFFUSION_FLAGS = {
    "schedule": "noise_schedule",
    "num_timesteps": "diffusion_steps",
    "betas": "betas",
    "prediction": "prediction",
}
"""Settings of the forward process, and what they are called where they are assumed."""


def initialise(
    network: UNet,
    path: str | Path,
    diffusion: DiffusionConfig | None = None,
    remake_head: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Give a network the (averaged) weights of a checkpoint, whoever wrote it.

    Args:
        network: the run's.
        path: as load_denoiser takes it.
        diffusion: the run's, to note where the checkpoint was trained otherwise.
        remake_head: where learned variance differs, keep the output layer's part for the mean; new variances start
            halfway between their bounds (an output of 0).
        say: is told what was taken over.

    Raises:
        UserError: the checkpoint cannot be read, or is another network; the message lists the settings to give.
    """
    loaded = load_denoiser(path, say=None)
    theirs = loaded.description
    _check_same(network, theirs, path)
    ours = network.config
    state = loaded.network.state_dict()
    note = ""
    if ours.learn_sigma != theirs.model.learn_sigma:
        if not remake_head:
            raise UserError(
                f"init_from: {path} has model.learn_sigma={str(theirs.model.learn_sigma).lower()}; give that, or "
                "init_remake_head=true to keep its output layer's part for the mean alone"
            )
        for name in ("out.weight", "out.bias"):
            state[name] = _remade(state[name], network.state_dict()[name])
        note = "; output layer re-made, its part for the mean kept"
    network.load_state_dict(state)
    say(f"init_from    {path}: {theirs.kind}, {sum(v.numel() for v in state.values()):,} weights taken over{note}")
    if theirs.assumed:
        say(f"             taken from this run, since the file cannot tell: {_open_settings(theirs, ours)}")
    if diffusion is not None:
        for name, flag in DIFFUSION_FLAGS.items():
            was, now = getattr(theirs.diffusion, name), getattr(diffusion, name)
            if was != now and not any(a.startswith(f"{flag}=") for a in theirs.assumed):
                say(f"             note: it was trained with diffusion.{name}={was}, this run has {now}")


def _check_same(network: UNet, theirs: Description, path: str | Path) -> None:
    """Raise a UserError unless the two networks compute the same, the output layer and what is unknown aside."""
    assumed = {a.partition("=")[0] for a in theirs.assumed}
    ours, model = network.config, theirs.model
    differing = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(UNetConfig)
        if f.name not in (*FREE, *assumed) and getattr(model, f.name) != getattr(ours, f.name)
    }
    if "rescale_timesteps" in assumed:
        differing.pop("timestep_scale", None)
    with torch.device("meta"):
        other = make_network(theirs)
    levels, their_levels = _attention(network), _attention(other)
    if differing.keys().isdisjoint({"channels", "channel_mult", "num_res_blocks"}):
        if levels.keys() != their_levels.keys():
            # The levels count, not the heights: a model may be fine-tuned at another size.
            top, height = theirs.image_shape[1], network.image_size[0]
            differing["attention_resolutions"] = tuple(r * height // top for r in model.attention_resolutions)
        elif levels != their_levels and not assumed & {"num_heads", "num_head_channels"}:
            differing |= {"num_head_channels": model.num_head_channels, "num_heads": model.num_heads}
    channels = theirs.image_shape[0]
    settings = [f"model.{k}={_written(v)}" for k, v in differing.items()]
    if channels != network.image_channels:
        settings.append(f"data.channels={channels}")
    if settings:
        raise UserError(f"init_from: {path} ({theirs.kind}) does not fit the network; give {' '.join(settings)}")


def _attention(network: UNet) -> dict[str, int]:
    """Heads of each attention, by its place."""
    return {name: m.num_heads for name, m in network.named_modules() if isinstance(m, Attention)}


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _open_settings(theirs: Description, ours: UNetConfig) -> str:
    names = [a.partition("=")[0] for a in theirs.assumed]
    known = [f"model.{n}={_written(getattr(ours, n))}" for n in names if hasattr(ours, n)]
    return ", ".join(known + [f"the {n.replace('_', ' ')}" for n in names if not hasattr(ours, n)])


def _remade(theirs: Tensor, ours: Tensor) -> Tensor:
    """Rows for the mean from theirs, zero for a variance that is new."""
    made = torch.zeros_like(ours)
    rows = min(len(theirs), len(ours))
    made[:rows] = theirs[:rows]
    return made
