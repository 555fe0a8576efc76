"""Samplers on a trained network: blur, grain, fidelity and diversity at equal evaluations.

    python -m benchmarks.trained --ckpt CKPT --ref 'data/toon:test' [--factor 4 8] [--seeds 3] [--only GLOB ...]
        [--real 'data/toon:train[0:1000]'] [--features FEATURES.pt]

References are held-out images of the training domain, one sample each, so that samples and references should have one
distribution. Mean and standard deviation over the seeds of:

- FD: Frechet distance from the references in the feature space that `benchmarks.features` made;
- high: Frechet distance of the high band alone, in principal components, over the variance;
- energy: of the high band, over the references' (below 1 blur, above 1 grain); worst: the largest of any image;
- low: RMS distance of the low band from the reference's;
- spectrum: power over that of the references, by octaves of the radial frequency, the finest last;
- checkerboard: the same at the checkerboard of two pixels;
- diversity: mean pairwise RMS distance between 10 samples of one reference, over 10 references.

The first row is other real images in the samples' place: the floor of the measures.
"""

import argparse
import functools
import statistics
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor

from benchmarks.features import features_of, load_features
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.evaluation.features import Extractor
from ilvr_lightning.metrics.bands import METRICS, frechet_distance, grain_ratios, measure, octave_ratios
from ilvr_lightning.metrics.pairs import pairwise_rms
from tests.support.gaussian import solver as exact_solver


def rows(loaded: LoadedDenoiser, factor: int) -> dict[str, SamplingPlan]:
    """What is compared at one N, by name."""
    solver = functools.partial(exact_solver, clip=True)
    table: dict[str, SamplingPlan] = {}
    for n in (10, 20, 50, 100, 1000):
        table[f"DDPM as released, {n}"] = SamplingPlan.preset("ilvr_adm", num_steps=n)
        table[f"DDPM as the paper, {n}"] = SamplingPlan.preset("paper", num_steps=n)
        table[f"DDIM, fresh noise, {n}"] = SamplingPlan.preset("paper", sampler="ddim", num_steps=n, spacing="logsnr")
        table[f"2M, eta 0, {n}"] = solver(n)
        table[f"2M, eta 1, {n}"] = solver(n, eta=1.0)
    for n in (10, 20):
        for eta in (0.3, 0.5):
            table[f"2M, eta {eta:g}, {n}"] = solver(n, eta=eta)
        for kappa in (0.5, 0.75, 1.0):
            table[f"2M, eta 0, kappa {kappa:g}, {n}"] = solver(n, eps_extrapolation=kappa)
            table[f"2M, eta 1, kappa {kappa:g}, {n}"] = solver(n, eta=1.0, eps_extrapolation=kappa)
        table[f"2M, eta 0, fixed, {n}"] = solver(n, reference_noise="fixed")
        table[f"2M, eta 1, fixed, {n}"] = solver(n, eta=1.0, reference_noise="fixed")
        table[f"2M, eta 1, ideal, {n}"] = solver(n, eta=1.0, kernel="ideal", orthogonal=False)
        table[f"2M, eta 1, uniform, {n}"] = solver(n, eta=1.0, spacing="uniform")
        table[f"2M, eta 1, quadratic, {n}"] = solver(n, eta=1.0, spacing="quadratic")
        table[f"DDIM, matched, eta 1, {n}"] = solver(n, sampler="ddim", eta=1.0)
    for preset in ("draft", "fast", "best"):
        table[preset] = loaded.preset(preset, factor)
    return {name: replace(plan, factor=factor) for name, plan in table.items()}


@torch.no_grad()
def sample(denoiser: Denoiser, plan: SamplingPlan, y: Tensor, hashes: list[str], seed: int, batch: int) -> Tensor:
    """(B, C, H, W) one sample per reference."""
    made = []
    for first in range(0, len(y), batch):
        part = slice(first, first + batch)
        seeds = [image_seed(seed, sha256, 0) for sha256 in hashes[part]]
        shape = (y.shape[1], y.shape[2], y.shape[3])
        made.append(generate(denoiser, plan, seeds=seeds, shape=shape, reference=y[part]))
    return torch.cat(made).clamp(-1, 1)


def diversity(denoiser: Denoiser, plan: SamplingPlan, y: Tensor, hashes: list[str], seed: int, batch: int) -> float:
    """Mean over references of the mean RMS distance between ten samples of each, in [-1, 1]."""
    each = y.repeat_interleave(10, 0)
    names = [f"{sha256}/{k}" for sha256 in hashes for k in range(10)]
    made = sample(denoiser, plan, each, names, seed, batch)
    return statistics.mean(pairwise_rms(group) for group in torch.split(made, 10))


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one seed."""

    figures: dict[str, float]
    octaves: list[float]
    checkerboard: float
    distance: float | None

    @classmethod
    def of(cls, x: Tensor, y: Tensor, factor: int, features: Extractor | None) -> "Row":
        """Samples x against their references y."""
        distance = None if features is None else frechet_distance(features_of(features, x), features_of(features, y))
        return cls(
            figures=measure(x, y, factor),
            octaves=octave_ratios(x, y),
            checkerboard=grain_ratios(x, y)[0],
            distance=distance,
        )


def line(name: str, rows: list[Row], spread: float | None = None, seconds: float | None = None) -> str:
    """A row of the table."""

    def cell(values: list[float], digits: int) -> str:
        deviation = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    distances = [row.distance for row in rows if row.distance is not None]
    octaves = [statistics.mean(values) for values in zip(*(row.octaves for row in rows), strict=True)]
    cells = [
        name,
        cell(distances, 2) if distances else "",
        *(cell([row.figures[name] for row in rows], 4 if name == "low" else 2) for name in METRICS),
        " ".join(f"{ratio:.2f}" for ratio in octaves),
        cell([row.checkerboard for row in rows], 1),
        "" if spread is None else f"{spread:.3f}",
        "" if seconds is None else f"{seconds:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table per factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--ref", nargs="+", required=True)
    parser.add_argument("--factor", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="rows to make")
    parser.add_argument("--real", nargs="+", default=[], help="other real images, for the floor")
    parser.add_argument("--diversity", type=int, default=10, help="references that it is measured on; 0 leaves it out")
    parser.add_argument("--features", help="what benchmarks.features saved, or a name such as efflite")
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    denoiser = loaded.fastest()
    features = None if args.features is None else load_features(args.features)
    references = find_references(args.ref, loaded.image_shape, "crop")
    y, hashes = torch.stack([r.tensor for r in references]), [r.sha256 for r in references]
    for factor in args.factor:
        print(f"\nN={factor}, {len(y)} references, {args.seeds} seeds")
        columns = ["sampler, evaluations", "FD", *METRICS, "spectrum", "checkerboard", "diversity", "s per image"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        if args.real:
            real = torch.stack([r.tensor for r in find_references(args.real, loaded.image_shape, "crop")])
            print(line("other real images", [Row.of(real[: len(y)], y, factor, features)]))
        for name, plan in rows(loaded, factor).items():
            if not any(fnmatch(name, pattern) for pattern in args.only):
                continue
            seconds, made = 0.0, []
            for seed in range(args.seeds):
                start = time.perf_counter()
                x = sample(denoiser, plan, y, hashes, seed, args.batch_size)
                seconds += (time.perf_counter() - start) / args.seeds / len(y)
                made.append(Row.of(x, y, factor, features))
            few = args.diversity
            spread = diversity(denoiser, plan, y[:few], hashes[:few], args.seeds, args.batch_size) if few else None
            print(line(name, made, spread, seconds), flush=True)


if __name__ == "__main__":
    main()
