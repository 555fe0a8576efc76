"""Calibration: what the presets leave to each network, found on held-out images of its domain."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.diffusion.components import Components
from ilvr_lightning.diffusion.denoiser import Denoise, Denoiser
from ilvr_lightning.diffusion.generate import DenoiseWithSchedule, generate
from ilvr_lightning.diffusion.low_band import radial_spectrum
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, FitScores, Gains, SamplingPlan, as_tuple
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics.bands import energy_scores, octave_energies
from ilvr_lightning.metrics.fit import fit_scores

CALIBRATED_PRESETS = ("fast", "draft")
"""The presets that are calibrated; `best` takes what is found for `fast` (checkpoints.description.CALIBRATED_AS)."""
GAIN_CHOICES = (
    (0.0, 1.0, 0.0), (2.0, 0.0, 0.75), (4.0, 0.0, 0.75), (8.0, 0.0, 0.75), (16.0, 0.0, 0.75), (1000.0, 1.0, 0.75),
)  # fmt: skip
"""The settings of matched noise that are tried: low_band_gain, low_band_decay and eps_extrapolation. Where the images'
components are known, each is tried with the correction of the high band, and the first without it, too."""
CHOICE_FACTOR, CHOICE_IMAGES = 8, 32
"""They are tried at this N, on so many images."""
PROBE = 0.01
"""Step of a gain by which the slope is measured."""
MAX_CHANGE = 0.05
"""A gain stays within this distance of 1."""
MIN_SLOPE = 5.0
"""The least slope of log-energy against the gain that is accepted; it is about 15 at 20 evaluations."""


def calibrate(
    denoise: Denoise,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    factors: Sequence[int],
    images: Tensor,
    seeds: Sequence[int],
    batch: int = 64,
) -> dict[int, Gains]:
    """The octave_gains at which samples have, octave by octave, the energy of their references.

    A secant step in the logarithm of the energies, which grow by a constant factor for each hundredth of gain. The
    slope is measured at the largest factor, which has all octaves, and used at the others.

    Args:
        denoise: the network as a callable.
        schedule: the denoiser's.
        plan: the settings; its factor and octave_gains are ignored.
        factors: powers of two.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain, one sample each.
        seeds: one per image.
        batch: images sampled at once.

    Returns:
        The gains of each factor, the finest octave last.
    """

    def excess(factor: int, gains: Tensor) -> Tensor:
        changed = replace(plan, factor=factor, octave_gains=tuple(gains.tolist()))
        made = _samples(denoise, schedule, changed, images, seeds, batch)
        energies = octave_energies(made.clamp(-1, 1), images, factor)
        return torch.tensor(energies, dtype=torch.float64).clamp(1e-6, 1e6).log().nan_to_num(0.0)

    found: dict[int, Gains] = {}
    slopes = torch.empty(0)
    for factor in sorted(factors, reverse=True):
        ones = torch.ones(factor.bit_length() - 1, dtype=torch.float64)
        before = excess(factor, ones)
        if not len(slopes):
            probe = torch.where(before < 0, PROBE, -PROBE)
            slopes = ((excess(factor, ones + probe) - before) / probe).clamp(min=MIN_SLOPE)
        slope = slopes[len(slopes) - len(ones) :]
        gains = (ones - before / slope).clamp(1 - MAX_CHANGE, 1 + MAX_CHANGE)
        gains = (gains - excess(factor, gains) / slope).clamp(1 - MAX_CHANGE, 1 + MAX_CHANGE)
        found[factor] = tuple(round(gain, 4) for gain in gains.tolist())
    return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """What held-out images say of a network."""

    spectrum: tuple[float, ...]
    """Variance of the images' DCT coefficients by radius."""
    components: Components | None
    """The training images' principal components."""
    low_band: dict[str, dict[str, float]]
    """LOW_BAND_FIELDS by preset."""
    octave_gains: dict[str, dict[int, Gains]]
    """By preset and factor."""
    fit_scores: FitScores
    """Scores of held-out images by factor, see metrics/fit.py."""


