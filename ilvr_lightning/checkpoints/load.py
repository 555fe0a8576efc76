"""load_denoiser(): a checkpoint's path in, whoever wrote it; a callable (x, t) -> Prediction out."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.checkpoints.families import adm, ddim, diffusers, diffusers_scheduler
from ilvr_lightning.checkpoints.families import native as own
from ilvr_lightning.checkpoints.files import (
    READ_ERRORS,
    WHAT_LOADS,
    StateDict,
    Weights,
    check_names,
    fill,
    first_line,
    identity_of,
    is_state,
    read_content,
    shapes_of,
    state_dict_of,
)
from ilvr_lightning.config.load import config_from_dict
from ilvr_lightning.config.schema import MAX_SIDE, Config
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.plan import Gains, SamplingPlan
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.unet import UNet

T = TypeVar("T")


CALIBRATED_FOR = (
    "sampler", "num_steps", "spacing", "timesteps", "eta", "variance", "clip", "kernel", "orthogonal",
    "reference_noise", "eps_extrapolation", "start_from",
)  # fmt: skip
"""The fields of a plan that octave_gains depend on, beside the factor."""


class LoadedDenoiser(Denoiser):
    """A Denoiser with what its checkpoint says of it."""

    network: UNet
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    clip: bool
    """Whether its authors' sampler clips the predicted x_0."""
    description: ModelDescription
    found: "CheckpointInfo"
    """Where it comes from."""

    def gains(self, preset: str, plan: SamplingPlan) -> dict[int, Gains]:
        """The octave_gains by factor that were set for a preset, if the plan is still that one."""
        original = SamplingPlan.preset(preset, clip=self.clip)
        same = all(getattr(plan, name) == getattr(original, name) for name in CALIBRATED_FOR)
        return self.description.octave_gains.get(preset, {}) if same else {}

    def preset(self, name: str, factor: int = 8, **changes: Any) -> SamplingPlan:
        """A preset as this checkpoint wants it: with its clipping, and the octave_gains that it was calibrated to.

        Raises:
            ValueError: as SamplingPlan.preset.
        """
        plan = SamplingPlan.preset(name, **{"clip": self.clip, "factor": factor, **changes})
        if "octave_gains" in changes:
            return plan
        return replace(plan, octave_gains=self.gains(name, plan).get(factor, ()))


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A recognised checkpoint, not yet loaded."""

    description: ModelDescription
    weights: StateDict
    names: Callable[[Iterable[str]], dict[str, tuple[str, ...]]]
    """The file's names of each of our parameters."""
    has_ema: bool | None = None
    """None: the file does not tell."""
    files: tuple[Path, ...] = ()
    """All that it was read from, where that is more than the weights."""

    def empty_network(self) -> tuple[UNet, dict[str, tuple[str, ...]]]:
        """The network without memory, and the file's names for its parameters, once they are known to fit.

        Raises:
            UserError: they do not.
        """
        with torch.device("meta"):
            network = _prefix_errors(self.weights.path, lambda: make_network(self.description))
        names = self.names(network.state_dict())
        check_names(network, self.weights, names)
        return network, names

    @property
    def sha256(self) -> str:
        """Of the file, or of the hashes of several."""
        hashes = [file_sha256(path) for path in self.files or (self.weights.path,)]
        self.weights.check_unchanged()
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
    found = identify(Path(path), weights, overrides)
    description = found.description
    if say is not None:
        for line in (f"checkpoint   {path}: {description.lines()[0]}", *description.lines()[1:]):
            say(line)
    network, names = found.empty_network()
    network = network.to_empty(device="cpu")
    fill(network, found.weights, names)
    diffusion = description.diffusion
    denoiser = LoadedDenoiser(
        network.eval(),
        make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas),
        diffusion.prediction,
    )
    denoiser.image_shape = description.image_shape
    denoiser.clip = description.clip
    # Gains were set on the average of the weights.
    denoiser.description = replace(description, octave_gains={}) if weights == "raw" else description
    denoiser.found = found
    return denoiser


