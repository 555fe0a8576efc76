"""References that are none of the training images' kind: how near their samples are to the domain.

    python -m benchmarks.out_of_domain --ckpt data/pretrained/toon64 --data data/toon --ref 'data/animals:test[0:80]'
        --show data/references --features FEATURES.pt [--preset draft fast] [--factor 8] [--sheet sheet.png]

Rows: plain matched noise, and as the checkpoint was calibrated, one sample per reference. FD: Frechet distance from
1,000 real images of the domain in the features that `benchmarks.features` made; low: RMS distance of the low band from
the reference's. The sheet shows the references of --show and their samples, a column per row of the table.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.features import features_of, load_features
from benchmarks.trained import sample
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.images import from_tensor
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.metrics.bands import frechet_distance, low_band_error
from ilvr_lightning.visual.grids import Column, draw_grid


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--ref", nargs="+", required=True)
    parser.add_argument("--show", nargs="+", default=[])
    parser.add_argument("--features", required=True, help="what benchmarks.features saved, or a name such as efflite")
    parser.add_argument("--preset", nargs="+", default=["draft", "fast"])
    parser.add_argument("--factor", type=int, nargs="+", default=[8])
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    denoiser, network = loaded.fastest(), load_features(args.features)

    def read(given: list[str]) -> tuple[Tensor, list[str]]:
        found = find_references(given, loaded.image_shape, "crop")
        return torch.stack([r.tensor for r in found]), [r.sha256 for r in found]

    target = features_of(network, read([f"{args.data}:train[0:1000]"])[0])
    y, hashes = read(args.ref)
    shown = read(args.show) if args.show else None
    sheet = [column("reference", shown[0])] if shown else []
    print("| N | preset | | FD | low |\n|---|---|---|---|---|")
    for factor in args.factor:
        for preset in args.preset:
            plain = replace(SamplingPlan.preset(preset, factor=factor), clip=loaded.clip)
            for name, plan in {"matched noise": plain, "calibrated": loaded.preset(preset, factor)}.items():
                x = sample(denoiser, plan, y, hashes, 0, 48)
                distance = frechet_distance(features_of(network, x), target)
                low = low_band_error(x.double(), y.double(), factor)
                print(f"| {factor} | {preset} | {name} | {distance:.2f} | {low:.4f} |", flush=True)
                if shown:
                    sheet.append(column(f"{preset}, {name}", sample(denoiser, plan, *shown, 0, 48)))
    if args.sheet and shown:
        draw_grid(sheet, "").save(args.sheet, optimize=True)


def column(label: str, images: Tensor) -> Column:
    """A column of the sheet, of images (B, C, H, W)."""
    return Column(label=label, rows=[[pixels] for pixels in from_tensor(images)])


if __name__ == "__main__":
    main()
