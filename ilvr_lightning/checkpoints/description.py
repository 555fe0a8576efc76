"""What a checkpoint turned out to be."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ilvr_lightning.config.schema import MAX_SIDE, DiffusionConfig
from ilvr_lightning.diffusion.plan import Gains
from ilvr_lightning.errors import UserError, did_you_mean
from ilvr_lightning.models.config import UNetConfig

FULL_SIZES = {(1, 1, 2, 2, 4, 4): 256, (1, 1, 2, 3, 4): 128, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32}
"""Image size by multipliers, in the published tables of ADM and improved-diffusion."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A checkpoint's hyper-parameters, whoever wrote it."""

    kind: str
    """What it was recognised as, in words."""
    model: UNetConfig
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    diffusion: DiffusionConfig
    clip: bool = True
    """Whether its own sampler clips the predicted x_0."""
    assumed: tuple[str, ...] = ()
    """What the file does not tell, as name=value (why)."""
    config: dict[str, Any] | None = None
    """The whole configuration of the run that trained it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of its training: step, val_loss."""
    octave_gains: dict[str, dict[int, Gains]] = field(default_factory=dict)
    """By preset and factor, what gives the octaves above the filter's frequencies the energy of real images."""

    @property
    def assumed_names(self) -> set[str]:
        """Names of what was assumed."""
        return {assumption.partition("=")[0] for assumption in self.assumed}

    def lines(self) -> list[str]:
        """The description for a reader, a line each."""
        height, width = self.image_shape[1:]
        defaults = UNetConfig()
        always = ("channels", "channel_mult", "num_res_blocks", "attention_resolutions", "learn_sigma")
        model = [
            f"{f.name}={_short(getattr(self.model, f.name))}"
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


def gain_lines(description: ModelDescription) -> list[str]:
    """octave_gains for a reader, a line a preset."""
    lines = []
    for preset, by_factor in description.octave_gains.items():
        each = [f"N={n} {' '.join(f'{gain:g}' for gain in gains)}" for n, gains in by_factor.items()]
        lines.append(f"{preset:12} octave_gains {', '.join(each)}")
    return lines


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Overrides:
    """A user's word for what a foreign file cannot tell, under ADM's flag names.

    Args:
        given: name -> value.
        known: the names that this kind of file leaves open, with the type of each.
        kind: the kind of file.

    Raises:
        UserError: a name that is not open, or a value of another type.
    """

    def __init__(self, given: dict[str, Any] | None, known: dict[str, type], kind: str) -> None:
        self.given = dict(given or {})
        self.assumed: list[str] = []
        for name, value in self.given.items():
            if not isinstance(name, str) or name not in known:
                name = str(name)
                hint = did_you_mean(name, list(known)) if known else "the file tells all by itself; leave overrides out"
                raise UserError(f"overrides[{name!r}] is not open in {kind}: {hint}")
            if type(value) is not known[name]:
                raise UserError(f"overrides[{name!r}] must be of type {known[name].__name__}: got {value!r}")

    def take(self, name: str, default: Any, why: str) -> Any:
        """The given value, else the default, which is noted as an assumption."""
        if name in self.given:
            return self.given[name]
        self.assumed.append(f"{name}={default} ({why})")
        return default

    def diffusion(self, **settings: Any) -> DiffusionConfig:
        """The schedule, which no state dict tells."""
        name, known = self.given.get("noise_schedule", "linear"), ("linear", "cosine")
        if name not in known:
            raise UserError(f"overrides['noise_schedule'] must be {' or '.join(known)}: got {name!r}")
        try:
            return DiffusionConfig(
                schedule=self.take("noise_schedule", "linear", "the published default"),
                num_timesteps=self.take("diffusion_steps", 1000, "the published default"),
                **settings,
            )
        except ValueError as error:
            raise UserError(f"overrides: {error}") from None

    def image_size(self, channel_mult: tuple[int, ...], attention_levels: list[int]) -> int:
        """By the published tables; else as if attention began at 16 px."""
        if channel_mult in FULL_SIZES:
            size, why = FULL_SIZES[channel_mult], f"the published size for channel_mult {_short(channel_mult)}"
        else:
            first = min(attention_levels, default=len(channel_mult) - 1)
            size = max(16 << first, 2 ** (len(channel_mult) - 1))
            why = "a guess: as if attention began at 16 px; tell it if it is another"
        size = self.take("image_size", size, why)
        multiple = 2 ** (len(channel_mult) - 1)
        if size < 1 or size % multiple or size > MAX_SIDE:
            raise UserError(f"overrides['image_size'] must be a multiple of {multiple}, up to {MAX_SIDE}: got {size}")
        return int(size)


def multipliers(widths: list[int], channels: int) -> tuple[int, ...]:
    """Widths of the levels as multiples of the first.

    Raises:
        UserError: they are none.
    """
    if not channels or any(width % channels or not width for width in widths):
        raise UserError(f"a network with levels of {widths} channels: they must be multiples of {channels}")
    return tuple(width // channels for width in widths)


def model_config(**settings: Any) -> UNetConfig:
    """A UNetConfig from a file's or a user's numbers.

    Raises:
        UserError: they make none.
    """
    try:
        return UNetConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"the checkpoint's hyper-parameters make no network: {error}") from None


def add_override(parser: argparse.ArgumentParser) -> None:
    """The flag for what a foreign checkpoint cannot tell."""
    parser.add_argument(
        "--override", type=_override, action="append", default=[], metavar="KEY=VALUE",
        help="what a foreign checkpoint cannot tell, under ADM's flag names, as num_heads=4; as often as needed",
    )  # fmt: skip


def _override(text: str) -> tuple[str, int | bool | str]:
    """KEY=VALUE with a whole number, true, false or a word for its value."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"got {text!r}; give KEY=VALUE, as in num_heads=4")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        return key, int(value)
    except ValueError:
        return key, value