def calibrate_presets(
    denoiser: Denoiser,
    images: Tensor,
    components: Components | None = None,
    scored: Tensor | None = None,
    *,
    seed: int = 0,
    clip: bool = True,
    batch: int = 64,
    say: Callable[[str], object] = lambda line: None,
) -> CalibrationResult:
    """Choose the settings of matched noise of each of CALIBRATED_PRESETS, then its octave_gains.

    The gains are for the factors that are powers of two. Then score how well held-out images fit, for check_reference.

    Args:
        denoiser: the network; its spectrum becomes that of the images.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain.
        components: those of the training images, without which the high band is not corrected.
        scored: (B, C, H, W) further held-out images, whose scores check_reference compares references with; without
            them it is `images`.
        seed: seed of the noise.
        clip: whether the plans clip x_0.
        batch: images sampled at once.
        say: is told what was chosen, and by how much it was better.
    """
    if len(images) < 2:
        say("nothing was calibrated: it takes at least two held-out images")
        return CalibrationResult(spectrum=(), components=components, low_band={}, octave_gains={}, fit_scores={})
    schedule = denoiser.schedule
    denoiser.spectrum = tuple(float(f"{variance:.4g}") for variance in radial_spectrum(images))
    denoiser.components = components
    seeds = [derive_seed(seed, "calibration", i) for i in range(2 * len(images))]
    height, width = images.shape[2:]
    factors = [n for n in (2, 4, 8, 16, 32, 64) if height % n == width % n == 0 and 2 * n <= min(height, width)]
    low_band: dict[str, dict[str, float]] = {}
    octave_gains: dict[str, dict[int, Gains]] = {}
    for preset in CALIBRATED_PRESETS if factors else ():
        plan = SamplingPlan.preset(preset, clip=clip)
        if plan.evaluations > schedule.num_timesteps:
            continue
        factor = max(n for n in factors if n <= CHOICE_FACTOR)
        few = images[:CHOICE_IMAGES]
        low_band[preset], better = choose_low_band(denoiser, replace(plan, factor=factor), few, seeds, batch)
        say(f"{preset:12} " + " ".join(f"{k}={v:g}" for k, v in low_band[preset].items()) + f" ({better})")
        changes: dict[str, Any] = low_band[preset]
        plan = replace(plan, **changes)
        octave_gains[preset] = calibrate(denoiser, schedule, plan, factors, images, seeds[: len(images)], batch)
    scores = fit_scores(denoiser, images if scored is None or not len(scored) else scored, batch)
    return CalibrationResult(
        spectrum=denoiser.spectrum, components=components, low_band=low_band, octave_gains=octave_gains,
        fit_scores=scores,
    )  # fmt: skip


def choose_low_band(
    denoiser: DenoiseWithSchedule, plan: SamplingPlan, images: Tensor, seeds: Sequence[int], batch: int = 64
) -> tuple[dict[str, float], str]:
    """The settings of matched noise with the lowest energy score of the high band, two samples per image.

    Settings whose score is within one standard error of the lowest (of the differences, image by image) are as good: of
    those, the first of GAIN_CHOICES is taken.

    Args:
        denoiser: the network, with the spectrum of its images.
        plan: with one factor.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain.
        seeds: two per image.
        batch: images sampled at once.

    Returns:
        LOW_BAND_FIELDS, and in words how much lower their score is than without a gain.
    """
    (factor,) = as_tuple(plan.factor)
    twice = images.repeat_interleave(2, 0)

    def scores(*values: float) -> Tensor:
        changes: dict[str, Any] = dict(zip(LOW_BAND_FIELDS, values, strict=True))
        made = _samples(denoiser, denoiser.schedule, replace(plan, **changes), twice, seeds, batch)
        return energy_scores(made.clamp(-1, 1).reshape(-1, 2, *images.shape[1:]), images, factor)

    corrects = getattr(denoiser, "components", None) is not None
    choices = [(*GAIN_CHOICES[0], 0.0)] + [
        (*choice, float(corrects)) for choice in GAIN_CHOICES[0 if corrects else 1 :]
    ]
    tried = [scores(*choice) for choice in choices]
    best = min(tried, key=lambda score: float(score.mean()))
    number = next(i for i, score in enumerate(tried) if _is_as_good(score, best))
    mean, error = (100 * value / float(tried[0].mean()) for value in _mean_and_error(tried[0] - tried[number]))
    settings = dict(zip(LOW_BAND_FIELDS, choices[number], strict=True))
    return settings, f"energy score lower by {mean:.1f}% ±{error:.1f}"


def _is_as_good(score: Tensor, other: Tensor) -> bool:
    """Whether a score is not above another by more than one standard error."""
    mean, error = _mean_and_error(score - other)
    return mean <= error


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _samples(
    denoise: Denoise, schedule: NoiseSchedule, plan: SamplingPlan, images: Tensor, seeds: Sequence[int], batch: int
) -> Tensor:
    """One sample per image and seed."""
    return torch.cat(
        [
            generate(
                denoise, schedule, plan, seeds=seeds[i : i + batch][: len(images) - i],
                shape=(images.shape[1], images.shape[2], images.shape[3]), reference=images[i : i + batch],
                device=images.device,
            )
            for i in range(0, len(images), batch)
        ]
    )  # fmt: skip
