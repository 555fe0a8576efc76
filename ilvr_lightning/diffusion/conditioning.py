"""What steers a sampler: nothing, or ILVR. A sampler calls two hooks and never knows which conditioning answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.low_pass import LowPassFilter
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
    """fresh: y_s is drawn anew at every step t -> s; fresh_released: y_t in its place, as the released code has it."""
    condition_from: int | tuple[int, ...] | None = None
    """a: the highest timestep that is refined; None means T. One, or one an image."""
    condition_to: int | tuple[int, ...] = 0
    """b: the lowest timestep that is refined."""
    respaced_range_t: int | None = None
    """The released code's range_t: only steps that more than so many follow are refined, so never the last."""

    def start(self, schedule: NoiseSchedule, noise: NoiseSource, timesteps: Sequence[int] = ()) -> "ILVRRun":
        """The conditioning of one run on this schedule, with its noise.

        Args:
            schedule: the denoiser's.
            noise: where the reference's noise comes from.
            timesteps: those that the run evaluates; respaced_range_t counts them.

        Raises:
            ValueError: respaced_range_t is set and there is nothing to count.
        """
        if self.respaced_range_t is not None and not timesteps:
            raise ValueError("sampling.respaced_range_t needs the run's timesteps: give them to ILVR.start")
        return ILVRRun(self, schedule, noise, timesteps)


@dataclass
class ILVRRun:
    """One run of ILVR: the hooks that a sampler calls."""

    settings: ILVR
    schedule: NoiseSchedule
    noise: NoiseSource
    timesteps: Sequence[int]
    _from: int = 0
    """The level that the present step comes from."""

    def refine_prediction(self, prediction: Prediction, t: int) -> Prediction:
        """Fresh noise needs the second hook alone."""
        self._from = t
        return prediction

    def refine_sample(self, x: Tensor, t: int) -> Tensor:
        """Give x_t the reference's low frequencies (Choi et al. 2021, algorithm 1, line 9).

        Args:
            x: (B, C, H, W) the sampler's proposal, already at level t.
            t: training timestep in [0, T] that x is at.
        """
        range_t = self.settings.respaced_range_t
        if range_t is not None and sum(s < self._from for s in self.timesteps) <= range_t:
            return x
        # Drawn at every step, so that an image's noise does not depend on the ranges of the others in its batch.
        y, level = self.settings.reference, t if self.settings.reference_noise == "fresh" else self._from
        if level:
            y = self.schedule.q_sample(y, level, self.noise.draw("reference", x))
        refined = x + self.settings.low_pass(y - x)
        return self._where_conditioned(refined, x, t)

    def _where_conditioned(self, refined: Tensor, x: Tensor, t: int) -> Tensor:
        """refined for the images whose range [b, a] holds t, else x."""
        lows = as_tuple(self.settings.condition_to)
        highs = as_tuple(self._highest)
        inside = [b <= t <= a for a, b in _paired(highs, lows)]
        if all(inside):
            return refined
        if not any(inside):
            return x
        return torch.where(torch.tensor(inside, device=x.device).reshape(-1, 1, 1, 1), refined, x)

    @property
    def _highest(self) -> int | tuple[int, ...]:
        a = self.settings.condition_from
        return self.schedule.num_timesteps if a is None else a


def _paired(highs: tuple[int, ...], lows: tuple[int, ...]) -> list[tuple[int, int]]:
    """(a, b) an image; one value goes with every other."""
    count = max(len(highs), len(lows))
    return list(zip(highs * (count // len(highs)), lows * (count // len(lows)), strict=True))
