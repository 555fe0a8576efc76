"""Does the check of references tell what will come of them: the tables of docs/check.md.

    python -m benchmarks.check --ckpt toon64 --data data/toon --other data/animals [--photographs PICTURES]
        [--features efflite] [--attributes ATTRIBUTES.pt] [--first 200] [--images 40] [--others 8] [--kept FILE.pt]

References: held-out images of the data from number --first on, which must not be among those that the checkpoint's
scores are of; altered ones (JPEG of quality 10, noise of 0.2, upside down, negative, red and blue exchanged, the left
half of one beside the right half of another); images of the other set, photographs, bundled references, and scribbles,
fields of colour and noise made here. At each N the score of `check_reference` is held against what comes of each: one
sample (draft), and its distance from the domain, which is that to the fifth nearest of training images in whitened
features, as a logarithm, above the median of samples of held-out images; the mean over the feature spaces, which are
named ones of ilvr_lightning.evaluation, files of benchmarks.features, and the network of attributes that
benchmarks.posterior leaves in its folder.

Tables: AUROC of held-out images against each kind of reference; Spearman's rank correlation of score and distance; how
many held-out images are refused at an alpha; and how far N, in octaves, is from the smallest N from which on samples
are no further from the domain than 95% of those of held-out images: for automatic N and for fixed ones.
--kept FILE.pt keeps the scores and distances, and prints the tables of them where it is there.
"""

import argparse
import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.attributes import AttributeNetwork, Attributes
from benchmarks.features import features_of, load_features
from benchmarks.noisy_references import compressed
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.images import convert, fit_image, to_pixels, to_tensor
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.metrics.fit import misfits, p_values

FACTORS = (4, 8, 16, 32)
ALPHAS = (0.01, 0.05, 0.1)
NEIGHBOUR, TRAINING_IMAGES = 5, 700
SHRINKAGE = 0.02
"""The features' covariance is mixed with so much of its mean variance."""


def images_of(given: str, shape: tuple[int, int, int], first: int, count: int) -> Tensor:
    """(B, C, H, W) in [-1, 1]."""
    return torch.stack([r.tensor for r in find_references([given], shape)[first : first + count]])


