"""Whether a sampler draws from p(x | phi_N(x)) of a trained network: held-out images against their own samples.

    python -m benchmarks.posterior --ckpt data/pretrained/toon64 --data data/toon --out FOLDER [--factor 8]
        [--references 100] [--samples 16] [--only GLOB ...] [--precision bf16] [--plot FIGURE.png]

Each reference is a held-out image of a set whose attributes are known (data/*/attributes.json). If network and sampler
are right, the image and the K samples after its low band are exchangeable; docs/posterior.md says what follows and how
to read the columns:

- octaves, attributes: ranks of the images among their samples, in the energy of each octave above N and in the log-odds
  of each value of the attributes. rank: the mean, 0.5 if right, above if the samples have too little (octaves from the
  coarsest). spread: 1 if right, above if the samples vary too little. p: of the Kolmogorov-Smirnov distances;
- TARP: mean |coverage - credibility| for the distances from random images, in pixels of the high band and in features,
  with the 95% limit of a right sampler;
- Brier: of the shares of samples that show each attribute, against the drawing's truth; excess: by how much it exceeds
  what it would be if the shares were the true probabilities, 0 if right; ECE: the expected calibration error; both with
  the limit of a right sampler;
- AUROC: of a classifier that tells an image from the samples of its low band; unpaired: of one that does not know which
  belong together. 0.5 if right, with the standard deviation that a right sampler has.

Rows called unconditional have samples that follow no reference, which tell the network's errors from the sampler's;
the row "training images" has real images in the samples' place. Samples are kept in --out: an interrupted run goes on
where it was, and --cached prints what is there. --scalars prints the test of each scalar, too.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attributes import AttributeNetwork, Attributes, accuracies, log_odds, train_network
from benchmarks.exchangeability import (
    RankTest,
    Reliability,
    brier,
    brier_excess,
    fair_brier,
    marginal_auroc,
    mean_and_error,
    paired_auroc,
    rank_test,
    reliability,
)
from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.references import Reference, find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.noise import derive_seed, image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.module import ILVRSampler

POINTS = 4
"""Random images from which distances are taken."""
SAVE_EVERY = 60
"""Seconds between saves of unfinished samples."""
TRAINING_IMAGES = "training images"
DEFAULT_ROWS = (
    "paper, 100", "released, 100", "draft", "fast", "best", "unconditional, DDPM 100", "unconditional, 2M 50",
    TRAINING_IMAGES,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the samples of a row come from."""

    plan: SamplingPlan | None
    """None for training images."""
    conditional: bool = True


