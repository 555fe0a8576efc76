"""What sample.py finds and checks before it starts: checkpoint, references, sizes, devices."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace

from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.diffusion.plan import SamplingPlan, check_factor
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.arguments import in_flags
from ilvr_lightning.sampling.requests import Setting, settings_of


def check_image_size(
    loaded: LoadedDenoiser, size: tuple[int, int] | None, factors: Sequence[int], plan: SamplingPlan
) -> tuple[int, int, int]:
    """(C, H, W) of the pictures, once network, factors and plan are known to allow it.

    Raises:
        UserError: they do not.
    """
    channels, *trained = loaded.image_shape
    height, width = size or (trained[0], trained[1])
    try:
        loaded.network.config.check_size(height, width)
        for factor in factors:
            check_factor(factor, (height, width))
        plan.resolved(loaded.schedule.num_timesteps)
    except ValueError as error:
        raise UserError(in_flags(str(error))) from None
    if plan.variance == "learned" and not loaded.network.config.learn_sigma:
        raise UserError("--variance learned needs a network that learned its variance; give small, large or auto")
    return channels, height, width


SWEEP_FACTORS = (4, 8, 16, 32, 64)


SWEEP_RANGES = (1.0, 0.0), (1.0, 0.25), (1.0, 0.5), (1.0, 0.75)
"""Of T: the paper's figure 7 in four columns."""


def expand_sweep(
    loaded: LoadedDenoiser, args: argparse.Namespace, plan: SamplingPlan
) -> tuple[tuple[int, int, int], SamplingPlan, list[Setting]]:
    """The pictures' shape, the plan with T filled in, and what is swept: factors, ranges, or both.

    Raises:
        UserError: network, factors, ranges or plan do not fit each other.
    """
    factors, ranges, T = args.factor, args.range or [], loaded.schedule.num_timesteps
    if args.sweep:
        side = min(args.image_size or loaded.image_shape[1:])
        factors = factors or [n for n in SWEEP_FACTORS if side % n == 0 and n < side]
        ranges = ranges or [(round(a * T), round(b * T)) for a, b in SWEEP_RANGES]
    factors = factors or [8]
    shape = check_image_size(loaded, args.image_size, factors if args.ref else [], plan)
    try:
        plan = plan.resolved(T)
        gains = loaded.gains(args.preset, plan) if args.octave_gains is None and args.image_size is None else {}
        settings = settings_of(plan, factors, ranges, gains)
        for setting in settings:
            replace(plan, **asdict(setting)).resolved(T)
    except ValueError as error:
        raise UserError(in_flags(str(error))) from None
    return shape, plan, settings
