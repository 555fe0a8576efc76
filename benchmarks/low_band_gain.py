"""The settings of matched noise that the calibration tries, on a trained network: energy scores on held-out images.

    python -m benchmarks.low_band_gain --ckpt CKPT --data data/toon [--preset draft fast] [--factor 8] [--images 48]

Two samples per held-out image, without octave gains. Score: energy score of the high band (lower is better, see
`metrics.bands.energy_scores`); difference: from the first row's, image by image, with its standard error; energy: of
the high band over that of the images.
"""

import argparse
import math
import time
from dataclasses import replace
from typing import Any

import torch

from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_band import radial_spectrum
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, SamplingPlan
from ilvr_lightning.metrics.bands import energy_scores, high_band_energy
from ilvr_lightning.metrics.calibration import GAIN_CHOICES, LIMIT_CHOICES


@torch.no_grad()
def main() -> None:
    """Print a table for each preset and factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--preset", nargs="+", default=["draft", "fast"])
    parser.add_argument("--factor", type=int, nargs="+", default=[8])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--first", type=int, default=200, help="number of the first held-out image")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    given = (f"{args.data}:train[0:1000]", f"{args.data}:test[{args.first}:{args.first + args.images}]")
    train, y = (torch.stack([r.tensor for r in find_references([rows], loaded.image_shape, "crop")]) for rows in given)
    loaded.spectrum = tuple(radial_spectrum(train))
    twice = y.repeat_interleave(2, 0)
    seeds = [derive_seed(args.seed, "low_band_gain", i) for i in range(len(twice))]
    for preset in args.preset:
        for factor in args.factor:
            print(f"\n{preset}, N={factor}, {len(y)} held-out images, two samples each")
            print(f"| {' | '.join(LOW_BAND_FIELDS)} | score | difference | energy | s per image |\n{8 * '|---'}|")
            first = None
            for choice in [(*gain, 0.0) for gain in GAIN_CHOICES] + [
                (4.0, 0.0, 0.75, limit) for limit in LIMIT_CHOICES
            ]:
                changes: dict[str, Any] = dict(zip(LOW_BAND_FIELDS, choice, strict=True))
                plan = replace(SamplingPlan.preset(preset, factor=factor, clip=loaded.clip), **changes)
                start, made = time.perf_counter(), []
                for i in range(0, len(twice), 48):
                    part = slice(i, i + 48)
                    made.append(
                        generate(loaded, plan, seeds=seeds[part], shape=loaded.image_shape, reference=twice[part])
                    )
                seconds = (time.perf_counter() - start) / len(twice)
                x = torch.cat(made).clamp(-1, 1)
                scores = energy_scores(x.reshape(-1, 2, *y.shape[1:]), y, factor)
                first = scores if first is None else first
                difference = scores - first
                error = float(difference.std()) / math.sqrt(len(y))
                energy = high_band_energy(x.double(), twice.double(), factor)
                print(f"| {' | '.join(f'{value:g}' for value in choice)} | {float(scores.mean()):.2f} "
                      f"| {float(difference.mean()):+.2f} ±{error:.2f} | {energy:.2f} | {seconds:.2f} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
