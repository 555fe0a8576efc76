"""load_denoiser(): a checkpoint's path in, whoever wrote it; a callable (x, t) -> Prediction out."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.pretrained import adm, ddim, diffusers, diffusers_scheduler, own
from ilvr_lightning.pretrained.description import Description, Overrides
from ilvr_lightning.pretrained.files import WHAT_LOADS, StateDict, Weights, fill, read_content, state_dict_of


class LoadedDenoiser(Denoiser):
    """A Denoiser with what its checkpoint says of it."""

    network: UNet
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    clip: bool
    """Whether its authors' sampler clips the predicted x_0."""
    description: Description
    found: "Found"
    """Where it comes from."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recognised checkpoint, not yet loaded."""

    description: Description
    weights: StateDict
    names: Callable[[Iterable[str]], dict[str, tuple[str, ...]]]
    """The file's names of each of our parameters."""
    has_ema: bool | None = None
    """None: the file does not tell."""
    files: tuple[Path, ...] = ()
    """All that it was read from, where that is more than the weights."""

    @property
    def sha256(self) -> str:
        """Of the file, or of the hashes of several."""
        hashes = [file_sha256(path) for path in self.files or (self.weights.path,)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_denoiser(
    path: str | Path,
    weights: Weights = "ema",
    overrides: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = print,
) -> LoadedDenoiser:
    """Load whatever fits, in float32 on the CPU, in eval mode; it is recognised by content, not by name.

    Args:
        path: a checkpoint or safetensors of this project, a state dict of ADM, guided-diffusion, improved-diffusion,
            ilvr_adm, P2-weighting or the DDIM authors, or a diffusers folder.
        weights: the average, or the raw weights, where a file has both.
        overrides: what a foreign file cannot tell, under ADM's flag names (num_heads, num_head_channels, image_size,
            use_new_attention_order, noise_schedule, diffusion_steps, predict_xstart, rescale_timesteps).
        say: is told what was recognised, with its hyper-parameters and every assumption; None is silent.

    Raises:
        UserError: the file is missing, damaged, would execute something, or is no unconditional denoiser.
    """
    found = recognise(Path(path), weights, overrides)
    description = found.description
    if say is not None:
        for line in (f"checkpoint   {path}: {description.lines()[0]}", *description.lines()[1:]):
            say(line)
    with torch.device("meta"):
        network = make_network(description)
    network = network.to_empty(device="cpu")
    fill(network, found.weights, found.names(network.state_dict()))
    diffusion = description.diffusion
    denoiser = LoadedDenoiser(
        network.eval(),
        make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas),
        diffusion.prediction,
    )
    denoiser.image_shape = description.image_shape
    denoiser.clip = description.clip
    denoiser.description = description
    denoiser.found = found
    return denoiser


KIN = {adm: "ADM's kin", ddim: "the DDIM authors"}


def make_network(description: Description) -> UNet:
    """The network that a description calls for.

    Raises:
        UserError: it makes none.
    """
    channels, height, width = description.image_shape
    model = description.model
    if max(model.channels, *model.channel_mult, model.num_res_blocks) > 4096 or len(model.channel_mult) > 12:
        raise UserError(f"the checkpoint's hyper-parameters are beyond any network: {model}"[:200])
    try:
        return UNet(description.model, (height, width), channels)
    except ValueError as error:
        raise UserError(f"the checkpoint's hyper-parameters make no network: {error}") from None


def recognise(path: Path, weights: Weights = "ema", overrides: dict[str, Any] | None = None) -> Found:
    """What a path holds, told by content.

    Raises:
        UserError: nothing that loads.
    """
    if path.is_dir():
        return _folder(path, weights, overrides)
    content = read_content(path)
    if own.is_checkpoint(content):
        Overrides(overrides, {}, "a checkpoint of this project")
        return _own_checkpoint(path, content, weights)
    state = state_dict_of(path, content, weights)
    if own.KEY in state.metadata:
        Overrides(overrides, {}, "a file of this project")
        try:
            description = own.describe_metadata(state.metadata[own.KEY])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return Found(description=description, weights=state, names=own.names)
    return _foreign(path, content, state, overrides)


def _own_checkpoint(path: Path, content: dict[str, Any], weights: Weights) -> Found:
    key = "state_dict" if weights == "ema" else "current_model_state"
    state = content.get(key)
    if state is None:
        raise UserError(f"{path} holds no raw weights; give --weights ema")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is a damaged checkpoint: {key} holds something else than weights")
    shapes = {n.removeprefix("network."): tuple(v.shape) for n, v in state.items() if n.startswith("network.")}
    return Found(
        description=own.describe_checkpoint(content),
        weights=StateDict(path=path, keys=(key,), prefix="network.", shapes=shapes),
        names=own.names,
        has_ema="current_model_state" in content,
    )


def _foreign(path: Path, content: Any, state: StateDict, overrides: dict[str, Any] | None) -> Found:
    for family in (adm, ddim):
        if family.recognises(state.shapes):
            try:
                description = family.describe(state.shapes, overrides)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            except (LookupError, ValueError, TypeError, ArithmeticError) as error:
                raise UserError(f"{path}: a state dict of {KIN[family]} that is damaged: {error!r:.100}") from None
            return Found(
                description=description,
                weights=state,
                names=functools.partial(family.names, config=description.model),
                has_ema=state.has_ema,
            )
    if diffusers.recognises(state.shapes):
        if not (path.parent / "config.json").is_file():
            raise UserError(f"{path} holds a UNet2DModel of diffusers without its config.json; give the whole folder")
        return _diffusers(path.parent, state, overrides)
    some = ", ".join(list(state.shapes)[:3])
    raise UserError(f"{path} holds {len(state.shapes)} weights of an unknown network ({some} ...); {WHAT_LOADS}")


def _folder(path: Path, weights: Weights, overrides: dict[str, Any] | None) -> Found:
    if (path / "model.safetensors").is_file():
        return recognise(path / "model.safetensors", weights, overrides)
    folder = diffusers.network_folder(path)
    if folder is not None:
        diffusers.describe(folder, overrides)  # says so if it is another kind of model
        file = diffusers.weights_file(folder)
        return _diffusers(folder, state_dict_of(file, read_content(file), weights), overrides)
    files = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise UserError(f"the folder {path} holds {files}; {WHAT_LOADS}")


def _diffusers(folder: Path, state: StateDict, overrides: dict[str, Any] | None) -> Found:
    description = diffusers.describe(folder, overrides)
    names = functools.partial(diffusers.names, config=description.model, words=diffusers.words_of(state.shapes))
    files = [state.path, folder / "config.json", diffusers_scheduler.scheduler_file(folder)]
    return Found(
        description=description, weights=state, names=names, files=tuple(file for file in files if file is not None)
    )


def check_resumable(path: Path) -> None:
    """Raise a UserError unless a file is a checkpoint of train.py."""
    if not own.is_checkpoint(read_content(path)):
        raise UserError(f"{path} is no checkpoint of this project: give a last.ckpt or best.ckpt that train.py wrote")
