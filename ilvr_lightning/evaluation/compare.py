"""compare: a set of samples against a set of images, and against the sources that they were made from."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_lightning.data.images import to_tensor
from ilvr_lightning.errors import UserError
from ilvr_lightning.evaluation.features import Extractor, load_features, load_lpips
from ilvr_lightning.evaluation.images import ImageSet, Samples, kept_sources, open_images, open_samples, pair
from ilvr_lightning.evaluation.ranks import ALONE, Ranks, joined
from ilvr_lightning.evaluation.table import INTERVAL, RETRAINING, Table, bias_note
from ilvr_lightning.metrics.bands import frechet_distance, grain_powers, octave_powers
from ilvr_lightning.metrics.intervals import REPLICATES, Figure, with_intervals
from ilvr_lightning.metrics.neighbours import kernel_distance, neighbour_figures
from ilvr_lightning.metrics.pairs import pair_figures, pairwise_rms
from ilvr_lightning.runtime.command import say

DIVERSITY_SAMPLES = 10
"""The diversity is that of the first so many samples of a source."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""LPIPS: takes two batches (B, 3, H, W) of 8 bits, gives (B,)."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What is kept of each image of a set: its features and its powers."""

    features: list[Tensor]
    """(n, D) in each feature space."""
    octaves: Tensor
    grain: Tensor
    is_grey: bool
    """Whether every image is greyscale."""

    def __len__(self) -> int:
        return len(self.octaves)


def describe(images: ImageSet, extractors: Sequence[Extractor], ranks: Ranks = ALONE) -> Described:
    """Read a set once.

    Raises:
        UserError: an image cannot be read, or the images differ in size.
    """

    def batch(rows: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor, bool]:
        pixels = images.pixels(rows)
        x = to_tensor(pixels)
        is_grey = bool((pixels == pixels[..., :1]).all())
        return [extract(pixels) for extract in extractors], octave_powers(x), grain_powers(x), is_grey

    parts = ranks.over_batches(len(images), batch)
    features, octaves, grain, grey = zip(*parts, strict=True)
    return Described(
        features=[torch.cat(each) for each in zip(*features, strict=True)],
        octaves=torch.cat(octaves), grain=torch.cat(grain), is_grey=all(grey),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What samples were made from."""

    units: Sequence[object]
    """(n,) equal for samples of one source."""
    factor: int | None = None
    """N, where it is known."""
    sources: ImageSet | None = None
    rows: Sequence[int] = ()
    """(n,) the row of each sample's source."""


