"""generate(): the one entry to the samplers, for the callback, sample.py, the benchmarks and users."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from ilvr_lightning.diffusion.candidates import Chosen, choose
from ilvr_lightning.diffusion.conditioning import ILVR, Unconditional
from ilvr_lightning.diffusion.denoiser import Denoise, Prediction, clip_prediction
from ilvr_lightning.diffusion.exact_low_band import project_to_low_band
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.noise import NoiseSource, PerImageNoise
from ilvr_lightning.diffusion.plan import SamplingPlan, gains_per_image, sigmas_per_image
from ilvr_lightning.diffusion.samplers import SAMPLERS, Run, SamplerState
from ilvr_lightning.diffusion.schedule import NoiseSchedule, spaced_timesteps


class DenoiseWithSchedule(Denoise, Protocol):
    """A denoiser that knows its noise schedule, as those of load_denoiser do."""

    @property
    def schedule(self) -> NoiseSchedule: ...


@overload
def generate(
    denoise: DenoiseWithSchedule, plan: SamplingPlan, /, *, seeds: Sequence[int], shape: tuple[int, int, int],
    reference: Tensor | None = None, mask: Tensor | None = None, x_T: Tensor | None = None,
    noise: NoiseSource | None = None, device: torch.device | str = "cpu",
) -> Tensor: ...  # fmt: skip
@overload
def generate(
    denoise: Denoise, schedule: NoiseSchedule, plan: SamplingPlan, *, seeds: Sequence[int],
    shape: tuple[int, int, int], reference: Tensor | None = None, mask: Tensor | None = None,
    x_T: Tensor | None = None, noise: NoiseSource | None = None, device: torch.device | str = "cpu",
) -> Tensor: ...  # fmt: skip
def generate(denoise: Any, schedule: Any, plan: Any = None, **settings: Any) -> Tensor:
    """Sample images, steered by a reference if there is one: generate(denoise, plan, seeds=..., shape=...).

    Args:
        denoise: callable (x, t) -> Prediction, t (B,) in 1..T.
        schedule: the denoiser's; may be left out where it has a `schedule` of its own.
        plan: the sampling settings.
        seeds: one per image; their number is B.
        shape: (C, H, W).
        reference: (B, C, H, W) or (1, C, H, W) in [-1, 1], or None for unconditional samples.
        mask: (B, 1, H, W) or (1, 1, H, W) in [0, 1], where the reference is followed: 1 to the end, m down to the
            timestep (1 - m) T, 0 not at all.
        x_T: (B, C, H, W) to start from; by default drawn from the seeds. The result has its dtype and device.
        noise: a source of noise in place of the seeds.
        device: where to sample, unless x_T says so.

    Returns:
        (B, C, H, W), nominally in [-1, 1].

    Raises:
        ValueError: the plan does not fit T, the shape or the reference.
    """
    x = torch.empty(0)
    for state in generate_steps(denoise, schedule, plan, **settings):
        x = state.x
    return x


@overload
def generate_steps(
    denoise: DenoiseWithSchedule, plan: SamplingPlan, /, *, seeds: Sequence[int], shape: tuple[int, int, int],
    reference: Tensor | None = None, mask: Tensor | None = None, x_T: Tensor | None = None,
    noise: NoiseSource | None = None, device: torch.device | str = "cpu",
) -> Iterator[SamplerState]: ...  # fmt: skip
@overload
def generate_steps(
    denoise: Denoise, schedule: NoiseSchedule, plan: SamplingPlan, *, seeds: Sequence[int],
    shape: tuple[int, int, int], reference: Tensor | None = None, mask: Tensor | None = None,
    x_T: Tensor | None = None, noise: NoiseSource | None = None, device: torch.device | str = "cpu",
) -> Iterator[SamplerState]: ...  # fmt: skip
@torch.no_grad()
def generate_steps(
    denoise: Any,
    schedule: Any,
    plan: Any = None,
    *,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    x_T: Tensor | None = None,
    noise: NoiseSource | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[SamplerState]:
    """The same as `generate`, one SamplerState per step: for previews, progress bars and early stops.

    With candidates, the steps of all of them follow one another; a state at t = 0 holds what is chosen so far.
    """
    if plan is None:
        schedule, plan = denoise.schedule, schedule
    plan = plan.resolved(schedule.num_timesteps)
    noise = noise or PerImageNoise(seeds)
    if x_T is not None and tuple(x_T.shape) != (len(seeds), *shape):
        raise ValueError(f"x_T must have the shape {(len(seeds), *shape)}: got {tuple(x_T.shape)}")
    chosen: Chosen | None = None
    runs = 1 if reference is None else plan.candidates
    for _ in range(runs):
        start = noise.draw("x_T", torch.empty((len(seeds), *shape), device=device)) if x_T is None else x_T
        for state in _run(denoise, schedule, plan, noise, start, reference, mask):
            if state.t == 0 and runs > 1:
                chosen = choose(chosen, state, noise)
                state = chosen.state
            yield state


def _run(
    denoise: Any,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    noise: NoiseSource,
    x_T: Tensor,
    reference: Tensor | None,
    mask: Tensor | None,
) -> Iterator[SamplerState]:
    """One run of a resolved plan's sampler."""

    def at_level(x: Tensor, t: int) -> Prediction:
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        return clip_prediction(prediction, x, t, schedule) if plan.clip else prediction

    timesteps = evaluated_timesteps(schedule, plan)
    ilvr = _ilvr(plan, x_T, reference, mask)
    if ilvr is not None:
        if plan.high_band_correction and not hasattr(denoise, "components"):
            raise ValueError(
                "sampling.high_band_correction needs a denoiser with the attribute `components`, as those of "
                "load_denoiser have it"
            )
        components = getattr(denoise, "components", None)
        fits = components is not None and components.size == tuple(x_T.shape[2:])
        ilvr = replace(ilvr, spectrum=tuple(getattr(denoise, "spectrum", ())), components=components if fits else None)
    if plan.start_from is not None:
        if ilvr is None:
            raise ValueError("sampling.start_from needs a reference to begin from")
        if mask is not None:
            raise ValueError("sampling.start_from cannot be combined with a mask")
        x_T = schedule.q_sample(ilvr.reference, plan.start_from, x_T)
    refinement = ilvr.start(schedule, noise, timesteps, x_T) if ilvr else None
    run = Run(
        denoise=at_level,
        schedule=schedule,
        conditioning=refinement or Unconditional(),
        noise=noise,
        timesteps=timesteps,
        plan=plan,
    )
    for state in SAMPLERS[plan.sampler](run, x_T):
        if refinement is not None:
            state = replace(state, evidence=torch.as_tensor(refinement.evidence).to(state.x).expand(len(state.x)))
        if state.t == 0 and ilvr is not None and plan.exact_low_band:
            state = replace(state, x=project_to_low_band(state.x, ilvr.reference, plan.factor, plan.kernel, ilvr.mask))
        yield state


