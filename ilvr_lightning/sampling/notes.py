"""Notes on what a run of sample.py asks for: what will have no effect, and what cannot be had."""

import math

from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.runtime.command import say
from ilvr_lightning.sampling.arguments import Arguments


def note_small(reference: Reference, factor: int) -> None:
    """Say that a reference has fewer pixels than its smallest factor follows."""
    height, width = reference.pixels.shape[:2]
    own = reference.size or (height, width)
    enlarged = math.ceil(max(height / own[0], width / own[1]))
    if enlarged > factor:
        say(
            f"note         {reference.name} has only {own[1]}x{own[0]} pixels, so that N={factor} follows its "
            f"blur; give --factor {enlarged} or more"
        )


def note_missing(plan: SamplingPlan, denoiser: LoadedDenoiser, args: Arguments) -> None:
    """Say what a plan needs of the checkpoint and does not find there."""
    if plan.low_band_gain and not denoiser.spectrum:
        say(
            "note         --low-band-gain: the checkpoint does not say how its training images vary, so natural images "
            "are assumed; python -m ilvr_lightning.checkpoints export --calibrate adds it"
        )
    if plan.high_band_correction and denoiser.components is None and args.high_band_correction is not None:
        say(
            "note         --high-band-correction changes nothing: the checkpoint does not hold the components of its "
            "training images; python -m ilvr_lightning.checkpoints export --calibrate --training-images adds them"
        )
