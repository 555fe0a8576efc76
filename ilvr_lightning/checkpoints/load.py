"""load_denoiser(): a checkpoint of any family in; a callable (x, t) -> Prediction out."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.checkpoints.description import CALIBRATED_AS, ModelDescription, Overrides
from ilvr_lightning.checkpoints.families import FAMILIES, native, what_loads
from ilvr_lightning.checkpoints.families.family import Family, StateDict
from ilvr_lightning.checkpoints.files import Weights, read_weights
from ilvr_lightning.checkpoints.find import named_checkpoint
from ilvr_lightning.config.load import config_from_dict
from ilvr_lightning.config.schema import MAX_SIDE, Config
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, Gains, SamplingPlan
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.hardware import fastest_copy

CALIBRATED_FOR = (
    "sampler", "num_steps", "spacing", "timesteps", "eta", "variance", "clip", "kernel", "orthogonal",
    "reference_noise", "start_from", *LOW_BAND_FIELDS,
)  # fmt: skip
"""A calibration holds for plans that agree in these fields."""


def _agree(plan: SamplingPlan, other: SamplingPlan) -> bool:
    return all(getattr(plan, name) == getattr(other, name) for name in CALIBRATED_FOR)


class LoadedDenoiser(Denoiser):
    """A Denoiser with what its checkpoint says about it."""

    network: UNet
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    clip: bool
    """Whether its authors' sampler clips the predicted x_0 to [-1, 1]."""
    description: ModelDescription
    found: "CheckpointInfo"
    """The checkpoint, without its weights."""

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The values that were black and white in its training images, where these had more than 8 bits."""
        data = self.description.data
        return None if data is None else data.known_range

    def fastest(self) -> Denoiser:
        """The same where it is, its network in bfloat16 if that is faster there; this one stays as it is."""
        forward = fastest_copy(self.network, next(self.network.parameters()).device)
        denoiser = Denoiser(forward, self.schedule, self.prediction_type)
        denoiser.spectrum, denoiser.components = self.spectrum, self.components
        denoiser.fit_scores = self.fit_scores
        return denoiser

    def calibrated(self, preset: str, plan: SamplingPlan) -> SamplingPlan:
        """The plan with the settings of matched noise that were calibrated for a preset, unless it differs from it."""
        if not _agree(plan, SamplingPlan.preset(preset, clip=self.clip)):
            return plan
        changes: dict[str, Any] = self.description.low_band.get(CALIBRATED_AS.get(preset, preset), {})
        return replace(plan, **changes)

    def gains(self, preset: str, plan: SamplingPlan) -> dict[int, Gains]:
        """The octave_gains by factor that were calibrated for a preset; none if the plan differs from it."""
        original = self.calibrated(preset, SamplingPlan.preset(preset, clip=self.clip))
        gains = self.description.octave_gains.get(CALIBRATED_AS.get(preset, preset), {})
        return gains if _agree(plan, original) else {}

    def preset(self, name: str, factor: int = 8, **changes: Any) -> SamplingPlan:
        """A preset with the clipping and the calibration of this checkpoint.

        Raises:
            ValueError: as SamplingPlan.preset.
        """
        plan = SamplingPlan.preset(name, **{"clip": self.clip, "factor": factor, **changes})
        if not set(LOW_BAND_FIELDS) & changes.keys():
            plan = self.calibrated(name, plan)
        if "octave_gains" in changes:
            return plan
        return replace(plan, octave_gains=self.gains(name, plan).get(factor, ()))


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint whose family is known, and whose weights are mapped, but not yet copied."""

    family: Family
    description: ModelDescription
    state: StateDict

    @property
    def sha256(self) -> str:
        """The hash of the file; of several files, the hash of their hashes.

        Raises:
            UserError: the file has changed since it was read.
        """
        hashes = [file_sha256(path) for path in (self.state.path, *self.family.settings_files(self.state.path))]
        self.state.check_unchanged()
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def empty_network(self) -> tuple[UNet, dict[str, Tensor]]:
        """The network on the meta device, where it needs no memory, and its state dict, mapped from the file.

        Raises:
            UserError: the file's weights do not fit the network that it describes.
        """
        channels, height, width = self.description.image_shape
        model = self.description.model
        with _prefix_errors(self.state.path):
            # A description of a kilobyte may call for millions of layers, which take minutes to make.
            blocks = model.num_res_blocks * len(model.channel_mult)  # on the way down, each with ten weights
            if 10 * blocks > len(self.state.tensors):
                raise UserError(f"it describes {blocks} residual blocks, but holds {len(self.state.tensors)} weights")
            if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE or channels not in (1, 3):
                raise UserError(
                    f"images of {channels}x{height}x{width} do not load; they have 1 or 3 channels and sides up to "
                    f"{MAX_SIDE}"
                )
            with torch.device("meta"):
                network = UNet(model, (height, width), channels)
            expected = network.state_dict()
            names = self.family.names(expected, model, self.state.tensors)
            return network, _renamed(self.state.tensors, expected, names)


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_denoiser(
    path: str | Path,
    weights: Weights = "ema",
    overrides: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = print,
) -> LoadedDenoiser:
    """Load a checkpoint of any family, in float32 on the CPU, in eval mode; its content says which family it is of.

    Args:
        path: a file or folder that one of FAMILIES recognises, or the name of a bundled model.
        weights: the average or the raw weights, where a file holds both.
        overrides: settings that a third-party file does not contain, under ADM's flag names (num_heads,
            num_head_channels, image_size, use_new_attention_order, noise_schedule, diffusion_steps, predict_xstart,
            rescale_timesteps).
        say: is called with lines that say what was recognised, its hyper-parameters, and every assumption; None is
            silent.

    Raises:
        UserError: the file is missing, damaged, would execute something, or is no unconditional denoiser.
    """
    info = identify(path, weights, overrides)
    description = info.description
    if say is not None:
        for line in (f"checkpoint   {path}: {description.lines()[0]}", *description.lines()[1:]):
            say(line)
    network, state = info.empty_network()
    network = network.to_empty(device="cpu")
    copy_weights(network, state, info.state)
    diffusion = description.diffusion
    denoiser = LoadedDenoiser(
        network.eval(),
        make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas),
        diffusion.prediction,
    )
    denoiser.image_shape = description.image_shape
    denoiser.clip = description.clip
    denoiser.spectrum, denoiser.components = description.spectrum, description.components
    if weights == "raw":  # the average of the weights was calibrated
        description = replace(description, octave_gains={}, low_band={}, fit_scores={})
    denoiser.description, denoiser.fit_scores = description, description.fit_scores
    denoiser.found = replace(info, state=replace(info.state, tensors={}, content={}))  # unmaps the file
    return denoiser


