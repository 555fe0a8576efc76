"""The description of a checkpoint, and what a user may add to it."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ilvr_lightning.config.load import config_from_dict
from ilvr_lightning.config.schema import MAX_SIDE, DataConfig, DiffusionConfig
from ilvr_lightning.diffusion.plan import FitScores, Gains
from ilvr_lightning.errors import UserError, did_you_mean
from ilvr_lightning.models.config import UNetConfig

if TYPE_CHECKING:  # the flags of --override are read before torch is
    from ilvr_lightning.diffusion.components import Components

FULL_SIZES = {(1, 1, 2, 2, 4, 4): 256, (1, 1, 2, 3, 4): 128, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32}
"""The published code of ADM and improved-diffusion has these multipliers for these image sizes in pixels."""
CALIBRATED_AS = {"best": "fast"}
"""Presets that take the calibration of another one, from which they differ only in the number of steps."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The hyper-parameters of a checkpoint of any family."""

    kind: str
    """What the checkpoint was recognised as, in words."""
    model: UNetConfig
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    diffusion: DiffusionConfig
    clip: bool = True
    """Whether its authors' sampler clips the predicted x_0 to [-1, 1]."""
    assumed: tuple[str, ...] = ()
    """The settings that the file does not contain, as "name=value (reason)"."""
    config: dict[str, Any] | None = None
    """The complete configuration of the run that trained it, where the file holds one."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the file says about its training, such as its step and its validation loss."""
    spectrum: tuple[float, ...] = ()
    """Variance of the training images' DCT coefficients by radius, as radial_spectrum returns it; empty if unknown."""
    components: "Components | None" = field(default=None, compare=False)
    """The training images' principal components; None if unknown."""
    low_band: dict[str, dict[str, float]] = field(default_factory=dict)
    """The calibrated settings of matched noise, LOW_BAND_FIELDS by preset."""
    octave_gains: dict[str, dict[int, Gains]] = field(default_factory=dict)
    """The calibrated gains by preset and factor: they give the octaves above the filter's frequencies the energy of
    real images."""
    fit_scores: FitScores = field(default_factory=dict)
    """Scores of held-out images by factor, which check_reference compares a reference with."""

    @functools.cached_property
    def data(self) -> DataConfig | None:
        """How the images that it was trained on were read, where the file says it."""
        return None if self.config is None else config_from_dict(self.config).data

    @property
    def assumed_names(self) -> set[str]:
        """The names of the assumed settings."""
        return {assumption.partition("=")[0] for assumption in self.assumed}

    def lines(self) -> list[str]:
        """The description for a reader, in aligned lines."""
        height, width = self.image_shape[1:]
        defaults = UNetConfig()
        always = ("channels", "channel_mult", "num_res_blocks", "attention_resolutions", "learn_sigma")
        model = [
            f"{f.name}={_written(getattr(self.model, f.name))}"
            for f in dataclasses.fields(UNetConfig)
            if f.name in always or getattr(self.model, f.name) != getattr(defaults, f.name)
        ]
        d = self.diffusion
        schedule = "explicit betas" if d.betas is not None else d.schedule
        lines = [f"{self.kind}, {self.image_shape[0]}x{height}x{width}", f"model        {' '.join(model)}"]
        clips = "clips x_0" if self.clip else "does not clip x_0"
        lines += [f"diffusion    {schedule}, T={d.T}, predicts {d.prediction}, {clips}"]
        if self.assumed:
            lines += [f"assumed      {'; '.join(self.assumed)}"]
        return lines

    def gain_lines(self) -> list[str]:
        """The calibration for a reader, in one line per preset."""
        lines = []
        for preset in (name for name in {**self.octave_gains, **self.low_band} if name not in CALIBRATED_AS):
            settings = [f"{name}={value:g}" for name, value in self.low_band.get(preset, {}).items()]
            by_factor = self.octave_gains.get(preset, {})
            gains = [f"N={n} {' '.join(f'{gain:g}' for gain in gains)}" for n, gains in by_factor.items()]
            lines.append(" ".join([f"{preset:12}", *settings, *(["octave_gains", ", ".join(gains)] if gains else [])]))
        if self.fit_scores:
            factors, count = ", ".join(map(str, self.fit_scores)), len(next(iter(self.fit_scores.values())))
            lines.append(f"check        {count} held-out images were scored at N={factors}")
        return lines


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Overrides:
    """The settings that a user gives because a third-party file does not contain them, under ADM's flag names.

    Args:
        given: name -> value.
        overridable: the names that may be given for this family of checkpoints, with their types.
        family: the name of the family.

    Raises:
        UserError: a name cannot be overridden, or a value is of another type.
    """

    def __init__(self, given: Mapping[str, Any] | None, overridable: Mapping[str, type], family: str) -> None:
        self.given = dict(given or {})
        self.assumed: list[str] = []
        for name, value in self.given.items():
            if name not in overridable:
                hint = did_you_mean(name[:100], list(overridable)) if overridable else "leave the override out"
                raise UserError(f"override {name[:100]}: a checkpoint of {family} has no such override; {hint}")
            if type(value) is not overridable[name]:
                raise UserError(f"override {name}: must be of type {overridable[name].__name__}: got {value!r}")

    def get(self, name: str, default: Any, reason: str) -> Any:
        """The given value, or else the default, which is noted as an assumption."""
        if name in self.given:
            return self.given[name]
        self.assumed.append(f"{name}={default} ({reason})")
        return default

    def diffusion(self, prediction: Literal["eps", "x0"] = "eps") -> DiffusionConfig:
        """The noise schedule, which no bare state dict contains, with what the network predicts.

        Raises:
            UserError: the given settings make none.
        """
        schedule = self.get("noise_schedule", "linear", "the published default")
        if schedule not in ("linear", "cosine"):
            raise UserError(f"override noise_schedule: must be linear or cosine: got {schedule!r}")
        T = self.get("diffusion_steps", 1000, "the published default")
        try:
            return DiffusionConfig(schedule=schedule, num_timesteps=T, prediction=prediction)
        except ValueError as error:
            raise UserError(f"override diffusion_steps: {error}") from None

    def image_size(self, channel_mult: tuple[int, ...], attention_levels: list[int]) -> int:
        """The image size in pixels: the published one for these multipliers, or else as if attention began at 16 px."""
        if channel_mult in FULL_SIZES:
            size, reason = FULL_SIZES[channel_mult], f"the published size for channel_mult {_written(channel_mult)}"
        else:
            first = min(attention_levels, default=len(channel_mult) - 1)
            size = min(max(16 << first, 2 ** (len(channel_mult) - 1)), MAX_SIDE)
            reason = "a guess, as if attention began at 16 px; override it if it is wrong"
        return int(self.get("image_size", size, reason))