def evaluated_timesteps(schedule: NoiseSchedule, plan: SamplingPlan) -> list[int]:
    """The timesteps, descending, at which a resolved plan asks the network."""
    return list(plan.timesteps or spaced_timesteps(schedule, plan.steps, plan.spacing, plan.start_from))


def _ilvr(plan: SamplingPlan, x_T: Tensor, reference: Tensor | None, mask: Tensor | None) -> ILVR | None:
    if reference is None:
        if mask is not None:
            raise ValueError("a mask needs a reference")
        return None
    if mask is not None and (mask.ndim != 4 or len(mask) not in (1, len(x_T)) or mask.shape[1:] != (1, *x_T.shape[2:])):
        raise ValueError(
            f"the mask must have the shape {(len(x_T), 1, *x_T.shape[2:])}, or 1 in place of {len(x_T)}: "
            f"got {tuple(mask.shape)}"
        )
    if mask is not None and not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"the mask must be in [0, 1]: got {float(mask.min()):g} to {float(mask.max()):g}")
    if reference.ndim != 4 or len(reference) not in (1, len(x_T)) or reference.shape[1:] != x_T.shape[1:]:
        raise ValueError(
            f"the reference must have the shape {tuple(x_T.shape)}, or 1 in place of {len(x_T)}: "
            f"got {tuple(reference.shape)}"
        )
    for name in ("factor", "condition_from", "condition_to", "reference_sigma"):
        value = getattr(plan, name)
        count = len(value) if isinstance(value, tuple) else 1
        if count not in (1, len(x_T)):
            raise ValueError(f"sampling.{name} must be one, or one per image: got {count} for {len(x_T)} images")
    gains = gains_per_image(plan.octave_gains)
    if len(gains) not in (1, len(x_T)):
        raise ValueError(f"sampling.octave_gains must be one list, or one per image: got {len(gains)}")
    height, width = x_T.shape[-2:]
    return ILVR(
        reference=reference.to(x_T).expand_as(x_T),
        low_pass=LowPassFilter((height, width), plan.factor, plan.kernel, plan.orthogonal),
        reference_noise=plan.reference_noise,
        eps_extrapolation=plan.eps_extrapolation,
        octave_gains=gains,
        low_band_gain=plan.low_band_gain,
        low_band_decay=plan.low_band_decay,
        reference_sigma=sigmas_per_image(plan.reference_sigma),
        high_band_correction=plan.high_band_correction,
        condition_from=plan.condition_from,
        condition_to=plan.condition_to,
        respaced_range_t=plan.respaced_range_t,
        mask=mask,
    )
