"""Fine-tuning: a network's weights from any checkpoint that loads."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.checkpoints.load import identify, load_denoiser, make_network
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.blocks import Attention
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet

MAY_DIFFER = ("dropout", "attention_resolutions", "num_heads", "num_head_channels", "learn_sigma")
"""Settings that may differ, or are compared by what they come to."""


ADM_FLAG_NAMES = {
    "timestep_scale": "rescale_timesteps",
    "schedule": "noise_schedule",
    "num_timesteps": "diffusion_steps",
}
"""What our settings are called where they are assumed, unless by the same name."""


def load_weights_into(
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
        diffusion: the run's: taken where the file cannot tell, and noted where the checkpoint was trained otherwise.
        remake_head: where learned variance differs, keep the output layer's part for the mean; new variances start
            halfway between their bounds (an output of 0).
        say: is told what was taken over.

    Raises:
        UserError: the checkpoint cannot be read, or is another network; the message lists the settings to give.
    """
    open_ = identify(Path(path)).description.assumed_names
    overrides: dict[str, Any] = {}
    if "diffusion_steps" in open_ and diffusion is not None and diffusion.betas is None:
        overrides = {"noise_schedule": diffusion.schedule, "diffusion_steps": diffusion.num_timesteps}
    loaded = load_denoiser(path, overrides=overrides or None, say=None)
    theirs = loaded.description
    notes = _differences(network, theirs, path)
    ours = network.config
    state = loaded.network.state_dict()
    remade = ""
    if ours.learn_sigma != theirs.model.learn_sigma:
        if not remake_head:
            raise UserError(
                f"{path} has model.learn_sigma={str(theirs.model.learn_sigma).lower()}; give that, or "
                "init_remake_head=true to keep its output layer's part for the mean alone"
            )
        head = "pixels.out" if network.pixels is not None else "out"
        for name in (f"{head}.weight", f"{head}.bias"):
            state[name] = _remade(state[name], network.state_dict()[name])
        remade = "; output layer re-made, its part for the mean kept"
    network.load_state_dict(state)
    say(f"init_from    {path}: {theirs.kind}, {sum(v.numel() for v in state.values()):,} weights taken over{remade}")
    if open_:
        say(f"             taken from this run, since the file cannot tell: {', '.join(sorted(open_))}")
    for field in ("schedule", "num_timesteps", "betas", "prediction") if diffusion is not None else ():
        was, now = getattr(theirs.diffusion, field), getattr(diffusion, field)
        if was != now and field not in theirs.assumed_names:
            notes.append(f"it was trained with diffusion.{field}={was}, this run has {now}")
    for note in notes:
        say(f"             note: {note}")


def _differences(network: UNet, theirs: ModelDescription, path: str | Path) -> list[str]:
    """Notes on where the networks may differ in what the file cannot tell.

    Raises:
        UserError: they differ in what it can tell, the output layer aside.
    """
    ours, model, assumed = network.config, theirs.model, theirs.assumed_names
    differing = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(UNetConfig)
        if f.name not in MAY_DIFFER and getattr(model, f.name) != getattr(ours, f.name)
    }
    notes = [
        f"its published default is model.{name}={_written(differing.pop(name))}, this run has "
        f"{_written(getattr(ours, name))}"
        for name in list(differing)
        if ADM_FLAG_NAMES.get(name, name) in assumed
    ]
    with torch.device("meta"):
        other = make_network(theirs)
    heads, their_heads = _attention(network), _attention(other)
    if differing.keys().isdisjoint({"channels", "channel_mult", "num_res_blocks"}):
        told = {"num_head_channels": model.num_head_channels, "num_heads": model.num_heads}
        if heads.keys() != their_heads.keys():
            # The levels count, not the heights: a model may be fine-tuned at another size.
            top, height = theirs.image_shape[1], network.image_size[0]
            differing["attention_resolutions"] = tuple(r * height // top for r in model.attention_resolutions)
        elif heads != their_heads and not assumed & told.keys():
            differing |= told
        elif heads != their_heads:
            settings = " ".join(f"model.{k}={v}" for k, v in told.items())
            notes.append(f"its published default is {settings}; this run's attention has other heads")
    settings_to_give = [f"model.{k}={_written(v)}" for k, v in differing.items()]
    if theirs.image_shape[0] != network.image_channels:
        settings_to_give.append(f"data.channels={theirs.image_shape[0]}")
    if settings_to_give:
        raise UserError(f"{path} ({theirs.kind}) does not fit the network; give {' '.join(settings_to_give)}")
    return notes


def _attention(network: UNet) -> dict[str, int]:
    """Heads of each attention, by its place."""
    return {name: m.num_heads for name, m in network.named_modules() if isinstance(m, Attention)}


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _remade(theirs: Tensor, ours: Tensor) -> Tensor:
    """Rows for the mean from theirs, zero for a variance that is new."""
    made = torch.zeros_like(ours)
    rows = min(len(theirs), len(ours))
    made[:rows] = theirs[:rows]
    return made
