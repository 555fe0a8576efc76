"""What steers a sampler: nothing, or ILVR. A sampler calls two hooks and never knows which conditioning answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ilvr_lightning.diffusion.components import Components, HighBandCorrection
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.evidence import step_evidence
from ilvr_lightning.diffusion.low_pass import LowPassFilter, OctaveGains, cast_like
from ilvr_lightning.diffusion.multiplier import Multiplier
from ilvr_lightning.diffusion.noise import NoiseSource
from ilvr_lightning.diffusion.plan import ReferenceNoise, as_tuple
from ilvr_lightning.diffusion.schedule import NoiseSchedule


class Conditioning(Protocol):
    """The two hooks of a run; an object that implements them is made for each run and may remember."""

    def refine_prediction(self, prediction: Prediction, t: int) -> Prediction:
        """Change what the network said at level t, before the sampler's update."""

    def refine_sample(self, x: Tensor, t: int) -> Tensor:
        """Change the sampler's proposal x (B, C, H, W), already at level t in [0, T]."""


class Unconditional:
    """Leaves everything as it is."""

    def refine_prediction(self, prediction: Prediction, t: int) -> Prediction:
        return prediction

    def refine_sample(self, x: Tensor, t: int) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True)
class ILVR:
    """Iterative latent variable refinement (Choi et al. 2021): frozen settings; `start` makes the object of a run."""

    reference: Tensor
    """(B, C, H, W) or (1, C, H, W) in [-1, 1]."""
    low_pass: LowPassFilter
    """phi_N."""
    reference_noise: ReferenceNoise = "fresh"
    """The noise of y_s in a step t -> s. fresh: drawn in each step (fresh_released: y_t in place of y_s); matched: the
    network's own eps; fixed: what makes x_T of the reference. With the last two x_0 is refined before the step, too."""
    eps_extrapolation: float = 0.0
    """kappa: matched noise is extrapolated from the last two eps by so much, in [0, 1]."""
    low_band_gain: float = 0.0
    """g_max of matched noise, see Multiplier; 0 takes the network's eps as it is."""
    low_band_decay: float = 1.0
    """delta: how fast the multiplier decays from one level to the next, in [0, 1]."""
    reference_sigma: tuple[float, ...] = (0.0,)
    """Deviation of the reference's own noise; one value, or one per image. Such a reference is an x_t itself, at the
    level where 1/snr = sigma^2: above that level only the missing noise is added, below it nothing is refined."""
    spectrum: tuple[float, ...] = ()
    """Variance of the training images' DCT coefficients by radius, as radial_spectrum returns it; see Multiplier."""
    high_band_correction: float = 0.0
    """How much of its regression on the low band's error x_0's high band is corrected by, in [0, 1]."""
    components: Components | None = None
    """The training images' principal components, which the correction needs; without them there is none."""
    octave_gains: tuple[tuple[float, ...], ...] = ()
    """Multipliers of the octaves of x_0 above phi, the finest last; one list, or one per image; N a power of two."""
    condition_from: int | tuple[int, ...] | None = None
    """a: the highest timestep that is refined; None means T. One value, or one per image."""
    condition_to: int | tuple[int, ...] = 0
    """b: the lowest timestep that is refined."""
    respaced_range_t: int | None = None
    """The released code's range_t: only steps that more than so many follow are refined, so never the last."""
    mask: Tensor | None = None
    """(B, 1, H, W) in [0, 1], or 1 in place of B: where the reference is followed. 1: to the end; m: down to the
    timestep (1 - m) T, as by a range of its own; 0: not at all."""

    @property
    def has_gains(self) -> bool:
        """Whether octave_gains change anything."""
        return any(gain != 1 for gains in self.octave_gains for gain in gains)

    def start(
        self, schedule: NoiseSchedule, noise: NoiseSource, timesteps: Sequence[int] = (), x_T: Tensor | None = None
    ) -> "ILVRRun":
        """The conditioning of one run.

        Args:
            schedule: the denoiser's.
            noise: where the reference's noise comes from.
            timesteps: those that the run evaluates; all but plain fresh noise must know where a step goes.
            x_T: (B, C, H, W) where the run starts; fixed noise is this.

        Raises:
            ValueError: timesteps or x_T are needed, and not given.
        """
        refines_x0 = self.reference_noise in ("matched", "fixed") or self.has_gains
        if not timesteps and (refines_x0 or self.respaced_range_t is not None):
            raise ValueError(
                "sampling.reference_noise=matched or fixed, sampling.octave_gains and sampling.respaced_range_t need "
                "the run's timesteps: give them to ILVR.start"
            )
        if self.reference_noise == "fixed" and x_T is None:
            raise ValueError("sampling.reference_noise=fixed needs x_T: give it to ILVR.start")
        return ILVRRun(self, schedule, noise, timesteps, x_T)