def rows(loaded: LoadedDenoiser, factor: int) -> dict[str, Source]:
    """What is compared at one N, by name, each preset with the settings that the checkpoint holds for it."""
    table = {}
    for n in (20, 100, 1000):
        table[f"paper, {n}"] = Source(plan=loaded.preset("paper", factor, num_steps=n))
    table["released, 100"] = Source(plan=loaded.preset("ilvr_adm", factor))
    for preset in ("draft", "fast", "best"):
        table[preset] = Source(plan=loaded.preset(preset, factor))
    for n in (100, 1000):
        table[f"unconditional, DDPM {n}"] = Source(plan=loaded.preset("paper", num_steps=n), conditional=False)
    table["draft, 4 candidates"] = Source(plan=loaded.preset("draft", factor, candidates=4))
    for name in ("draft", "fast", "best"):
        plan = SamplingPlan.preset(name, clip=loaded.clip)
        table[f"unconditional, 2M {plan.num_steps}"] = Source(plan=plan, conditional=False)
    table[TRAINING_IMAGES] = Source(plan=None, conditional=False)
    return table


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share."""

    sampler: ILVRSampler
    references: list[Reference]
    samples: int
    """K, per reference."""
    batch: int


def batch_of(setting: Setting, source: Source, part: range) -> Tensor:
    """(B, C, H, W) 8-bit samples number `part` of all, those of one reference after another."""
    assert source.plan is not None
    references = [setting.references[i // setting.samples] for i in part]
    channels, height, width = references[0].tensor.shape
    if source.conditional:
        seeds = [image_seed(0, r.sha256, i % setting.samples) for r, i in zip(references, part, strict=True)]
    else:
        seeds = [image_seed(0, None, i) for i in part]
    return to_8_bits(
        generate(
            setting.sampler.denoiser, source.plan, seeds=seeds, shape=(channels, height, width),
            reference=torch.stack([r.tensor for r in references]) if source.conditional else None,
            device=setting.sampler.device,
        ).cpu()
    )  # fmt: skip


def to_8_bits(x: Tensor) -> Tensor:
    """Images in [-1, 1] as sample.py writes them."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Store:
    """Samples in a folder, one file per row and N, which an interrupted run continues.

    Args:
        folder: is made.
        made_by: what all rows depend on: the checkpoint, the precision, the references.
        samples: K; the samples of one reference follow those of another.
    """

    def __init__(self, folder: Path, made_by: dict[str, object], samples: int) -> None:
        self.folder, self.made_by, self.samples = folder, made_by, samples
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, source: Source) -> Tensor | None:
        """(n, C, H, W) the 8-bit samples that are there.

        Raises:
            UserError: they were made with other settings.
        """
        path = self._path(name, source)
        if not path.exists():
            return None
        content = torch.load(path, weights_only=True)
        if content["made_by"] != self._made_by(source):
            raise UserError(f"{path} was made with another checkpoint, precision or plan; give another --out")
        images: Tensor = content["images"]
        return images

    def complete(self, name: str, source: Source, total: int, batch: int, make: Callable[[range], Tensor]) -> Tensor:
        """(total, C, H, W) the samples of a row; make(part) makes those that are missing."""
        images = self.read(name, source)
        done = 0 if images is None else len(images)
        parts = [] if images is None else [images]
        saved = start = time.monotonic()
        for first in range(done, total, batch):
            parts.append(make(range(first, min(first + batch, total))))
            if time.monotonic() - saved > SAVE_EVERY:
                self._write(name, source, torch.cat(parts))
                saved = time.monotonic()
        images = torch.cat(parts)
        if done < total:
            self._write(name, source, images)
            print(f"made {total - done} samples of {name!r} in {time.monotonic() - start:.0f} s", flush=True)
        return images[:total]

    def _path(self, name: str, source: Source) -> Path:
        assert source.plan is not None
        words = re.sub("[^a-z0-9]+", "-", name.lower())
        factor = f"-N{source.plan.factor}" if source.conditional else ""
        return self.folder / f"{words}{factor}-K{self.samples}.pt"

    def _made_by(self, source: Source) -> str:
        assert source.plan is not None
        return json.dumps({**self.made_by, "plan": asdict(source.plan)}, sort_keys=True)

    def _write(self, name: str, source: Source, images: Tensor) -> None:
        content = {"made_by": self._made_by(source), "images": images}
        write_atomically(self._path(name, source), lambda partial: torch.save(content, partial))


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The set's attributes, and what sees them."""

    attributes: Attributes
    network: AttributeNetwork
    used: list[int]
    """The attributes that the network sees well."""
    codes: Tensor
    """(R, A) the references' values."""
    base_rates: list[Tensor]
    """For each attribute its values' shares of the training split."""
    points: Tensor
    """(R, POINTS, C, H, W) random images."""
    real: Tensor
    """(n, C, H, W) training images that the network has not seen."""

    def one_hot(self, i: int) -> Tensor:
        """(R, values) attribute i of the references."""
        return F.one_hot(self.codes[:, i], len(self.base_rates[i])).double()


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a row."""

    references: int
    octaves: RankTest
    attributes: RankTest
    pixels: RankTest
    features: RankTest
    brier: tuple[float, float]
    """Mean over attributes and references, and its standard error over the references, as below."""
    excess: tuple[float, float]
    """The Brier score above what it would be if the shares were the true probabilities, and its 95% limit."""
    base_rate: float
    classifier: float
    """The Brier score of what the network sees in the images themselves."""
    reliability: Reliability
    paired: tuple[float, float]
    marginal: tuple[float, float]


def high_band(x: Tensor, factor: int) -> Tensor:
    """What the orthogonal bicubic filter of N removes from x (B, C, H, W)."""
    return x - LowPassFilter((x.shape[2], x.shape[3]), factor, orthogonal=True)(x)


def log_octave_energies(x: Tensor, factor: int) -> Tensor:
    """(B, octaves) of x (B, C, H, W), between the orthogonal filters of N, N/2 ... 1, the finest last."""
    bands = [x - high_band(x, 2**k) for k in range(factor.bit_length() - 1, -1, -1)]
    energies = [(b - a).square().mean((1, 2, 3)) for a, b in pairwise(bands)]
    return torch.stack(energies, 1).double().clamp(min=1e-12).log()


def figures(truth: Truth, y: Tensor, samples: Tensor, factor: int) -> Result:
    """Compare images y (R, C, H, W) with their samples (R, K, C, H, W), both in [-1, 1]."""
    groups = torch.cat([y[:, None], samples], 1)
    shape, flat = groups.shape[:2], groups.flatten(0, 1)
    features, logits = truth.network.see(flat)
    octaves = log_octave_energies(flat, factor).reshape(*shape, -1)
    odds = torch.cat([log_odds(logits[i]) for i in truth.used], 1).reshape(*shape, -1)
    features = features.reshape(*shape, -1)
    points = truth.points[: len(y)].flatten(0, 1)
    seen_points = truth.network.see(points)[0].reshape(len(y), POINTS, -1)
    high, high_points = (high_band(x, factor).flatten(1) for x in (flat, points))
    pixels = torch.cdist(high.reshape(*shape, -1), high_points.reshape(len(y), POINTS, -1))
    seen = [F.one_hot(logits[i].argmax(1), logits[i].shape[1]).double().reshape(*shape, -1) for i in truth.used]
    real = [truth.one_hot(i)[: len(y)] for i in truth.used]
    pairs = list(zip(seen, real, strict=True))
    both = torch.cat([features, octaves], 2)
    score = torch.stack([fair_brier(s[:, 1:], t) for s, t in pairs]).mean(0)
    excess, limit = brier_excess(torch.cat(seen, 2), torch.cat(real, 1))
    return Result(
        references=len(y),
        octaves=rank_test(octaves), attributes=rank_test(odds),
        pixels=rank_test(pixels), features=rank_test(torch.cdist(features, seen_points)),
        brier=mean_and_error(score), excess=(excess / len(pairs), limit / len(pairs)),
        base_rate=_mean([brier(truth.base_rates[i], t) for i, t in zip(truth.used, real, strict=True)]),
        classifier=_mean([brier(s[:, 0], t) for s, t in pairs]),
        reliability=reliability(torch.cat(seen, 2), torch.cat(real, 1)),
        paired=paired_auroc(both), marginal=marginal_auroc(both),
    )  # fmt: skip


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


COLUMNS = (
    "samples", "references", "octaves: rank", "spread", "p", "attributes: spread", "p", "TARP pixels (limit)",
    "TARP features (limit)", "Brier", "excess (limit)", "ECE (limit)", "AUROC", "unpaired",
)  # fmt: skip


def line(name: str, result: Result) -> str:
    """A row of the table."""

    def with_error(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.2f} ±{pair[1]:.2f}"

    cells = [
        name, f"{result.references}",
        " ".join(f"{rank:.2f}" for rank in result.octaves.mean.tolist()),
        with_error(result.octaves.pooled_spread), f"{result.octaves.pooled_p:.3f}",
        with_error(result.attributes.pooled_spread), f"{result.attributes.pooled_p:.3f}",
        *("{:.3f} ({:.3f})".format(*test.pooled_gap) for test in (result.pixels, result.features)),
        with_error(result.brier), "{:.3f} ({:.3f})".format(*result.excess),
        f"{result.reliability.error:.3f} ({result.reliability.limit:.3f})",
        with_error(result.paired), with_error(result.marginal),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def scalar_lines(truth: Truth, result: Result) -> Iterator[str]:
    """A line per scalar: its mean rank, spread, Kolmogorov-Smirnov distance with its p value, and mean |coverage -
    credibility|."""
    octaves = len(result.octaves.mean)
    names = list(truth.attributes.values)
    tests = [
        ([f"octave {2 ** (octaves - i)} to {2 ** (octaves - 1 - i)} px" for i in range(octaves)], result.octaves),
        ([f"{names[i]} {value or 'none'}" for i in truth.used for value in truth.attributes.values[names[i]]],
         result.attributes),
        ([f"distance from image {i + 1}, pixels" for i in range(POINTS)], result.pixels),
        ([f"distance from image {i + 1}, features" for i in range(POINTS)], result.features),
    ]  # fmt: skip
    for labels, test in tests:
        for label, *values in zip(labels, *(t.tolist() for t in (test.mean, test.spread, test.ks, test.p, test.gap)),
                                  strict=True):  # fmt: skip
            yield f"    {label:32}" + "  ".join(f"{value:.3f}" for value in values)


def find_truth(args: argparse.Namespace, shape: tuple[int, int, int]) -> Truth:
    """The attributes and their network, trained once per folder of samples."""

    def images(split: str, first: int = 0, last: int | None = None) -> Tensor:
        rows = find_references([f"{args.data}:{split}[{first}:{last or ''}]"], shape)
        return torch.stack([r.tensor for r in rows])

    attributes = Attributes.read(args.data)
    codes = attributes.of("train")
    learnt = len(codes) * 4 // 5
    sizes = [len(values) for values in attributes.values.values()]
    path = args.out / "attributes.pt"
    if path.exists():
        network = AttributeNetwork(sizes).eval()
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        start = time.monotonic()
        network = train_network(images("train", 0, learnt), codes[:learnt], sizes, args.epochs)
        write_atomically(path, lambda partial: torch.save(network.state_dict(), partial))
        print(f"trained the network that sees attributes in {time.monotonic() - start:.0f} s", flush=True)
    rates = [torch.bincount(codes[:, i], minlength=n).double() / len(codes) for i, n in enumerate(sizes)]
    held_out = attributes.of("test")
    right = accuracies(network, images("test"), held_out)
    for i, (name, accuracy) in enumerate(zip(attributes.values, right, strict=True)):
        kept = "" if accuracy >= args.accuracy else "; not used"
        print(f"{name:10} seen in {accuracy:.3f} of the held-out images; chance {float(rates[i].max()):.3f}{kept}")
    used = [i for i, accuracy in enumerate(right) if accuracy >= args.accuracy]
    if not used:
        raise UserError(f"no attribute is seen in {args.accuracy:g} of the images; train longer (--epochs)")
    real = images("train", learnt)
    generator = torch.Generator().manual_seed(derive_seed("posterior", "points"))
    chosen = torch.randint(len(real), (args.references, POINTS), generator=generator)
    return Truth(
        attributes=attributes, network=network, used=used,
        codes=held_out[args.first : args.first + args.references], base_rates=rates,
        points=real[chosen], real=real,
    )  # fmt: skip


def samples_of_row(
    args: argparse.Namespace, name: str, source: Source, setting: Setting, store: Store, truth: Truth
) -> Tensor:
    """(R, K, C, H, W) 8-bit; with --cached those of the references that are complete."""
    total = len(setting.references) * setting.samples
    if source.plan is None:
        generator = torch.Generator().manual_seed(derive_seed("posterior", TRAINING_IMAGES))
        images = to_8_bits(truth.real[torch.randint(len(truth.real), (total,), generator=generator)])
    elif args.cached:
        found = store.read(name, source)
        images = torch.empty(0, *truth.real.shape[1:]) if found is None else found[:total]
        images = images[: len(images) // setting.samples * setting.samples]
    else:
        images = store.complete(name, source, total, setting.batch, lambda part: batch_of(setting, source, part))
    return images.reshape(-1, setting.samples, *images.shape[1:])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a set with attributes.json, as data/toon")
    parser.add_argument("--out", type=Path, required=True, help="where samples are kept")
    parser.add_argument("--factor", type=int, nargs="+", default=[8], help="powers of two")
    parser.add_argument("--references", type=int, default=100)
    parser.add_argument("--first", type=int, default=100, help="the first held-out image: presets may be calibrated on "
                        "those before it")  # fmt: skip
    parser.add_argument("--samples", type=int, default=16, help="per reference")
    parser.add_argument("--only", nargs="+", default=DEFAULT_ROWS, metavar="GLOB", help="rows to make; '*' has the "
                        "thousand steps, too")  # fmt: skip
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the network for batches of --batch-size")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10, help="of the network that sees attributes")
    parser.add_argument("--accuracy", type=float, default=0.9, help="attributes seen less often are not used")
    parser.add_argument("--cached", action="store_true", help="make no samples")
    parser.add_argument("--scalars", action="store_true", help="print the test of each scalar")
    parser.add_argument("--plot", type=Path, help="a figure of the first N; needs matplotlib (the extra `benchmarks`)")
    return parser


def main() -> None:
    """Print a table per N."""
    args = make_parser().parse_args()
    if wrong := [n for n in args.factor if n < 2 or n & (n - 1)]:
        raise UserError(f"--factor takes powers of two from 2: got {wrong[0]}")
    loaded = load_denoiser(args.ckpt, say=None)
    place = f"{args.data}:test[{args.first}:{args.first + args.references}]"
    references = list(find_references([place], loaded.image_shape))
    made_by = {"checkpoint": loaded.found.sha256, "precision": args.precision, "first": references[0].sha256}
    store = Store(args.out, made_by, args.samples)
    truth = find_truth(args, loaded.image_shape)
    y = torch.stack([r.tensor for r in references])
    tables = {factor: rows(loaded, factor) for factor in args.factor}
    device = torch.device(args.device)
    sampler = ILVRSampler(loaded, loaded.image_shape, args.precision, args.compile, device).to(device)
    setting = Setting(sampler=sampler, references=references, samples=args.samples, batch=args.batch_size)
    for factor, table in tables.items():
        results = {}
        for name, source in table.items():
            if not any(fnmatch(name, pattern) for pattern in args.only):
                continue
            images = samples_of_row(args, name, source, setting, store, truth)
            if len(images) < 5:
                continue
            results[name] = figures(truth, y[: len(images)], images.float() / 127.5 - 1, factor)
        print_table(factor, truth, results, args)
        if args.plot and factor == args.factor[0]:
            from benchmarks.posterior_plot import draw

            draw(results, factor, args.plot)


def print_table(factor: int, truth: Truth, results: dict[str, Result], args: argparse.Namespace) -> None:
    """Print the table of one N."""
    print(f"\nN={factor}, {args.samples} samples per reference")
    if not results:
        print("no samples yet")
        return
    largest = max(results.values(), key=lambda result: result.references)
    print(f"Brier score of the base rate {largest.base_rate:.3f}, of what is seen in the images themselves "
          f"{largest.classifier:.3f}")  # fmt: skip
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, result in results.items():
        print(line(name, result))
    if args.scalars:
        print("\n    scalar: mean rank, spread, Kolmogorov-Smirnov distance, p, mean |coverage - credibility|")
        for name, result in results.items():
            print(name, *scalar_lines(truth, result), sep="\n")


if __name__ == "__main__":
    main()
