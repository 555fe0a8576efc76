"""References with noise or compression: what --reference-sigma changes on a trained network.

    python -m benchmarks.noisy_references --ckpt data/pretrained/toon64 --data data/toon --features FEATURES.pt
        [--preset fast] [--factor 4 8] [--images 32] [--sheet sheet.png]

Held-out images get white noise (in [-1, 1]) or are stored as JPEG files, and are followed, with two samples each.
Score: energy score of the whole picture against the image without noise (lower is better); difference: from the row
above that follows the noise (reference_sigma 0), image by image, with its standard error; FD: Frechet distance of the
samples from 1,000 real images in the features that `benchmarks.features` made. The sheet shows, per row of the table
at the last N, the first eight references or samples.
"""

import argparse
import io
import math
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from benchmarks.features import features_of, load_features
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.fitting import fit_reference
from ilvr_lightning.data.images import from_tensor, open_image, to_image
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.metrics.bands import energy_scores, frechet_distance

SAMPLES = 2
"""Per reference: the fewest that an energy score takes."""


def with_noise(image: Tensor, sigma: float, number: int) -> Image.Image:
    """An image (C, H, W) with white noise."""
    generator = torch.Generator().manual_seed(number)
    return to_image(from_tensor(image + sigma * torch.randn(image.shape, generator=generator)))


def compressed(image: Tensor, quality: int) -> bytes:
    """An image (C, H, W) as a JPEG file."""
    content = io.BytesIO()
    to_image(from_tensor(image)).save(content, "JPEG", quality=quality)
    return content.getvalue()


@torch.no_grad()
def main() -> None:
    """Print a table for each factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--features", required=True, help="what benchmarks.features saved, or a name such as efflite")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--factor", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--first", type=int, default=200, help="number of the first held-out image")
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    denoiser = loaded.fastest()
    size = loaded.image_shape[1], loaded.image_shape[2]
    rows = f"{args.data}:test[{args.first}:{args.first + args.images}]", f"{args.data}:train[0:1000]"
    y, real = (torch.stack([r.tensor for r in find_references([row], loaded.image_shape, "crop")]) for row in rows)
    network = load_features(args.features)
    target = features_of(network, real)
    kinds = {"none": list(map(to_image, from_tensor(y)))} | {
        f"noise {sigma}": [with_noise(image, sigma, i) for i, image in enumerate(y)] for sigma in (0.05, 0.2)
    }
    references = {
        name: [fit_reference("", image, size, y.shape[1]) for image in images] for name, images in kinds.items()
    }
    for quality in (30, 10):
        fitted = []
        for image in y:
            with open_image(compressed(image, quality)) as opened:
                fitted.append(fit_reference("", opened, size, y.shape[1]))
        references[f"JPEG {quality}"] = fitted
    seeds = [derive_seed("noisy references", i) for i in range(SAMPLES * len(y))]
    for factor in args.factor:
        print(f"\n{args.preset}, N={factor}, {len(y)} held-out images, {SAMPLES} samples each")
        print(f"| reference | reference_sigma | score | difference | FD |\n{5 * '|---'}|")
        sheet = []
        for name, given in references.items():
            noisy = torch.stack([r.tensor for r in given])
            sheet.append(noisy[:8])
            known = [float(name.split()[1])] * len(y) if name.startswith("noise") else None
            first = None
            for label, sigmas in {"0": [0.0] * len(y), "known": known, "auto": [r.noise for r in given]}.items():
                if sigmas is None or (label == "auto" and not any(sigmas)):
                    continue
                made = []
                for i in range(0, len(y), 24):
                    part = slice(i, i + 24)
                    twice = tuple(sigma for sigma in sigmas[part] for _ in range(SAMPLES))
                    plan = replace(loaded.preset(args.preset, factor), reference_sigma=twice)
                    made.append(generate(
                        denoiser, plan, seeds=seeds[SAMPLES * i : SAMPLES * (i + 24)], shape=loaded.image_shape,
                        reference=noisy[part].repeat_interleave(SAMPLES, 0),
                    ))  # fmt: skip
                x = torch.cat(made).clamp(-1, 1)
                sheet.append(x[::SAMPLES][:8])
                scores = energy_scores(x.reshape(-1, SAMPLES, *y.shape[1:]), y, None)
                first = scores if first is None else first
                difference = scores - first
                error = float(difference.std()) / math.sqrt(len(y))
                distance = frechet_distance(features_of(network, x), target)
                mean = f" ({sum(sigmas) / len(sigmas):.2f})" if label == "auto" else ""
                print(f"| {name} | {label}{mean} | {float(scores.mean()):.2f} "
                      f"| {float(difference.mean()):+.2f} ±{error:.2f} | {distance:.2f} |", flush=True)  # fmt: skip
        if args.sheet:
            save_image((torch.cat(sheet) + 1) / 2, args.sheet, nrow=8, padding=1)


if __name__ == "__main__":
    main()
