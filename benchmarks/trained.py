"""Samplers on a trained network: blur, grain and fidelity to the reference at equal evaluations.

    python -m benchmarks.trained --ckpt CKPT --ref 'data/toon:test[0:256]' [--factor 4 8] [--seeds 3] [--only TEXT]

References are held-out images of the training domain, one sample each, so that samples and references should have one
distribution. Energy is the high band's over the references' (below 1 blur, above 1 grain), with the largest of any
picture; high the Frechet distance of the high band; low the RMS distance of the low band. Mean and standard deviation
over the seeds. The first row is other real images in the samples' place: the floor of the measure.
"""

import argparse
import functools
import statistics
import time
from dataclasses import asdict, replace

import torch
from torch import Tensor

from benchmarks.exact import solver as exact_solver
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.evaluation.bands import BandFigures, band_figures
from ilvr_lightning.pretrained.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.session import find_references


def rows() -> dict[str, SamplingPlan]:
    """What is compared, by name."""
    solver = functools.partial(exact_solver, clip=True)
    table: dict[str, SamplingPlan] = {}
    for n in (10, 20, 50):
        table[f"DDPM as released, {n} uniform"] = SamplingPlan.preset("ilvr_adm", num_steps=n)
        table[f"DDPM as the paper, {n} uniform"] = SamplingPlan.preset("paper", num_steps=n)
    for n in (10, 20):
        table[f"DDIM, fresh noise, {n} log-SNR"] = SamplingPlan(sampler="ddim", num_steps=n, spacing="logsnr")
        table[f"2M, fixed, {n}"] = solver(n, reference_noise="fixed")
        table[f"2M, ideal, {n}"] = solver(n, kernel="ideal", orthogonal=False)
        table[f"2M, uniform, {n}"] = solver(n, spacing="uniform")
        table[f"2M, quadratic, {n}"] = solver(n, spacing="quadratic")
        for eta in (0.0, 0.3, 0.5, 1.0):
            for kappa in (0.0, 0.75):
                table[f"2M, eta {eta:g}, kappa {kappa:g}, {n}"] = solver(n, eta=eta, eps_extrapolation=kappa)
        table[f"2M, eta 1, kappa 0.5, {n}"] = solver(n, eta=1.0, eps_extrapolation=0.5)
        table[f"2M, eta 1, kappa 1, {n}"] = solver(n, eta=1.0, eps_extrapolation=1.0)
        table[f"DDIM, matched, eta 1, {n}"] = solver(n, sampler="ddim", eta=1.0)
    table["2M, eta 1, kappa 0, 50"] = solver(50, eta=1.0)
    table["DDPM as the paper, 100 uniform"] = SamplingPlan.preset("paper", num_steps=100)
    return table


@torch.no_grad()
def sample(loaded: LoadedDenoiser, plan: SamplingPlan, y: Tensor, hashes: list[str], seed: int, batch: int) -> Tensor:
    """(B, C, H, W) one sample a reference."""
    made = []
    for first in range(0, len(y), batch):
        part = slice(first, first + batch)
        seeds = [image_seed(seed, sha256, 0) for sha256 in hashes[part]]
        made.append(generate(loaded, loaded.schedule, plan, seeds=seeds, shape=loaded.image_shape, reference=y[part]))
    return torch.cat(made).clamp(-1, 1)


def line(name: str, figures: list[BandFigures], seconds: float | None) -> str:
    """A row of the table."""

    def spread(key: str, digits: int) -> str:
        values = [asdict(f)[key] for f in figures]
        deviation = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    worst = max(f.worst for f in figures)
    cells = [name, spread("high", 3), spread("energy", 2), f"{statistics.mean(f.median for f in figures):.2f}"]
    cells += [f"{worst:.1f}", spread("low", 4), "" if seconds is None else f"{seconds:.3f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table a factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--ref", nargs="+", required=True)
    parser.add_argument("--factor", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--real", nargs="+", default=[], help="other real images, for the floor")
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    references = find_references(args.ref, loaded.image_shape, "crop")
    y, hashes = torch.stack([r.tensor for r in references]), [r.sha256 for r in references]
    for factor in args.factor:
        print(f"\nN={factor}, {len(y)} references, {args.seeds} seeds")
        print("| sampler, evaluations | high | energy | median | largest | low | seconds a picture |")
        print("|---|---|---|---|---|---|---|")
        if args.real:
            real = torch.stack([r.tensor for r in find_references(args.real, loaded.image_shape, "crop")])
            print(line("other real images", [band_figures(real[: len(y)], y, factor)], None))
        for name, plan in rows().items():
            if not any(text in name for text in args.only):
                continue
            start, figures = time.perf_counter(), []
            for seed in range(args.seeds):
                x = sample(loaded, replace(plan, factor=factor), y, hashes, seed, args.batch_size)
                figures.append(band_figures(x, y, factor))
            seconds = (time.perf_counter() - start) / args.seeds / len(y)
            print(line(name, figures, seconds), flush=True)


if __name__ == "__main__":
    main()
