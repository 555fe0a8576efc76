"""SamplingPlan: every setting of a sampling run. Standard library only, so that a command line can read it at once."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

Spacing = Literal["uniform", "quadratic", "logsnr"]
Kernel = Literal["cubic", "lanczos2", "lanczos3", "linear", "box", "ideal"]
Variance = Literal["auto", "small", "large", "learned"]
ReferenceNoise = Literal["fresh", "matched", "fixed", "fresh_released"]
Gains = tuple[float, ...]
"""One gain per octave, the finest last."""
FitScores = dict[int, tuple[tuple[float, ...], ...]]
"""For each factor N, image by image and octave by octave, how well held-out images fit; see metrics/fit.py."""
MAX_SCORED = 256  # held-out images whose scores a calibration keeps
MAX_CANDIDATES = 1000
"""The most runs per image."""
LOW_BAND_FIELDS = ("low_band_gain", "low_band_decay", "eps_extrapolation", "high_band_correction")
"""The settings of matched noise, which `calibrate` chooses for a network."""
SAMPLER_SETTINGS: dict[str, tuple[str, ...]] = {"ddpm": ("variance",), "ddim": ("eta",), "dpmpp_2m": ("eta",)}
"""The samplers, each with the settings that only some samplers read; samplers.py has a function of each name."""
CHOICES: dict[str, tuple[str, ...]] = {
    "spacing": get_args(Spacing),
    "variance": get_args(Variance),
    "kernel": get_args(Kernel),
    "reference_noise": get_args(ReferenceNoise),
}


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """Settings of one sampling run. Times are training timesteps, t=0 is data and t=T noise.

    The defaults are the preset "fast".

    Raises:
        ValueError: a setting is out of its range; the message names it and what to give.
    """

    sampler: str = "dpmpp_2m"
    """ddpm: ancestral sampling (Ho et al. 2020, algorithm 2); ddim (Song et al. 2021, equation 12); dpmpp_2m:
    DPM-Solver++(2M) (Lu et al. 2022)."""
    num_steps: int | Literal["all"] = 20
    """Number of sampling steps, each one evaluation of the network; all visits every timestep."""
    spacing: Spacing = "logsnr"
    """How the visited timesteps are spread over 1..T: uniform or quadratic in t, or uniform in the log-SNR."""
    eta: float = 1.0
    """Noise of the samplers ddim and dpmpp_2m: 0 is deterministic, 1 is the full stochastic step."""
    variance: Variance = "auto"
    """Variance of the sampler ddpm: small (the posterior's), large (beta), learned (the network's); auto takes the
    learned one where the network has it, else small."""
    clip: bool = True
    """Clip the predicted x_0 to [-1, 1] before the reference is applied."""
    factor: int | tuple[int, ...] = 8
    """The paper's N, the downsampling factor of the low-pass filter; one value, or one per image."""
    kernel: Kernel = "cubic"
    """Kernel of the low-pass filter; ideal is a sharp cut in the DCT."""
    orthogonal: bool = True
    """Replace the low-pass filter by the orthogonal projection onto the same space."""
    reference_noise: ReferenceNoise = "matched"
    """Noise of the reference at each step: fresh noise at the level that the step goes to (Choi et al. 2021, algorithm
    1); matched to the eps that the network predicts; fixed, the noise that makes x_T of the reference; fresh_released,
    fresh noise at the level that the step comes from, as the paper's released code has it."""
    eps_extrapolation: float = 0.0
    """How far matched noise is extrapolated from the last two eps: 0 (not at all) to 1."""
    low_band_gain: float = 0.0
    """Largest gain of matched noise (docs/research.md). 0 takes the network's eps as it is. Larger gains find the
    reference's mode in fewer steps, but need a more accurate network."""
    low_band_decay: float = 1.0
    """How fast the multiplier of the gain decays from one timestep to the next: 0 (not at all) to 1."""
    high_band_correction: float = 0.0
    """How much the high band of the predicted x_0 is corrected, by its regression on the error of the low band: 0 (not
    at all) to 1. The checkpoint must hold the principal components of its training images."""
    reference_sigma: float | tuple[float, ...] = 0.0
    """Standard deviation of the noise that the reference itself has, for pixels in [-1, 1]. Its low frequencies are
    followed only up to this noise. One value, or one per image."""
    candidates: int = 1
    """Number of runs per image. One is kept, with a probability in proportion to its evidence: how well the network's
    predictions agreed with the reference (docs/research.md). K runs cost K times the evaluations."""
    octave_gains: tuple[float, ...] = ()
    """Multipliers of the octaves of the predicted x_0 above the filter's frequencies, the finest last. Above 1 reduces
    blur, below 1 reduces grain. With fewer gains than octaves, the coarsest octaves are not changed."""
    condition_from: int | tuple[int, ...] | None = None
    """The paper's a: a step is conditioned if the timestep that it goes to is in [condition_to, condition_from].
    Default: T. One value, or one per image."""
    condition_to: int | tuple[int, ...] = 0
    """The paper's b; one value, or one per image."""
    respaced_range_t: int | None = None
    """range_t of the paper's released code: with steps counted down to 0, a step is conditioned above this number."""
    start_from: int | None = None
    """Start at this timestep from the noised reference, in place of T and noise (SDEdit, Meng et al. 2022)."""
    exact_low_band: bool = False
    """At the end, change the image as little as possible so that it is in [-1, 1] and, rounded to 8 bits and
    downsampled by N, equals the downsampled reference to within 1/255."""
    timesteps: tuple[int, ...] | None = None
    """The visited timesteps, descending from at most T; they replace num_steps and spacing."""

    def __post_init__(self) -> None:
        for name, choices in {"sampler": tuple(SAMPLER_SETTINGS), **CHOICES}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"sampling.{name} must be one of {', '.join(choices)}: got {getattr(self, name)!r}")
        if self.num_steps != "all" and self.num_steps < 1:
            raise ValueError(f"sampling.num_steps must be at least 1: got {self.num_steps}")
        if not 1 <= self.candidates <= MAX_CANDIDATES:
            raise ValueError(f"sampling.candidates must be from 1 to {MAX_CANDIDATES}: got {self.candidates}")
        for name in ("eta", "eps_extrapolation", "low_band_decay", "high_band_correction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"sampling.{name} must be between 0 and 1: got {getattr(self, name)}")
        if not (math.isfinite(self.low_band_gain) and self.low_band_gain >= 0):
            raise ValueError(f"sampling.low_band_gain must be at least 0: got {self.low_band_gain}")
        for name in ("low_band_gain", "high_band_correction"):
            value = getattr(self, name)
            if value and self.reference_noise != "matched":
                raise ValueError(
                    f"sampling.{name} needs sampling.reference_noise=matched: got {value} with {self.reference_noise}"
                )
            if value and not self.orthogonal and self.kernel != "ideal":
                raise ValueError(f"sampling.{name} needs sampling.orthogonal=true: got false")
        if self.eps_extrapolation and self.reference_noise != "matched":
            raise ValueError(
                "sampling.eps_extrapolation needs sampling.reference_noise=matched: "
                f"got {self.eps_extrapolation} with {self.reference_noise}"
            )
        for sigma in sigmas_per_image(self.reference_sigma):
            if not (math.isfinite(sigma) and 0 <= sigma <= 2):
                raise ValueError(f"sampling.reference_sigma must be between 0 and 2: got {sigma}")
            if sigma and self.exact_low_band:
                raise ValueError("sampling.exact_low_band keeps a reference's noise: give no sampling.reference_sigma")
        for name in ("factor", "condition_to", "condition_from"):
            value = getattr(self, name)
            if value is not None and not all(isinstance(each, int) for each in as_tuple(value)):
                raise ValueError(f"sampling.{name} must be an integer, or one per image: got {value!r}")
        if self.exact_low_band and self.kernel == "ideal":
            raise ValueError("sampling.exact_low_band needs a kernel that downsamples: got sampling.kernel=ideal")
        if self.exact_low_band and any(b > 0 for b in as_tuple(self.condition_to)):
            raise ValueError(
                "sampling.exact_low_band keeps the reference to the end and needs ranges that end at 0, as in 1000:0: "
                f"got one that ends at {max(as_tuple(self.condition_to))}"
            )
        gains, factors = gains_per_image(self.octave_gains), as_tuple(self.factor) or (1,)
        for i in range(max(len(gains), len(factors))):
            n = factors[i % len(factors)]
            for gain in gains[i % len(gains)]:
                if not isinstance(gain, int | float) or not 0.5 <= gain <= 2:
                    raise ValueError(f"sampling.octave_gains must be between 0.5 and 2: got {gain}")
                if gain != 1 and (n < 1 or n & (n - 1)):
                    raise ValueError(f"sampling.octave_gains need factors that are powers of two: got {self.factor}")
        for name in ("factor", "condition_to", "condition_from"):
            if getattr(self, name) == ():
                raise ValueError(f"sampling.{name} is an empty list; give one number, or one per image")
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
                "sampling.condition_from and sampling.condition_to must be one, or one per image: "
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
        """A named plan with changes.

        Args:
            name: "fast" (20 steps of the stochastic 2M with matched noise, the default), "draft" (10 of them), "best"
                (50 of them), "paper" (every timestep, fresh noise, the bicubic filter: Choi et al. 2021) or "ilvr_adm"
                (what the paper's released code computes with 100 respaced steps, its deviations from the paper
                included). For another timestep_respacing of ADM's give timesteps=respaced_timesteps(T, "ddim50"). For
                networks that learned no variance ADM's scripts take variance="large", which no checkpoint says.
            **changes: fields that differ.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def evaluations(self) -> int:
        """How often a resolved plan evaluates the network per image; see `steps`."""
        return self.candidates * self.steps

    @property
    def steps(self) -> int:
        """Number of sampling steps of a resolved plan.

        Raises:
            ValueError: the number depends on T, and the plan is not resolved.
        """
        if self.timesteps is not None:
            return len(self.timesteps)
        if self.num_steps == "all":
            raise ValueError("sampling.num_steps=all depends on T; call resolved(T) first")
        return self.num_steps

    def resolved(self, num_timesteps: int) -> "SamplingPlan":
        """This plan with what depends on T filled in (num_steps="all", condition_from) and checked.

        Raises:
            ValueError: a timestep lies outside [0, T], or there are more steps than timesteps.
        """
        T = num_timesteps
        num_steps = (self.start_from or T) if self.num_steps == "all" else self.num_steps
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


FORMER_DEFAULTS: dict[str, Any] = {
    "sampler": "ddpm", "num_steps": 50, "spacing": "uniform", "eta": 0.0, "orthogonal": False,
    "reference_noise": "fresh",
}  # fmt: skip
"""Defaults that have changed: what a field means that an old PNG lacks, and the basis of the paper's presets."""
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "draft": {"num_steps": 10},
    "best": {"num_steps": 50},
    "paper": {**FORMER_DEFAULTS, "num_steps": "all"},
    "ilvr_adm": {**FORMER_DEFAULTS, "num_steps": 100, "reference_noise": "fresh_released", "respaced_range_t": 0},
}
DEFAULT_PRESET = "fast"
"""The preset of sample.py and of the grids."""


def as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """A setting that is one value, or one per image, as a tuple."""
    return tuple(value) if isinstance(value, Sequence) else (value,)


def sigmas_per_image(sigma: float | tuple[float, ...]) -> tuple[float, ...]:
    """reference_sigma as a tuple: one for all images, or one per image."""
    return (sigma,) if isinstance(sigma, int | float) else tuple(sigma)


def gains_per_image(gains: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
    """octave_gains of a batch: one list for all images, or one per image."""
    nested = [isinstance(g, tuple | list) for g in gains]
    return tuple(map(tuple, gains)) if nested and all(nested) else (tuple(gains),)


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