def identify(path: str | Path, weights: Weights = "ema", overrides: Mapping[str, Any] | None = None) -> CheckpointInfo:
    """Open a file, a folder or a bundled model, and describe it.

    Raises:
        UserError: it is nothing that loads.
    """
    path = named_checkpoint(path)
    file = path if not path.is_dir() else next(filter(None, (f.weights_in(path) for f in FAMILIES.values())), None)
    if file is None:
        files = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UserError(f"the folder {path} holds {files}; what loads: {what_loads()}")
    return describe_weights(read_weights(file, weights), overrides)


def describe_weights(state: StateDict, overrides: Mapping[str, Any] | None = None) -> CheckpointInfo:
    """Describe weights by the first family that recognises them.

    Raises:
        UserError: none does, or it refuses them or the overrides.
    """
    for family in FAMILIES.values():
        if family.recognises(state):
            with _prefix_errors(state.path):
                description = family.describe(state, Overrides(overrides, family.overridable, family.name))
            return CheckpointInfo(family=family, description=description, state=state)
    first = ", ".join(list(state.tensors)[:3])
    raise UserError(
        f"{state.path} holds {len(state.tensors)} weights of an unknown network ({first} ...); "
        f"what loads: {what_loads()}"
    )


def _renamed(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """A file's weights under UNet's names and in its shapes.

    Args:
        tensors: the file's weights.
        expected: a state dict of UNet.
        names: the file's names of each parameter; three where UNet stacks queries, keys and values.

    Raises:
        UserError: weights are missing, unexpected or of another shape; the message counts them and names the first.
    """
    shapes = {
        part: (len(value) // len(names[name]), *value.shape[1:])
        for name, value in expected.items()
        for part in names[name]
    }
    faults = [f"{part} is missing" for part in shapes if part not in tensors]
    for name, weight in tensors.items():
        shape = shapes.get(name)
        if shape is None:
            faults.append(f"{name[:100]} is unexpected")
        elif weight.shape[: len(shape)] != shape or weight.numel() != math.prod(shape):
            faults.append(f"{name} is {tuple(weight.shape)}, not {shape}")
    if faults:
        first = "; ".join(faults[:5]) + ("; ..." if len(faults) > 5 else "")
        raise UserError(f"it does not fit the network ({len(faults)} faults): {first}")
    renamed = {}
    for name in expected:
        # A linear layer may be written as a convolution of size 1.
        parts = [tensors[part].reshape(shapes[part]) for part in names[name]]
        renamed[name] = parts[0] if len(parts) == 1 else torch.cat(parts)  # a single one stays mapped
    return renamed


def copy_weights(network: UNet, weights: Mapping[str, Tensor], state: StateDict) -> None:
    """Copy a file's weights into a network that they fit, in its dtype.

    Args:
        network: with memory.
        weights: a state dict of the network.
        state: the file that they are mapped from.

    Raises:
        UserError: a weight is not finite, or the file has changed since it was opened.
    """
    network.load_state_dict(weights)
    state.check_unchanged()
    broken = [name for name, value in network.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(
            f"{state.path} holds weights that are not finite ({len(broken)} tensors, {broken[0]} first); "
            "give an earlier checkpoint"
        )


@contextmanager
def _prefix_errors(path: Path) -> Iterator[None]:
    """Make one UserError, which names the file, of whatever is raised while a file is described or fitted."""
    try:
        yield
    except UserError as error:
        message = first_line(error, 1000)
        raise UserError(message if str(path) in message else f"{path}: {message}") from None
    except Exception as error:  # what a damaged file raises, and settings that make no network
        raise UserError(f"{path} describes no network that loads: {first_line(error, 300)}") from None


def read_run_config(path: Path) -> tuple[Config, int]:
    """The configuration and the optimizer step of a checkpoint of train.py.

    Raises:
        UserError: it is none.
    """
    content = read_weights(path).content
    if not native.is_checkpoint(content):
        raise UserError(f"{path} is no checkpoint of train.py; give a last.ckpt or best.ckpt that it wrote")
    step = content.get("global_step")
    if type(step) is not int or step < 0:
        raise UserError(f"{path} is a damaged checkpoint: its step is {step!r:.40}")
    with _prefix_errors(path):
        return config_from_dict(content["hyper_parameters"]["config"]), step