def altered(x: Tensor, count: int) -> dict[str, Tensor]:
    """Held-out images made foreign, or nearly so."""
    few, noise = x[:count], torch.randn(x[:count].shape, generator=torch.Generator().manual_seed(3))
    halves = few.clone()
    halves[..., x.shape[3] // 2 :] = x[-len(few) :, ..., x.shape[3] // 2 :]
    jpeg = [_tensor(Image.open(io.BytesIO(compressed(image, 10))), x.shape[-1]) for image in few]
    return {
        "JPEG 10": torch.stack(jpeg), "noise 0.2 on it": (few + 0.2 * noise).clamp(-1, 1), "upside down": few.flip(2),
        "negative": -few, "red for blue": few.flip(1), "two halves": halves,
    }  # fmt: skip


def _tensor(image: Image.Image, side: int) -> Tensor:
    return to_tensor(to_pixels(fit_image(convert(image), (side, side))))


def drawn(side: int, count: int) -> dict[str, Tensor]:
    """Scribbles, fields of colour, noise."""
    random = torch.Generator().manual_seed(7)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    def colour() -> tuple[int, int, int]:
        return number(0, 256), number(0, 256), number(0, 256)

    def scribble() -> Image.Image:
        image = Image.new("RGB", (256, 256), colour())
        draw = ImageDraw.Draw(image)
        for _ in range(number(4, 18)):
            points = [(number(0, 256), number(0, 256)) for _ in range(number(3, 7))]
            draw.line(points, fill=colour(), width=number(3, 26), joint="curve")
        return image

    def field(i: int) -> Tensor:
        a, b = (torch.tensor(colour()).reshape(3, 1, 1) / 127.5 - 1 for _ in range(2))
        ramp = torch.linspace(0, 1, side).expand(1, side, side)
        return torch.lerp(
            a, b, torch.zeros_like(ramp) if i % 3 == 0 else ramp if i % 3 == 1 else (ramp.mT > 0.5).float()
        )

    return {
        "scribbles": torch.stack([_tensor(scribble(), side) for _ in range(count)]),
        "fields of colour": torch.stack([field(i) for i in range(count)]),
        "noise": (0.5 * torch.randn(count, 3, side, side, generator=random)).clamp(-1, 1),
    }


class Distance:
    """Distance from training images in several feature spaces."""

    def __init__(self, spaces: list[Callable[[Tensor], Tensor]], training: Tensor) -> None:
        self._spaces = []
        for space in spaces:
            features = space(training).double()
            mean, covariance = features.mean(0), torch.cov(features.mT)
            mixed = covariance + SHRINKAGE * covariance.trace() / len(covariance) * torch.eye(len(covariance))
            values, vectors = torch.linalg.eigh(mixed)
            whiten = vectors / values.clamp(min=1e-12).sqrt()
            self._spaces.append((space, mean, whiten, (features - mean) @ whiten))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, spaces) logarithms of the distance to the NEIGHBOUR-th nearest."""
        found = []
        for space, mean, whiten, training in self._spaces:
            whitened = (space(x).double() - mean) @ whiten
            found.append(torch.cdist(whitened, training).kthvalue(NEIGHBOUR, 1).values.log())
        return torch.stack(found, 1)


def attribute_space(file: Path, data: Path) -> Callable[[Tensor], Tensor]:
    """The features of the network that benchmarks.posterior trained."""
    network = AttributeNetwork([len(shapes) for shapes in Attributes.read(data).values.values()])
    network.load_state_dict(torch.load(file, weights_only=True))
    network.eval()
    return lambda x: torch.cat([network(part) for part in torch.split(x, 256)])


@torch.no_grad()
def measure(loaded: LoadedDenoiser, references: Mapping[str, Tensor], distance: Distance) -> dict[str, Any]:
    """Scores and distances of all references."""
    denoise, everything = loaded.fastest(), torch.cat(list(references.values()))
    kinds = [name for name, images in references.items() for _ in images]
    scores, distances = {}, {}
    for n in (2, *FACTORS):
        scores[n] = misfits(denoise, everything, [n], batch=32)[n].mean(1)
        print(f"N={n}: scored", flush=True)
    for n in FACTORS:
        made = []
        for first, y in enumerate(torch.split(everything, 32)):
            seeds = [derive_seed(1, "check", 32 * first + i) for i in range(len(y))]
            made.append(
                generate(denoise, loaded.preset("draft", factor=n), seeds=seeds, shape=loaded.image_shape, reference=y)
            )
        distances[n] = distance(torch.cat(made).clamp(-1, 1))
        print(f"N={n}: sampled", flush=True)
    start = time.perf_counter()
    misfits(denoise, everything[:1], [2, *FACTORS])
    return {"kinds": kinds, "scores": scores, "distances": distances, "seconds": time.perf_counter() - start}


def auroc(high: Tensor, low: Tensor) -> float:
    """The probability that one of the first is above one of the second."""
    above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    return float(above.mean())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([each.argsort().argsort().double() for each in (a, b)]))[0, 1])


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float]], form: str = ".2f") -> None:
    """Print a table in Markdown."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(format(cell, form) for cell in cells)} |")


