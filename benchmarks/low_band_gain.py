"""Matched noise with a gain, on a trained network: energy scores on held-out images.

    python -m benchmarks.low_band_gain --ckpt CKPT --data data/toon [--preset draft fast] [--factor 4 8] [--images 96]
        [--seeds 3] [--all]

Per preset and N, without a gain and as the checkpoint was calibrated, or with every setting that the calibration tries
(--all); two samples per held-out image and seed, without octave gains. Score: energy score of the high band (lower is
better, see `metrics.bands.energy_scores`); difference: from the first row's, image by image, with its standard error
(over the images, each one's mean over the seeds); energy: of the high band over that of the images; FD-like `high`: see
`metrics.bands.high_band_distance`.
"""

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, SamplingPlan
from ilvr_lightning.metrics.bands import energy_scores, high_band_distance, high_band_energy
from ilvr_lightning.metrics.calibration import GAIN_CHOICES

BATCH = 48


def choices(loaded: LoadedDenoiser, preset: str, every: bool) -> list[tuple[float, ...]]:
    """The settings that are compared, LOW_BAND_FIELDS each; the first is no gain."""
    calibrated = loaded.preset(preset)
    chosen = tuple(getattr(calibrated, name) for name in LOW_BAND_FIELDS)
    if not every:
        return [(*GAIN_CHOICES[0], 0.0), chosen]
    return [(*gain, correction) for correction in (0.0, 1.0) for gain in GAIN_CHOICES]


@torch.no_grad()
def main() -> None:
    """Print a table for each preset and factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--preset", nargs="+", default=["draft", "fast"])
    parser.add_argument("--factor", type=int, nargs="+", default=[8])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--first", type=int, default=100, help="number of the first held-out image")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=1, help="runs per sample, one of which is kept")
    parser.add_argument("--all", action="store_true", help="every setting that the calibration tries")
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    denoiser = loaded.fastest()
    given = f"{args.data}:test[{args.first}:{args.first + args.images}]"
    y = torch.stack([r.tensor for r in find_references([given], loaded.image_shape, "crop")])
    twice = y.repeat_interleave(2, 0)

    def sample(plan: SamplingPlan, seed: int) -> Tensor:
        seeds = [derive_seed(seed, "low_band_gain", i) for i in range(len(twice))]
        parts = [slice(i, i + BATCH) for i in range(0, len(twice), BATCH)]
        made = [generate(denoiser, plan, seeds=seeds[p], shape=loaded.image_shape, reference=twice[p]) for p in parts]
        return torch.cat(made).clamp(-1, 1)

    for preset in args.preset:
        for factor in args.factor:
            print(f"\n{preset}, N={factor}, {len(y)} held-out images, two samples each, {args.seeds} seeds")
            print(f"| {' | '.join(LOW_BAND_FIELDS)} | score | difference | energy | high |\n{8 * '|---'}|")
            first = None
            for choice in choices(loaded, preset, args.all):
                changes: dict[str, Any] = dict(zip(LOW_BAND_FIELDS, choice, strict=True))
                plan = SamplingPlan.preset(preset, factor=factor, clip=loaded.clip, candidates=args.candidates)
                plan = replace(plan, **changes)
                made = [sample(plan, seed) for seed in range(args.seeds)]
                scores = torch.stack([energy_scores(x.reshape(-1, 2, *y.shape[1:]), y, factor) for x in made]).mean(0)
                first = scores if first is None else first
                difference = scores - first
                error = float(difference.std()) / math.sqrt(len(y))
                share = 100 * float(difference.mean() / first.mean())
                energy, high = (
                    sum(metric(x.double(), twice.double(), factor) for x in made) / len(made)
                    for metric in (high_band_energy, high_band_distance)
                )
                print(f"| {' | '.join(f'{value:g}' for value in choice)} | {float(scores.mean()):.2f} "
                      f"| {float(difference.mean()):+.2f} ±{error:.2f} ({share:+.0f}%) | {energy:.2f} | {high:.3f} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