def attention_widths(model: UNetConfig, image_height: int) -> set[int]:
    """The channels of the feature maps that have self-attention: at the chosen levels, and in the middle."""
    widths = [model.channels * mult for mult in model.channel_mult]
    at_levels = {width for i, width in enumerate(widths) if image_height // 2**i in model.attention_resolutions}
    return at_levels | {widths[-1]}


def multipliers(widths: list[int], channels: int) -> tuple[int, ...]:
    """The widths of the levels as multiples of the base width.

    Raises:
        UserError: they are no multiples.
    """
    if not channels or any(width % channels or not width for width in widths):
        raise UserError(
            f"a network with levels of {widths} channels does not load: they must be multiples of {channels}"
        )
    return tuple(width // channels for width in widths)


def add_override(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --override, for the settings that a third-party checkpoint does not contain."""
    parser.add_argument(
        "--override", type=_override, action="append", default=[], metavar="KEY=VALUE",
        help="a setting that a third-party checkpoint does not contain, under ADM's flag name, such as num_heads=4; "
        "may be given several times",
    )  # fmt: skip


def _override(text: str) -> tuple[str, int | bool | str]:
    """KEY=VALUE, whose value is an integer, true, false or a word."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"got {text!r}; give KEY=VALUE, such as num_heads=4")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        return key, int(value)
    except ValueError:
        return key, value
