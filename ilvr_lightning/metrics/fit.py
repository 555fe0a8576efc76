"""Does a reference fit: can the network make an image of its domain that has the reference's low frequencies?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import DenoiseWithSchedule, generate_steps
from ilvr_lightning.diffusion.low_band import LowBand
from ilvr_lightning.diffusion.low_pass import cast_like
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import FitScores, SamplingPlan

PLAN = SamplingPlan(num_steps=10, low_band_gain=4.0, low_band_decay=1.0)
"""The run of ILVR whose first steps are watched."""
FIRST, LAST = 4, 7
"""Its steps that count; it ends after the last of them."""
ALPHA = 0.05
"""A reference is said not to fit where it is less probable than this among images of the domain."""
FACTORS = (2, 4, 8, 16, 32, 64)
"""The factors that are calibrated, where they divide the sides and leave two pixels of each."""
MUCH = 1.5
"""An octave with so many times the energy of the training images has too much detail."""
LEAST = 4
"""A smaller N is never advised: its samples are hardly more than copies."""
KEPT = 4
"""The N that is advised keeps so many pixels of a reference in each direction; of fewer, nobody recognises it."""


class Checkable(DenoiseWithSchedule, Protocol):
    """A denoiser that knows how well held-out images of its domain fit, as those of load_denoiser do."""

    @property
    def spectrum(self) -> tuple[float, ...]: ...

    @property
    def fit_scores(self) -> FitScores: ...


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a reference fits at a factor."""

    factor: int
    """N."""
    p: float
    """If the reference were an image of the domain, one of the factors asked for would have a p this small with at
    most this probability."""
    fits: bool
    """Whether p is above alpha."""
    reason: str
    """What does not fit, in words; empty where it fits."""

    def __str__(self) -> str:
        return f"fits (p = {self.p:.2g})" if self.fits else f"does not fit (p = {self.p:.2g}: {self.reason})"


def usable_factors(size: tuple[int, int]) -> list[int]:
    """Those of FACTORS that can be calibrated for images of a height and width."""
    return [n for n in FACTORS if all(side % n == 0 and side >= 2 * n for side in size)]


def misfits(denoise: Checkable, images: Tensor, factors: Sequence[int], batch: int = 64) -> dict[int, Tensor]:
    """How far the network's images stay from references as they are steered towards them.

    While ILVR runs, the low band of E[x_0 | x_t] comes to agree with the reference's if there is such an image in the
    domain. The difference d, divided by the deviation 1 / sqrt(1 / C + snr) that it would have if all were Gaussian, is
    averaged over the steps FIRST to LAST.

    Args:
        denoise: the network, with the spectrum C of its training images.
        images: (B, C, H, W) in [-1, 1].
        factors: N.
        batch: images sampled at once.

    Returns:
        For each factor (B, octaves) mean squares, the mean colour first, then octave by octave to the finest.
    """
    return {
        factor: torch.cat([_misfit(denoise, part, factor) for part in torch.split(images, batch)]) for factor in factors
    }


class _Watch:
    """A denoiser that notes what it says of the low band at each step."""

    def __init__(self, denoise: Checkable, y: Tensor, factor: int) -> None:
        self.schedule, self.spectrum, self._denoise = denoise.schedule, denoise.spectrum, denoise
        self._band = LowBand((y.shape[2], y.shape[3]), factor, PLAN.kernel)
        self._target = self._band.coordinates(y)
        self._inverse = 1 / cast_like(self._band.variances(denoise.spectrum), y)
        self._octaves = octaves_of(self._target.shape[-2], self._target.shape[-1]).to(y.device)
        self.noted: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        prediction = self._denoise(x, t)
        snr = math.exp(2 * float(self.schedule.log_snr_half[int(t[0])]))
        d = self._target - self._band.coordinates(prediction.x0.clamp(-1, 1))
        square = (d.square() * (self._inverse + snr)).mean(1).flatten(1)
        count = torch.bincount(self._octaves)
        sums = torch.zeros(len(x), len(count), device=x.device).index_add_(1, self._octaves, square)
        self.noted.append(sums / count)
        return prediction


def fit_scores(denoise: Checkable, images: Tensor, batch: int = 64) -> FitScores:
    """The scores of held-out images (B, C, H, W) in [-1, 1] at all usable factors, for a checkpoint to keep.

    There are none for a network of fewer timesteps than PLAN has.
    """
    if denoise.schedule.num_timesteps < PLAN.steps:
        return {}
    found = misfits(denoise, images, usable_factors((images.shape[2], images.shape[3])), batch)
    return {n: tuple(tuple(float(f"{s:.3g}") for s in octaves) for octaves in of.tolist()) for n, of in found.items()}


def octaves_of(height: int, width: int) -> Tensor:
    """(height * width,) the octave of each coordinate of a low band: 0 the mean, k the frequencies 2^(k-1) to 2^k."""
    rows, columns = (torch.arange(n, dtype=torch.float64) / n for n in (height, width))
    frequency = max(height, width) * torch.maximum(rows[:, None], columns).flatten()
    return torch.where(frequency < 0.5, 0, frequency.clamp(min=0.5).log2().floor().long() + 1)