@dataclass
class ILVRRun:
    """One run of ILVR: the hooks that a sampler calls, and the evidence of its path."""

    settings: ILVR
    schedule: NoiseSchedule
    noise: NoiseSource
    timesteps: Sequence[int]
    x_T: Tensor | None = None  # noqa: N815 - the field's name
    evidence: Tensor | float = 0.0
    """(B,) logarithm of the evidence so far, see step_evidence."""
    _from: int = 0
    """The level that the present step comes from."""
    _mean: Tensor | None = None
    """What the low band of the present x_0 is to be, if not y's."""
    _eps: Tensor | None = None
    """The matched noise of the present step."""
    _before: tuple[int, Tensor, list[bool]] | None = None
    """Level and eps (or the multiplier) of the step before, and which images it refined; None where it refined none."""
    _mask: Tensor | None = None
    """The mask on the filter's grid."""
    _octaves: OctaveGains | None = None
    _multiplier: Multiplier | None = None
    _correction: HighBandCorrection | None = None
    _variance: Tensor | None = None
    """(B, 1, 1, 1) variance of the reference's own noise, if it has any."""
    _own_levels: tuple[int, ...] = (0,)
    """The lowest level that is at least as noisy as the reference is; one value, or one per image."""

    def __post_init__(self) -> None:
        settings, sigmas = self.settings, self.settings.reference_sigma
        if any(sigmas):
            self._variance = torch.tensor(sigmas).to(settings.reference).reshape(-1, 1, 1, 1).square()
            self._own_levels = tuple(self.schedule.level_of_noise(sigma) for sigma in sigmas)
        if settings.low_band_gain:
            self._multiplier = Multiplier(
                settings.low_pass, settings.reference, settings.spectrum,
                gain=settings.low_band_gain, decay=settings.low_band_decay,
                sigma=0.0 if self._variance is None else self._variance.sqrt(),
            )  # fmt: skip
        if settings.high_band_correction and settings.components is not None:
            self._correction = HighBandCorrection(settings.low_pass, settings.components)
        if self.settings.mask is not None:
            self._mask = cast_like(self.settings.low_pass.cell_means(self.settings.mask), self.settings.reference)
        if self.settings.has_gains:
            self._octaves = OctaveGains(self.settings.low_pass, self.settings.octave_gains)

    def refine_prediction(self, prediction: Prediction, t: int) -> Prediction:
        """Give x_0 the reference's low frequencies before a step from t, eps unchanged (matched and fixed noise)."""
        self._from = t
        s = max((u for u in self.timesteps if u < t), default=0)
        inside = self._is_conditioned(s)
        if self.timesteps:
            error = self._low_band(self.settings.reference - prediction.x0, s)
            added = step_evidence(error, self.schedule, t, s, self._variance)
            self.evidence = self.evidence + _where(inside, added, torch.zeros_like(added))
        fresh = self.settings.reference_noise in ("fresh", "fresh_released")
        if fresh and not self.settings.has_gains and self._variance is None:
            return prediction
        if not any(inside):
            self._before = None
            return prediction
        x0 = refined = prediction.x0
        if self._variance is not None:
            # q = (z(y) - E[z(x_0) | x_t, y]) / sigma^2, the multiplier, is sqrt(snr) eps.
            snr = math.exp(2 * float(self.schedule.log_snr_half[t]))
            self._mean = self.settings.reference - self._variance * math.sqrt(snr) * prediction.eps
        target = self.settings.reference if self._mean is None else self._mean
        difference, where = None if fresh else self._low_band(target - x0, s), self._conditioned_pixels(x0, s)
        self._eps = self._matched_noise(prediction.eps, difference, t, s, inside)
        if self._correction is not None and difference is not None:
            share, lam = self.settings.high_band_correction, float(self.schedule.log_snr_half[t])
            low, high = self._correction(difference, lam, self._variance, where)
            difference = torch.lerp(difference, low, share)
            self._mean = None if self._variance is None else x0 + difference
            refined = x0 + share * where * high
        if self._octaves is not None:
            refined = refined + where * (self._octaves(refined) - refined)
        if difference is not None:
            refined = refined + difference
        return replace(prediction, x0=_where(inside, refined, x0))

    def refine_sample(self, x: Tensor, t: int) -> Tensor:
        """Give x_t the reference's low frequencies (Choi et al. 2021, algorithm 1, line 9).

        Args:
            x: (B, C, H, W) the sampler's proposal, already at level t.
            t: training timestep in [0, T] that x is at.
        """
        inside = self._is_conditioned(t)
        # Drawn at every step, whatever the images' own ranges are; the released code draws none outside its range.
        draws = self.settings.reference_noise.startswith("fresh") or self._variance is not None
        if not (any(inside) or (draws and self._is_in_respaced_range())):
            return x
        y = self._noised_reference(x, t, self._from if self.settings.reference_noise == "fresh_released" else t)
        if not any(inside):
            return x
        return _where(inside, x + self._low_band(y - x, t), x)

    def _noised_reference(self, x: Tensor, s: int, level: int) -> Tensor:
        """The reference at a level; with noise of its own it is an x_t itself, which needs only the missing noise.

        Args:
            x: (B, C, H, W) the sampler's proposal.
            s: the timestep that the step goes to.
            level: the timestep that the reference is noised for: s, or where the step comes from as released.
        """
        y = self.settings.reference
        if self._variance is None:
            return self.schedule.q_sample(y, level, self._noise(x)) if level else y
        drawn = self.noise.draw("reference", x) if level else torch.zeros_like(x)
        noise = drawn if self.settings.reference_noise.startswith("fresh") else self._noise(x)
        signal, sigma = self.schedule.signal_and_noise(level, x)
        variance = (sigma / signal).square()  # of the noise of x_s / sqrt(alphas_cumprod_s)
        missing = (1 - self._variance / variance).clamp(min=0) if level else torch.zeros_like(self._variance)
        above = y + sigma / signal * (missing if self.settings.reference_noise == "matched" else missing.sqrt()) * noise
        # Below the reference's own level u: q(x_s | x_0, x_u = y) (Ho et al. 2020, equation 6), x_0 its posterior mean.
        share = (variance / self._variance).clamp(max=1)
        mean = y if self._mean is None else self._mean
        below = torch.lerp(mean, y, share) + (variance * (1 - share)).sqrt() * drawn
        return signal * _where([s < own for own in self._own_levels], below, above)

    def _low_band(self, difference: Tensor, t: int) -> Tensor:
        """phi of y - x, where the mask has a step that goes to t conditioned."""
        if self._mask is None:
            return self.settings.low_pass(difference)
        return self.settings.low_pass.weighted(difference, self._active_cells(self._mask, t))

    def _conditioned_pixels(self, x: Tensor, t: int) -> Tensor | float:
        """Where a step that goes to t is conditioned, in pixels: from 0 to 1."""
        if self._mask is None:
            return 1.0
        return self.settings.low_pass.weighted(torch.ones_like(x[:, :1]), self._active_cells(self._mask, t)).clamp(0, 1)

    def _active_cells(self, mask: Tensor, t: int) -> Tensor:
        """Which cells of the filter's grid a step that goes to t conditions."""
        # A mean of ones may round to less.
        return (mask > 0) & (mask >= 1 - t / self.schedule.num_timesteps - 1e-6)

    def _noise(self, x: Tensor) -> Tensor:
        """The noise of the reference in this step."""
        if self.settings.reference_noise == "fixed" and self.x_T is not None:
            signal, sigma = self.schedule.signal_and_noise(self.timesteps[0], x)
            return (self.x_T - signal * self.settings.reference) / sigma
        if self.settings.reference_noise == "matched" and self._eps is not None:
            return self._eps
        return self.noise.draw("reference", x)

    def _matched_noise(self, eps: Tensor, difference: Tensor | None, t: int, s: int, inside: list[bool]) -> Tensor:
        """The noise of y_s: the network's eps, or with a gain the multiplier, extrapolated from its last two values."""
        log_snr_half = self.schedule.log_snr_half
        lam_t, h = float(log_snr_half[t]), float(log_snr_half[s] - log_snr_half[t]) if s else math.inf
        damping: Tensor | float = 1.0
        if self._multiplier is not None and difference is not None:
            eps, damping = self._multiplier(eps, difference, lam_t, h)
        before, self._before = self._before, (t, eps, inside)
        if self.settings.eps_extrapolation and s and before is not None:
            t_before, eps_before, refined = before
            eps_before = _where(refined, eps_before, eps)
            h_before = lam_t - float(log_snr_half[t_before])
            fade = min(1.0, max(0.0, h / MIN_EXTRAPOLATION_STEP - 1))
            eps = eps + fade * min(1.0, self.settings.eps_extrapolation * h / h_before) * damping * (eps - eps_before)
        return eps if self._multiplier is None else self._multiplier.band.pixels(eps)

    def _is_in_respaced_range(self) -> bool:
        range_t = self.settings.respaced_range_t
        return range_t is None or sum(u < self._from for u in self.timesteps) > range_t

    def _is_conditioned(self, s: int) -> list[bool]:
        """Whether a step that goes to s is conditioned; one value, or one per image."""
        highs = self.schedule.num_timesteps if self.settings.condition_from is None else self.settings.condition_from
        ranges = _per_image(as_tuple(highs), as_tuple(self.settings.condition_to), self._own_levels)
        within = self._is_in_respaced_range()
        return [within and b <= s <= a and own <= self._from for a, b, own in ranges]


MIN_EXTRAPOLATION_STEP = 0.2
"""Half-log-SNR: steps this small take eps as it is, steps of twice as much extrapolate in full."""


def _where(inside: list[bool], refined: Tensor, x: Tensor) -> Tensor:
    """refined for the images that are inside, else x."""
    if all(inside):
        return refined
    chosen = torch.tensor(inside, device=x.device)
    return torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), refined, x)


def _per_image(*settings: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The values of several settings for each image; a single value is repeated."""
    count = max(map(len, settings))
    return list(zip(*(values * (count // len(values)) for values in settings), strict=True))