def print_tables(found: Mapping[str, Any], calibration: Mapping[int, Any]) -> None:
    """All tables."""
    kinds, scores = found["kinds"], found["scores"]
    own = torch.tensor([kind == "held out" for kind in kinds])
    factors, every = list(scores), [f"N={n}" for n in scores]
    few = [f"N={n}" for n in FACTORS]
    aurocs = {}
    for name in (*dict.fromkeys(kind for kind in kinds if kind != "held out"), "all"):
        rows = torch.tensor([kind == name or (name == "all" and kind != "held out") for kind in kinds])
        aurocs[f"{name} ({int(rows.sum())})"] = [auroc(scores[n][rows], scores[n][own]) for n in factors]
    table(f"AUROC against {int(own.sum())} held-out images", every, aurocs)

    excess = {n: (d - d[own].median(0).values).mean(1) for n, d in found["distances"].items()}
    known = {n: torch.tensor(calibration[n]).mean(1) for n in factors}
    # Over several N a score counts by where it stands among those of held-out images at its N.
    standard = {n: (scores[n].log() - known[n].log().mean()) / known[n].log().std() for n in factors}
    correlations = {}
    for name, rows in (("all references", torch.ones_like(own)), ("foreign ones alone", ~own)):
        cells = [rank_correlation(scores[n][rows], excess[n][rows]) for n in FACTORS]
        pairs = [torch.cat([each[n][rows] for n in FACTORS]) for each in (standard, excess)]
        correlations[name] = [*cells, rank_correlation(pairs[0], pairs[1])]
    table("rank correlation of score and distance", [*few, "all N"], correlations)

    held_out = torch.stack([known[n] for n in factors], 1)
    test = torch.stack([scores[n][own] for n in factors], 1)
    singles = [[p_values(s[i, None], held_out[:, i, None]) for s in test] for i in range(len(factors))]
    looks = [*singles, [p_values(s, held_out) for s in test]]
    table("held-out images refused, %", [*every, "any N"],
          {f"alpha {alpha:g}": [_refused(each, alpha) for each in looks] for alpha in ALPHAS}, ".1f")  # fmt: skip

    limits = torch.stack([excess[n][own].quantile(0.95) for n in FACTORS])
    best = _smallest(torch.stack([excess[n] for n in FACTORS], 1) <= limits)
    columns = [factors.index(n) for n in FACTORS]
    p = torch.stack([p_values(torch.stack([scores[n][i] for n in FACTORS]), held_out[:, columns])
                     for i in range(len(own))])  # fmt: skip
    choices = {f"automatic, alpha {alpha:g}": _smallest(p > alpha) for alpha in ALPHAS}
    most = 16  # that --factor auto takes at 64 px
    choices[f"automatic, alpha 0.05, at most N={most}"] = choices["automatic, alpha 0.05"].clamp(
        max=FACTORS.index(most)
    )
    choices |= {f"N={n} for all": torch.full((len(own),), float(i)) for i, n in enumerate(FACTORS)}
    off = {name: (at - best).abs() for name, at in choices.items()}
    means = {name: [float(each[own].mean()), float(each[~own].mean())] for name, each in off.items()}
    table("N is off, in octaves", ["held out", "foreign", "mean of both"],
          {name: [*two, sum(two) / 2] for name, two in means.items()})  # fmt: skip
    counts = {f"{name}: {kind}": [float((at[rows] == i).sum()) for i in range(len(FACTORS))]
              for name, at in (("best N", best), ("automatic", choices["automatic, alpha 0.05"]))
              for kind, rows in (("held out", own), ("foreign", ~own))}  # fmt: skip
    table("number of references", few, counts, ".0f")
    print(f"\nseconds for one reference at {len(factors)} N: {found['seconds']:.1f}")


def _refused(p: list[Tensor], alpha: float) -> float:
    return 100 * sum(float(each.min()) <= alpha for each in p) / len(p)


def _smallest(fits: Tensor) -> Tensor:
    """(B,) the position of the smallest N from which on all fit; the last where the last does not."""
    run = fits.flip(1).double().cumprod(1).sum(1)
    return (fits.shape[1] - run).clamp(max=fits.shape[1] - 1)


def main() -> None:
    """Measure, or read what was measured, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="the data set that it was trained on")
    parser.add_argument("--other", required=True, help="another data set")
    parser.add_argument("--photographs")
    parser.add_argument("--features", nargs="+", default=["efflite"])
    parser.add_argument("--attributes", type=Path)
    parser.add_argument("--first", type=int, default=200)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--others", type=int, default=8)
    parser.add_argument("--kept", type=Path)
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    if args.kept and args.kept.is_file():
        print_tables(torch.load(args.kept, weights_only=True), loaded.fit_scores)
        return
    shape = loaded.image_shape
    held_out = images_of(f"{args.data}:test", shape, args.first, args.images)
    references = {"held out": held_out, **altered(held_out, args.others)}
    references["the other set"] = images_of(f"{args.other}:test", shape, 0, args.others)
    references["data/references"] = images_of("data/references", shape, 0, 100)
    if args.photographs:
        references["photographs"] = images_of(args.photographs, shape, 0, 2 * args.others)
    references |= drawn(shape[1], args.others)
    spaces: list[Callable[[Tensor], Tensor]] = [
        functools.partial(features_of, load_features(name)) for name in args.features
    ]
    if args.attributes:
        spaces.append(attribute_space(args.attributes, Path(args.data)))
    distance = Distance(spaces, images_of(f"{args.data}:train", shape, 0, TRAINING_IMAGES))
    found = measure(loaded, references, distance)
    if args.kept:
        torch.save(found, args.kept)
    print_tables(found, loaded.fit_scores)


if __name__ == "__main__":
    main()
