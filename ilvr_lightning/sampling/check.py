"""sample.py --check: which references fit at which N, before anything is sampled."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilvr_lightning.atomic import check_writable, write_atomically
from ilvr_lightning.checkpoints.find import find_checkpoint
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.images import Pixels
from ilvr_lightning.data.references import Reference, find_references
from ilvr_lightning.diffusion.plan import SamplingPlan, check_factor
from ilvr_lightning.metrics.fit import ALPHA, Fit, recommend
from ilvr_lightning.runtime.command import say
from ilvr_lightning.sampling.arguments import AUTO, Arguments, flags_in_errors
from ilvr_lightning.sampling.fit import Checker
from ilvr_lightning.sampling.requests import check_image_size
from ilvr_lightning.visual.grids import Column, draw_grid, low_pass_pixels

SHEET = "check.png"
"""The sheet's name in the folder of --out."""
MAX_ROWS = 24
"""It shows at most this many references."""
GREEN, RED = (0, 160, 60), (210, 30, 30)
"""The lights: it fits, it does not."""


def check(args: Arguments) -> int:
    """Print for each reference and N whether it fits, and the N to take; draw them; returns the exit status.

    Raises:
        UserError: the checkpoint holds no scores of held-out images, or none for these factors or this size.
    """
    denoiser = load_denoiser(find_checkpoint(args.ckpt), args.weights, dict(args.override), say)
    shape = check_image_size(denoiser, args.image_size)
    references = find_references(args.ref, shape, args.fit, args.mask, value_range=denoiser.value_range)
    folder = Path(args.out)
    check_writable(folder, "--out")
    factors = None if args.factor in ([], [AUTO]) else args.factor
    for n in factors or ():
        with flags_in_errors():
            check_factor(n, shape[1:], "--factor")
    checker = Checker(denoiser, args.device, factors)
    shown: list[tuple[Reference, list[Fit]]] = []
    for reference in references:
        fits = checker(reference)
        width = max(len(reference.name), 12)
        for fit in fits:
            print(f"{reference.name:{width}} N={fit.factor:<3} {fit}", flush=True)
        print(f"{reference.name:{width}} {recommend(fits, shape[1:])[1]}{_noise(reference)}", flush=True)
        if len(shown) < MAX_ROWS:
            shown.append((reference, fits))
    path = folder / SHEET
    image = draw_grid(_columns(shown), f"which references fit at which N, p above {ALPHA:g}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, functools.partial(image.save, format="PNG"))
    print(f"sheet        {path}")
    return 0


def _noise(reference: Reference) -> str:
    """What helps a reference that is noisy."""
    if not reference.noise:
        return ""
    return f"; its noise is about {reference.noise:.2g}, which --reference-sigma auto does not follow"


def _columns(shown: Sequence[tuple[Reference, list[Fit]]]) -> list[Column]:
    """Each reference, and for each N its low-pass image above its light."""
    references = [reference for reference, _ in shown]
    columns = [Column(label="reference", rows=[[_in_colour(r.preview())] for r in references])]
    for i, fit in enumerate(shown[0][1]):
        low = low_pass_pixels(references, fit.factor, SamplingPlan())
        rows = [[_with_light(pixels, fits[i].fits)] for pixels, (_, fits) in zip(low, shown, strict=True)]
        columns.append(Column(label=f"N={fit.factor}", rows=rows))
    return columns


def _in_colour(pixels: Pixels) -> Pixels:
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def _with_light(pixels: Pixels, fits: bool) -> Pixels:
    lit = _in_colour(pixels).copy()
    lit[-max(2, len(lit) // 16) :] = GREEN if fits else RED
    return lit