def _misfit(denoise: Checkable, y: Tensor, factor: int) -> Tensor:
    watch = _Watch(denoise, y, factor)
    # One noise for all images: then a score depends neither on the order nor on the batch.
    seeds = [derive_seed(0, "fit", factor)] * len(y)
    plan, shape = replace(PLAN, factor=factor), (y.shape[1], y.shape[2], y.shape[3])
    for _ in generate_steps(watch, plan, seeds=seeds, shape=shape, reference=y, device=y.device):
        if len(watch.noted) == LAST:
            break
    return torch.stack(watch.noted[FIRST - 1 :]).mean(0)


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """(K,) split-conformal p values, corrected for the number of looks K.

    At most a share alpha of images that are exchangeable with the calibration images have any p of alpha or less,
    whatever the scores and however they depend on each other: the least rank of the image among its K looks is itself
    ranked. With one look that is the usual (1 + #{calibration >= score}) / (n + 1).

    Args:
        scores: (K,).
        calibration: (n, K) scores of other images.
    """
    everything = torch.cat([calibration, scores[None]])
    ranks = (everything[None] >= everything[:, None]).sum(1)  # (n + 1, K): 1 is the largest
    least = ranks.min(1).values
    return (least[:, None] <= ranks[-1]).double().mean(0)


def are_enough(scores: FitScores, alpha: float = ALPHA) -> bool:
    """Whether so many held-out images were scored that a p value can be as small as alpha."""
    return len(next(iter(scores.values()), ())) >= 1 / alpha - 1


def check_reference(
    denoise: Checkable, reference: Tensor, factors: Sequence[int] | None = None, alpha: float = ALPHA
) -> list[Fit]:
    """Whether a reference fits, for each factor: whether held-out images of the domain have scores like its own.

    Args:
        denoise: the network, with the scores of its calibration.
        reference: (1, C, H, W) in [-1, 1], on the network's device.
        factors: N; by default all that were calibrated.
        alpha: the share of images of the domain that may be refused at any of the factors.

    Raises:
        ValueError: there are no scores, too few for alpha, or none for a factor or this size of images.
    """
    known = denoise.fit_scores
    if not known:
        raise ValueError("the checkpoint holds no scores of held-out images to compare a reference with")
    asked = sorted(known if factors is None else factors)
    if missing := [n for n in asked if n not in known]:
        raise ValueError(
            f"held-out images were scored at N={', '.join(map(str, sorted(known)))} alone: got N={missing[0]}"
        )
    count = len(next(iter(known.values())))
    if not are_enough(known, alpha):
        raise ValueError(f"{count} held-out images were scored; alpha={alpha:g} needs {math.ceil(1 / alpha - 1)}")
    size = (reference.shape[2], reference.shape[3])
    held_out = {n: torch.tensor(known[n], dtype=torch.float64) for n in asked}
    if any(held_out[n].shape[1] != int(octaves_of(*(side // n for side in size)).max()) + 1 for n in asked):
        raise ValueError(f"held-out images of another size were scored: got {size[0]}x{size[1]}")
    own = misfits(denoise, reference, asked)
    own = {n: score.cpu().double() for n, score in own.items()}
    # Each octave counts the same; by the number of their coordinates the finest would be nearly all.
    looks = torch.cat([own[n].mean(1) for n in asked])
    p = p_values(looks, torch.stack([held_out[n].mean(1) for n in asked], 1)).tolist()
    return [
        Fit(
            factor=n, p=each, fits=each > alpha,
            reason="" if each > alpha else _reason(denoise, reference, n, own[n][0], held_out[n]),
        )
        for n, each in zip(asked, p, strict=True)
    ]  # fmt: skip


def _reason(denoise: Checkable, y: Tensor, factor: int, score: Tensor, held_out: Tensor) -> str:
    """The octave that is furthest above its calibration, in words."""
    octave = int((score / held_out.quantile(0.95, 0).clamp(min=1e-9)).argmax())
    if octave == 0:
        return "its mean colour"
    band = LowBand((y.shape[2], y.shape[3]), factor, PLAN.kernel)
    z = band.coordinates(y.cpu().double())
    ratio = (z.square().mean((0, 1)) / band.variances(denoise.spectrum)).flatten()
    inside = octaves_of(z.shape[-2], z.shape[-1]) == octave
    energy = float(ratio[inside].mean())
    what = "too much detail" if energy > MUCH else "too little detail" if energy < 1 / MUCH else "other shapes"
    side = max(y.shape[2:])
    return f"{what} at {side / 2**octave:g} to {side / 2 ** (octave - 1):g} px"


def smallest_fitting(fits: Sequence[Fit]) -> int | None:
    """The smallest N of LEAST or more at which a reference fits and all larger ones do, too; None where there is none.

    An image that has the reference's low band at N has it at all larger N.
    """
    found = None
    for fit in sorted(fits, key=lambda fit: -fit.factor):
        if not fit.fits or fit.factor < LEAST:
            break
        found = fit.factor
    return found


def recommend(fits: Sequence[Fit], size: tuple[int, int]) -> tuple[int, str]:
    """The N to take for a reference of a height and width, and why in words."""
    found = smallest_fitting(fits)
    most = max(LEAST, min(size) // KEPT)
    kept = [fit for fit in fits if fit.factor <= most]
    if kept and (found is None or found > most):
        last = kept[-1]
        beyond = f", but N={found} would keep only {size[0] // found}x{size[1] // found} pixels of it" if found else ""
        return last.factor, f"take N={last.factor}; it {last}{beyond}"
    if found is None:
        return fits[-1].factor, f"take N={fits[-1].factor}; it {fits[-1]}"
    place = [fit.factor for fit in fits].index(found)
    below = f"; at N={fits[place - 1].factor} it {fits[place - 1]}" if place and not fits[place - 1].fits else ""
    return found, f"take N={found}, which {fits[place]}{below}"
