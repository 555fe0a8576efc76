"""Whether a model's samples are like images that it has not seen, and whether it merely repeats those that it has.

    python -m benchmarks.fidelity --ckpt CKPT --data data/toon --features FEATURES.pt [--images 500] [--factor 4 8 16]

Rows: real training images in the samples' place (what a perfect memory would reach), unconditional samples, and ILVR
samples after the held-out images, one each; `fast`, with the gains that the checkpoint holds. Measures against the
held-out images:

- KD x 1000 (Binkowski et al. 2018, the unbiased estimate) and FD, in the features that `benchmarks.features` made;
- octaves: power over theirs by octaves of the radial frequency, the finest last (below 1 blur, above 1 grain);
- checkerboard, stripes: power over theirs at the checkerboard of two pixels, and at stripes of two pixels;
- nearest: median RMS distance in [-1, 1] to the nearest training image or its mirror image; the last row has the
  held-out images' own;
- copies: how many pictures are nearer to a training image than all but 1% of the held-out images are; 1% is chance.
"""

import argparse
import math

import torch
from torch import Tensor

from benchmarks.features import features_of, load_features
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.dataset import ImageDataset
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.plan import DEFAULT_PRESET
from ilvr_lightning.evaluation.features import Extractor
from ilvr_lightning.metrics.bands import frechet_distance, grain_ratios, octave_ratios
from ilvr_lightning.metrics.neighbours import copies, kernel_distance, nearest


def images_of(rows: ImageDataset, count: int) -> Tensor:
    """(count, C, H, W) the first images of a split."""
    return torch.stack([rows[i][0] for i in range(min(count, len(rows)))])


def samples(loaded: LoadedDenoiser, count: int, factor: int | None, y: Tensor, batch: int = 100) -> Tensor:
    """(count, C, H, W) unconditional samples, or one after each of y."""
    plan, denoiser = loaded.preset(DEFAULT_PRESET, factor or 8), loaded.fastest()
    made = []
    for first in range(0, count, batch):
        part = range(first, min(first + batch, count))
        made.append(
            generate(
                denoiser, plan, seeds=[derive_seed("fidelity", i) for i in part],
                shape=loaded.image_shape, reference=None if factor is None else y[part.start : part.stop],
            )
        )  # fmt: skip
    return torch.cat(made).clamp(-1, 1)


def distances(x: Tensor, train: Tensor) -> Tensor:
    """RMS distance (B,) of each picture to the nearest training image, mirrored or not."""
    both = torch.cat([train, train.flip(-1)]).flatten(1)
    return nearest(x.flatten(1), both)[0] / math.sqrt(x[0].numel())


def row(name: str, x: Tensor, y: Tensor, train: Tensor, features: Extractor) -> str:
    """Pictures x against held-out images y."""
    a, b = features_of(features, x), features_of(features, y)
    found, usual = distances(x, train), distances(y, train)
    cells = [
        name, f"{1000 * kernel_distance(a, b):.1f}", f"{frechet_distance(a, b):.2f}",
        " ".join(f"{r:.2f}" for r in octave_ratios(x, y)), *(f"{r:.2f}" for r in grain_ratios(x, y)),
        f"{found.median():.3f}", f"{int(copies(found, usual).sum())} of {len(x)}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--features", required=True, help="what benchmarks.features saved, or a name such as efflite")
    parser.add_argument("--images", type=int, default=500, help="samples, and held-out images, at most")
    parser.add_argument("--factor", type=int, nargs="*", default=[4, 8, 16])
    args = parser.parse_args()
    loaded, features = load_denoiser(args.ckpt), load_features(args.features)
    channels, height, width = loaded.image_shape
    data = ImageDataModule(DataConfig(path=args.data, image_size=(height, width), channels=channels, flip=False))
    data.setup()
    assert data.train is not None and data.validation is not None
    train, y = images_of(data.train, len(data.train)), images_of(data.validation, args.images)
    real, rest = train[: len(y)], train[len(y) :]
    print("| | KD x 1000 | FD | octaves | checkerboard | stripes | nearest | copies |\n" + 8 * "|---" + "|")
    print(row("training images", real, y, rest, features), flush=True)
    print(row("unconditional", samples(loaded, len(y), None, y), y, train, features), flush=True)
    for factor in args.factor:
        print(row(f"N={factor}", samples(loaded, len(y), factor, y), y, train, features), flush=True)
    print(row("held-out images", y, y, train, features))


if __name__ == "__main__":
    main()