def source_figures(
    images: ImageSet, origin: Origin, is_grey: bool, lpips: Distance | None, ranks: Ranks
) -> dict[str, Tensor]:
    """Figures (n,) of each sample against its source: what `pair_figures` computes, and LPIPS."""
    sources = origin.sources
    if sources is None:
        return {}

    def batch(chosen: Sequence[int]) -> dict[str, Tensor]:
        x, y = map(to_tensor, (images.pixels(chosen), sources.pixels([origin.rows[i] for i in chosen])))
        if is_grey and not y.equal(y[:, :1].expand_as(y)):
            raise UserError("SAMPLES are greyscale and --sources in colour; give images of one kind")
        found = pair_figures(x[:, :1], y[:, :1], origin.factor) if is_grey else pair_figures(x, y, origin.factor)
        return found if lpips is None else {**found, "LPIPS": lpips(_eight_bits(x), _eight_bits(y))}

    parts = ranks.over_batches(len(images), batch)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def diversity(
    images: ImageSet,
    units: Sequence[int],
    described: Described,
    extractors: Sequence[Extractor],
    lpips: Distance | None,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Mean pairwise distances between the samples of a source, given to each of its samples (n,); none of single ones.

    Args:
        images: the samples.
        units: the source of each.
        described: has their features.
        extractors: name them.
        lpips: computes LPIPS, or None.
        ranks: share the sources.
    """  # fmt: skip
    by_unit: dict[int, list[int]] = {}
    for row, unit in enumerate(units):
        by_unit.setdefault(unit, []).append(row)
    groups = list(by_unit.values())
    if any(len(group) < 2 for group in groups):
        return {}

    def each(numbers: Sequence[int]) -> list[dict[str, float]]:
        return [of_group(groups[number][:DIVERSITY_SAMPLES]) for number in numbers]

    def of_group(rows: list[int]) -> dict[str, float]:
        x = to_tensor(images.pixels(rows))
        found = {"diversity, RMS": pairwise_rms(x) / 2}
        for extractor, features in zip(extractors, described.features, strict=True):
            found[f"diversity, {extractor.label}"] = float(torch.pdist(features[rows]).mean())
        if lpips is not None:
            a, b = torch.combinations(torch.arange(len(rows))).T
            found["diversity, LPIPS"] = float(lpips(_eight_bits(x[a]), _eight_bits(x[b])).mean())
        return found

    by_group = [found for part in ranks.over_batches(len(groups), each, 1) for found in part]
    figures = {name: torch.empty(len(units), dtype=torch.float64) for name in by_group[0]}
    for group, found in zip(groups, by_group, strict=True):
        for name, value in found.items():
            figures[name][group] = value
    return figures


def _eight_bits(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def set_figures(samples: Described, references: Described, extractors: Sequence[Extractor]) -> dict[str, float]:
    """Every figure of two sets, by its name in the table."""
    found: dict[str, float] = {}
    for extractor, a, b in zip(extractors, samples.features, references.features, strict=True):
        frechet, kernel = extractor.distances
        found[frechet] = frechet_distance(a, b)
        found[f"{kernel} x 1000"] = 1000 * kernel_distance(a, b)
        found |= {f"{name}, {extractor.label}": value for name, value in neighbour_figures(a, b).items()}
    ratios = (samples.octaves.mean(0) / references.octaves.mean(0)).tolist()
    found |= {f"power, octave {k + 1} of {len(ratios)}": ratio for k, ratio in enumerate(ratios)}
    checkerboard, stripes = (samples.grain.mean(0) / references.grain.mean(0)).tolist()
    return {**found, "power, checkerboard": checkerboard, "power, stripes": stripes}


def _rows(described: Described, rows: Tensor) -> Described:
    return Described(
        features=[each[rows] for each in described.features],
        octaves=described.octaves[rows], grain=described.grain[rows], is_grey=described.is_grey,
    )  # fmt: skip


def column(
    images: ImageSet,
    references: Described,
    extractors: Sequence[Extractor],
    origin: Origin | None = None,
    *,
    lpips: Distance | None = None,
    replicates: int = REPLICATES,
    ranks: Ranks = ALONE,
) -> dict[str, Figure]:
    """Every figure of samples against references, with its interval.

    Args:
        images: the samples.
        references: described in the same feature spaces.
        extractors: the feature spaces.
        origin: what the samples were made from, if that is known.
        lpips: computes LPIPS, or None.
        replicates: halves that make the intervals; 0 for none.
        ranks: share the images.

    Raises:
        UserError: a set has one image, or one is greyscale and the other in colour.
    """  # fmt: skip
    described = describe(images, extractors, ranks)
    for name, each in ((images.name, described), ("REFERENCES", references)):
        if len(each) < 2:
            raise UserError(f"{name} holds one image; give at least 2, because sets are compared, and better thousands")
    if described.is_grey != references.is_grey:
        grey, colour = ("SAMPLES", "REFERENCES") if described.is_grey else ("REFERENCES", "SAMPLES")
        raise UserError(f"{grey} are greyscale and {colour} in colour; give images of one kind")
    origin = origin or Origin(units=range(len(images)))
    number = {unit: number for number, unit in enumerate(dict.fromkeys(origin.units))}
    units = [number[unit] for unit in origin.units]
    by_sample = source_figures(images, origin, described.is_grey, lpips, ranks)
    by_sample |= diversity(images, units, described, extractors, lpips, ranks)

    def figures(i: Tensor, j: Tensor) -> dict[str, float]:
        found = set_figures(_rows(described, i), _rows(references, j), extractors)
        means = {name: float(values[i].mean()) for name, values in by_sample.items()}
        if "low-band error" in means:
            means["low-band error"] = math.sqrt(means["low-band error"])  # the root of the mean square over all images
        return {**found, **means}

    return with_intervals(figures, [torch.tensor(units), torch.arange(len(references))], replicates)


def compare(args: argparse.Namespace) -> int:
    """Print the table of two sets."""
    samples = open_samples(args.samples, args.image_size)
    size = samples[0].images.size
    references = open_images(args.references, args.image_size, "REFERENCES")
    if references.size != size:
        raise UserError(
            f"SAMPLES have {size[1]}x{size[0]} pixels and REFERENCES {references.size[1]}x{references.size[0]}; give "
            f"--image-size {size[0]}x{size[1]} to fit both"
        )
    sources = open_images(args.sources, size, "--sources") if args.sources else kept_sources(args.samples, size)
    extractors = load_features(args.features, args.device)
    lpips = load_lpips(args.device) if args.lpips else None
    with joined() as ranks:
        described = describe(references, extractors, ranks)
        columns = {}
        for each in samples:
            say(f"measuring    {each.images.name}: {len(each.images)} images")
            columns[each.images.name] = column(
                each.images, described, extractors, _origin(each, sources, not args.sources), lpips=lpips,
                replicates=args.replicates, ranks=ranks,
            )  # fmt: skip
    fewest = min(len(each.images) for each in samples)
    distances = [extractor.distances[0] for extractor in extractors]
    Table(
        columns=columns, notes=[INTERVAL, RETRAINING, *bias_note(distances, fewest, len(references))],
        about={"samples": args.samples, "references": args.references, "sources": args.sources,
               "images": {each.images.name: len(each.images) for each in samples}, "of_references": len(references)},
    ).show(args.json)  # fmt: skip
    return 0


def _origin(samples: Samples, sources: ImageSet | None, is_kept: bool) -> Origin:
    """What samples were made from: the sources that were named, or those that their folder keeps."""
    units = [entry.sha256 for entry in samples.entries] if samples.factor is not None else range(len(samples.images))
    if sources is None or (is_kept and samples.factor is None):
        return Origin(units=units, factor=samples.factor)
    rows = pair(samples, sources, is_kept)
    return Origin(units=rows, factor=samples.factor, sources=sources, rows=rows)
