"""SamplingPlan: all that a sampling run is told. Standard library only, so that a command line can read it at once."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args


def check_factor(factor: int, size: tuple[int, int], flag: str = "sampling.factor") -> None:
    """Raise a ValueError that names the nearest factors unless factor divides every side longer than 1."""
    sides = [side for side in size if side > 1]
    if factor >= 1 and all(side % factor == 0 for side in sides):
        return
    common = math.gcd(*sides) if sides else 1
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    nearest = [n for n in divisors if n < factor][-1:] + [n for n in divisors if n > factor][:1]
    pixels = f"{size[0]} px" if size[0] == size[1] else f"{size[0]}x{size[1]} px"
    verb = "the nearest that do are" if len(nearest) > 1 else "the nearest that does is"
    raise ValueError(
        f"{flag} must divide the image size: got factor={factor} for {pixels}; {verb} {' and '.join(map(str, nearest))}"
    )


Spacing = Literal["uniform", "quadratic", "logsnr"]


SamplerName = Literal["ddpm", "ddim", "dpmpp_2m"]


Kernel = Literal["cubic", "lanczos2", "lanczos3", "linear", "box", "ideal"]


Variance = Literal["auto", "small", "large", "learned"]


ReferenceNoise = Literal["fresh", "matched", "fixed", "fresh_released"]
Gains = tuple[float, ...]
"""One gain per octave, the finest last."""


CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": get_args(SamplerName),
    "spacing": get_args(Spacing),
    "variance": get_args(Variance),
    "kernel": get_args(Kernel),
    "reference_noise": get_args(ReferenceNoise),
}


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """Settings of one sampling run; every time is a training timestep, t=0 data and t=T noise.

    Raises:
        ValueError: a setting is out of its range; the message names it and what to give.
    """

    sampler: SamplerName = "ddpm"
    """ddpm: ancestral (Ho et al. 2020, algorithm 2); ddim: Song et al. 2021, equation 12; dpmpp_2m: DPM-Solver++(2M)
    (Lu et al. 2022)."""
    num_steps: int = 50
    """Network evaluations."""
    spacing: Spacing = "uniform"
    """How the evaluated timesteps are spread over 1..T."""
    eta: float = 0.0
    """Noise of ddim and dpmpp_2m: 0 deterministic, 1 the full stochastic step."""
    variance: Variance = "auto"
    """Of ddpm. small: the posterior's; large: beta; learned: the network's; auto: learned where there is one."""
    clip: bool = True
    """Clip the predicted x_0 to [-1, 1] before it is refined."""
    factor: int | tuple[int, ...] = 8
    """The paper's N: the low-pass filter's downsampling factor, one or one an image."""
    kernel: Kernel = "cubic"
    """Kernel of the low-pass filter; ideal is the DCT filter."""
    orthogonal: bool = False
    """Make the low-pass filter the orthogonal projection onto the same space."""
    reference_noise: ReferenceNoise = "fresh"
    """How the reference is noised: fresh draws anew at every step, at the level that the step goes to (Choi et al.
    2021, algorithm 1); matched takes the network's own eps; fixed has one noise for the run, x_T's; fresh_released
    draws anew, at the level that the step comes from, as the paper's released code does."""
    eps_extrapolation: float = 0.0
    """Of matched noise: how far it is extrapolated from the last two eps, 0 (not at all) to 1."""
    octave_gains: tuple[float, ...] = ()
    """What each octave of the predicted x_0 above the filter's frequencies is multiplied by, the finest last: a little
    over 1 against blur, under 1 against grain; where there are fewer than octaves, the coarsest are left alone."""
    condition_from: int | tuple[int, ...] | None = None
    """The paper's a: a step is conditioned when the timestep that it goes to is in [condition_to, condition_from];
    none means T."""
    condition_to: int | tuple[int, ...] = 0
    """The paper's b."""
    respaced_range_t: int | None = None
    """The released code's range_t: steps are counted from the last one, 0, and conditioned above this number alone."""
    start_from: int | None = None
    """Begin at this timestep from the noised reference in place of noise at T (SDEdit, Meng et al. 2022)."""
    exact_low_band: bool = False
    """At the end, move the picture until it is in [-1, 1] and, rounded to 8 bits and downsampled by N, equals the
    reference's to within 1/255."""
    timesteps: tuple[int, ...] | None = None
    """The evaluated timesteps, descending from at most T; overrides num_steps and spacing."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"sampling.{name} must be one of {', '.join(choices)}: got {getattr(self, name)!r}")
        if self.num_steps < 1:
            raise ValueError(f"sampling.num_steps must be at least 1: got {self.num_steps}")
        if not (math.isfinite(self.eta) and 0 <= self.eta <= 1):
            raise ValueError(f"sampling.eta must be between 0 and 1: got {self.eta}")
        if not (math.isfinite(self.eps_extrapolation) and 0 <= self.eps_extrapolation <= 1):
            raise ValueError(f"sampling.eps_extrapolation must be between 0 and 1: got {self.eps_extrapolation}")
        if self.eps_extrapolation and self.reference_noise != "matched":
            raise ValueError(
                "sampling.eps_extrapolation is of sampling.reference_noise=matched: "
                f"got {self.eps_extrapolation} with {self.reference_noise}"
            )
        for name in ("factor", "condition_to", "condition_from"):
            value = getattr(self, name)
            if value is not None and not all(isinstance(each, int) for each in as_tuple(value)):
                raise ValueError(f"sampling.{name} must be a whole number, or one an image: got {value!r}")
        if self.exact_low_band and self.kernel == "ideal":
            raise ValueError("sampling.exact_low_band is of a kernel that downsamples: got sampling.kernel=ideal")
        if self.exact_low_band and any(b > 0 for b in as_tuple(self.condition_to)):
            raise ValueError(
                "sampling.exact_low_band holds the reference to the end; give ranges that end at 0, as in 1000:0: "
                f"got one that ends at {max(as_tuple(self.condition_to))}"
            )
        for gain in (g for gains in per_image(self.octave_gains) for g in gains):
            if not isinstance(gain, int | float) or not 0.5 <= gain <= 2:
                raise ValueError(f"sampling.octave_gains must be between 0.5 and 2: got {gain}")
            if gain != 1 and any(n < 1 or n & (n - 1) for n in as_tuple(self.factor)):
                raise ValueError(f"sampling.octave_gains are for factors that are powers of two: got {self.factor}")
        for name in ("factor", "condition_to", "condition_from"):
            if getattr(self, name) == ():
                raise ValueError(f"sampling.{name} is an empty list; give one number, or one an image")
        for factor in as_tuple(self.factor):
            if factor < 1:
                raise ValueError(f"sampling.factor must be at least 1: got {factor}")
        if self.respaced_range_t is not None and self.respaced_range_t < 0:
            raise ValueError(f"sampling.respaced_range_t must be at least 0: got {self.respaced_range_t}")
        if self.timesteps is not None:
            steps = self.timesteps
            if not steps or steps[-1] < 1 or any(s >= t for t, s in pairwise(steps)):
                raise ValueError(f"sampling.timesteps must descend and end at 1 or above: got {list(steps)}")
        self._check_range()

    def _check_range(self) -> None:
        lows = as_tuple(self.condition_to)
        highs = lows if self.condition_from is None else as_tuple(self.condition_from)
        if len(lows) > 1 and len(highs) > 1 and len(lows) != len(highs):
            raise ValueError(
                "sampling.condition_from and sampling.condition_to must be one, or one an image: "
                f"got {len(highs)} and {len(lows)} values"
            )
        for low in lows:
            if low < 0:
                raise ValueError(f"sampling.condition_to must be at least 0: got {low}")
            if min(highs) < low and (len(lows) == 1 or len(highs) == 1):
                raise ValueError(
                    f"the range is reversed: sampling.condition_from={min(highs)} is below "
                    f"sampling.condition_to={low}; give the larger timestep first (condition_from, the paper's a)"
                )
        if len(lows) == len(highs) and any(a < b for a, b in zip(highs, lows, strict=True)):
            raise ValueError("the range is reversed: a sampling.condition_from is below its sampling.condition_to")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "SamplingPlan":
        """A named plan, with changes.

        Args:
            name: "fast" (20 evaluations of the stochastic 2M with matched noise), "draft" (10 of them), "paper" (every
                timestep, fresh noise, bicubic: Choi et al. 2021) or "ilvr_adm" (what the paper's released code
                computes, its faults included). ilvr_adm has 100 uniform steps; another timestep_respacing of ADM's is
                timesteps=respaced_timesteps(T, "ddim50"). Where a network learned no variance ADM's scripts take
                variance="large", which no file tells.
            **changes: fields to set otherwise.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def resolved(self, num_timesteps: int) -> "SamplingPlan":
        """This plan with what depends on T filled in (num_steps of "paper", condition_from) and checked.

        Raises:
            ValueError: a timestep lies outside [0, T], or there are more steps than timesteps.
        """
        T = num_timesteps
        num_steps = (self.start_from or T) if self.num_steps >= EVERY_TIMESTEP else self.num_steps
        if self.timesteps is not None:
            num_steps = len(self.timesteps)
        if self.start_from is not None and not 1 <= self.start_from <= T:
            raise ValueError(f"sampling.start_from must be in [1, {T}]: got {self.start_from}")
        if self.start_from is not None and self.timesteps is not None and self.timesteps[0] != self.start_from:
            raise ValueError(
                f"sampling.timesteps must begin with sampling.start_from={self.start_from}: got {self.timesteps[0]}"
            )
        start, name = (T, "T") if self.start_from is None else (self.start_from, "sampling.start_from")
        if num_steps > start:
            raise ValueError(f"sampling.num_steps must be at most {name}={start}: got {num_steps}")
        if self.timesteps is not None and self.timesteps[0] > T:
            raise ValueError(f"sampling.timesteps must start at T={T} or below: got {self.timesteps[0]}")
        if self.respaced_range_t is not None and self.respaced_range_t >= num_steps:
            raise ValueError(
                f"sampling.respaced_range_t must be below the number of steps, {num_steps}: got {self.respaced_range_t}"
            )
        condition_from = T if self.condition_from is None else self.condition_from
        for field, value in (("condition_from", condition_from), ("condition_to", self.condition_to)):
            for t in as_tuple(value):
                if not 0 <= t <= T:
                    raise ValueError(f"sampling.{field} must be in [0, {T}]: got {t}")
        return dataclasses.replace(self, num_steps=num_steps, condition_from=condition_from)


EVERY_TIMESTEP = 1_000_000
"""A num_steps that stands for the checkpoint's own T, whatever it is."""


STOCHASTIC_2M: dict[str, Any] = {
    "sampler": "dpmpp_2m",
    "spacing": "logsnr",
    "eta": 1.0,
    "orthogonal": True,
    "reference_noise": "matched",
}
"""Fresh noise in the high band, the network's own in the low: measured in docs/samplers.md."""


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {**STOCHASTIC_2M, "num_steps": 20},
    "draft": {**STOCHASTIC_2M, "num_steps": 10},
    "paper": {"num_steps": EVERY_TIMESTEP},
    "ilvr_adm": {"num_steps": 100, "reference_noise": "fresh_released", "respaced_range_t": 0},
}


DEFAULT_PRESET = "fast"
"""Of sample.py and of the grids."""


def as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """A setting that may be one or one an image, as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)


def per_image(gains: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
    """octave_gains as a batch has them: one list for all, or one an image."""
    nested = [isinstance(g, tuple | list) for g in gains]
    return tuple(map(tuple, gains)) if nested and all(nested) else (tuple(gains),)