def make_network(description: ModelDescription) -> UNet:
    """The network that a description calls for.

    Raises:
        UserError: it makes none.
    """
    channels, height, width = description.image_shape
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE or channels not in (1, 3):
        raise UserError(f"the checkpoint's images of {channels}x{height}x{width} are none that load (1 or 3 channels)")
    try:
        return UNet(description.model, (height, width), channels)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"the checkpoint's hyper-parameters make no network: {error}") from None


def identify(path: Path, weights: Weights = "ema", overrides: dict[str, Any] | None = None) -> CheckpointInfo:
    """What a path holds, told by content.

    Raises:
        UserError: nothing that loads.
    """
    if path.is_dir():
        return _folder(path, weights, overrides)
    content = read_content(path)
    if own.is_checkpoint(content):
        Overrides(overrides, {}, "a checkpoint of this project")
        return _prefix_errors(path, lambda: _own_checkpoint(path, content, weights))
    state = state_dict_of(path, content, weights)
    if own.KEY in state.metadata:
        Overrides(overrides, {}, "a file of this project")
        description = _prefix_errors(path, lambda: own.describe_metadata(state.metadata[own.KEY]))
        return CheckpointInfo(description=description, weights=state, names=own.names)
    return _foreign(path, content, state, overrides)


def _prefix_errors(path: Path, describe: Callable[[], T]) -> T:
    """What describe gives; its errors name the file."""
    try:
        return describe()
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except READ_ERRORS as error:
        raise UserError(f"{path} is a damaged checkpoint ({first_line(error)})") from None


def _own_checkpoint(path: Path, content: dict[str, Any], weights: Weights) -> CheckpointInfo:
    key = "state_dict" if weights == "ema" else "current_model_state"
    state = content.get(key)
    if state is None:
        raise UserError(f"{path} holds no raw weights; give --weights ema")
    if not is_state(state):
        raise UserError(f"{path} is a damaged checkpoint: {key} holds something else than weights")
    network = {n: v for n, v in state.items() if n.startswith("network.")}
    shapes = {n.removeprefix("network."): shape for n, shape in shapes_of(path, network).items()}
    return CheckpointInfo(
        description=own.describe_checkpoint(content),
        weights=StateDict(path=path, keys=(key,), prefix="network.", shapes=shapes, identity=identity_of(path)),
        names=own.names,
        has_ema="current_model_state" in content,
    )


def _foreign(path: Path, content: Any, state: StateDict, overrides: dict[str, Any] | None) -> CheckpointInfo:
    for family in (adm, ddim):
        if family.recognises(state.shapes):
            description = _prefix_errors(path, functools.partial(family.describe, state.shapes, overrides))
            return CheckpointInfo(
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


def _folder(path: Path, weights: Weights, overrides: dict[str, Any] | None) -> CheckpointInfo:
    if (path / "model.safetensors").is_file():
        return identify(path / "model.safetensors", weights, overrides)
    folder = diffusers.network_folder(path)
    if folder is not None:
        _prefix_errors(folder, lambda: diffusers.describe(folder, overrides))  # says so if it is another kind of model
        file = diffusers.weights_file(folder)
        return _diffusers(folder, state_dict_of(file, read_content(file), weights), overrides)
    files = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise UserError(f"the folder {path} holds {files}; {WHAT_LOADS}")


def _diffusers(folder: Path, state: StateDict, overrides: dict[str, Any] | None) -> CheckpointInfo:
    description = _prefix_errors(folder, lambda: diffusers.describe(folder, overrides))
    names = functools.partial(diffusers.names, config=description.model, words=diffusers.words_of(state.shapes))
    files = [state.path, folder / "config.json", diffusers_scheduler.scheduler_file(folder)]
    return CheckpointInfo(
        description=description, weights=state, names=names, files=tuple(file for file in files if file is not None)
    )


def read_run_config(path: Path) -> tuple[Config, int]:
    """The configuration and the step of a checkpoint of train.py.

    Raises:
        UserError: it is none.
    """
    content = read_content(path)
    if not own.is_checkpoint(content):
        raise UserError(f"{path} is no checkpoint of this project: give a last.ckpt or best.ckpt that train.py wrote")
    step = content.get("global_step")
    if type(step) is not int or step < 0:
        raise UserError(f"{path} is a damaged checkpoint: its step is {step!r:.40}")
    return _prefix_errors(path, lambda: config_from_dict(content["hyper_parameters"]["config"])), step
