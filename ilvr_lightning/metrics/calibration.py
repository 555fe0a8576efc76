"""Calibration of octave_gains, so that ILVR samples have the energy of real images above the filter's frequencies."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Denoise
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import Gains, SamplingPlan, as_tuple
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics.bands import octave_energies

PRESETS = ("fast", "draft")
"""The presets that are calibrated."""
PROBE = 0.01
"""Step of a gain by which the slope is measured."""
MAX_CHANGE = 0.05
"""A gain stays within this distance of 1."""
MIN_SLOPE = 5.0
"""The least slope of log-energy against the gain that is accepted; it is about 15 at 20 evaluations."""


def calibrate(
    denoise: Denoise, schedule: NoiseSchedule, plan: SamplingPlan, images: Tensor, seeds: Sequence[int], batch: int = 64
) -> Gains:
    """The octave_gains at which samples have, octave by octave, the energy of their references.

    Two secant steps in the logarithm of the energies, which grow by a constant factor for each hundredth of gain.

    Args:
        denoise: the network as a callable.
        schedule: the denoiser's.
        plan: with one factor, a power of two; its octave_gains are ignored.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain, one sample each.
        seeds: one per image.
        batch: images sampled at once.
    """
    (factor,) = as_tuple(plan.factor)

    def excess(gains: Tensor) -> Tensor:
        made = [
            generate(
                denoise, schedule, replace(plan, octave_gains=tuple(gains.tolist())), seeds=seeds[i : i + batch],
                shape=(images.shape[1], images.shape[2], images.shape[3]), reference=images[i : i + batch],
                device=images.device,
            )
            for i in range(0, len(images), batch)
        ]  # fmt: skip
        energies = octave_energies(torch.cat(made).clamp(-1, 1), images, factor)
        return torch.tensor(energies, dtype=torch.float64).clamp(1e-6, 1e6).log().nan_to_num(0.0)

    gains = torch.ones(factor.bit_length() - 1, dtype=torch.float64)
    before = excess(gains)
    probe = torch.where(before < 0, PROBE, -PROBE)
    slope = ((excess(gains + probe) - before) / probe).clamp(min=MIN_SLOPE)
    gains = (gains - before / slope).clamp(1 - MAX_CHANGE, 1 + MAX_CHANGE)
    gains = (gains - excess(gains) / slope).clamp(1 - MAX_CHANGE, 1 + MAX_CHANGE)
    return tuple(round(gain, 4) for gain in gains.tolist())


def calibrate_presets(
    denoise: Denoise, schedule: NoiseSchedule, images: Tensor, *, seed: int = 0, clip: bool = True, batch: int = 64
) -> dict[str, dict[int, Gains]]:
    """{preset: {factor: octave_gains}} for PRESETS and the powers of two as factors.

    Args:
        denoise: the network as a callable.
        schedule: the denoiser's.
        images: (B, C, H, W) in [-1, 1], held-out images of the training domain.
        seed: seed of the noise.
        clip: whether the plans clip x_0.
        batch: images sampled at once.
    """
    seeds = [derive_seed(seed, "calibration", i) for i in range(len(images))]
    height, width = images.shape[2:]
    factors = [n for n in (2, 4, 8, 16, 32, 64) if height % n == width % n == 0 and 2 * n <= min(height, width)]
    plans = {preset: SamplingPlan.preset(preset, clip=clip) for preset in PRESETS}
    return {
        preset: {n: calibrate(denoise, schedule, replace(plan, factor=n), images, seeds, batch) for n in factors}
        for preset, plan in plans.items()
        if factors and plan.evaluations <= schedule.num_timesteps
    }
