"""memorised: which samples are nearer to a training image than images are that were not trained on."""

import argparse
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.errors import UserError
from ilvr_lightning.evaluation.features import Extractor, load_features
from ilvr_lightning.evaluation.images import ImageSet, open_images
from ilvr_lightning.evaluation.ranks import Ranks, joined
from ilvr_lightning.evaluation.table import INTERVAL, Table
from ilvr_lightning.metrics.intervals import Figure, with_intervals
from ilvr_lightning.metrics.neighbours import copies, nearest
from ilvr_lightning.runtime.command import say
from ilvr_lightning.visual.grids import Column, draw_grid

CHANCE = 0.01
"""This share of the held-out images count as copies; one of them, where they are fewer than a hundred."""
FEWEST = 20
"""Held-out images."""
SHEET_COLUMNS, SHEET_ROWS = 4, 8
"""Pairs of a sample and its nearest training image on the sheet."""


def memorised(args: argparse.Namespace) -> int:
    """Print the rate of copies, and draw the nearest pairs."""
    extractors = load_features(args.features, args.device)
    if not extractors:
        raise UserError("--features: give at least one, because copies are looked for in features")
    samples = open_images(args.samples, args.image_size, "SAMPLES")
    training, held_out = (
        open_images(given, args.image_size or samples.size, what)
        for given, what in ((args.training, "TRAINING"), (args.held_out, "HELD_OUT"))
    )
    if len(held_out) < FEWEST:
        raise UserError(f"HELD_OUT holds {len(held_out)} images; at least {FEWEST} are needed")
    chance = max(CHANCE, 1 / len(held_out))
    columns, notes = (
        {},
        [
            INTERVAL,
            f"a copy is nearer to a training image than {1 - chance:.0%} of HELD_OUT are; {chance:.2g} is chance",
        ],
    )
    with joined() as ranks:
        for number, extractor in enumerate(extractors):
            train = torch.cat([_features(training, extractor, ranks, mirrored) for mirrored in (False, True)])
            found, which = nearest(_features(samples, extractor, ranks), train)
            usual, _ = nearest(_features(held_out, extractor, ranks), train)
            columns[extractor.label] = _figures(found, usual, chance)
            if float(usual.quantile(chance)) == 0:
                notes.append(
                    f"{extractor.label}: {chance:.0%} of HELD_OUT or more are training images, so that no copy is found"
                )
            if args.sheet is not None and number == 0 and ranks.rank == 0:
                sheet = draw_grid(_pairs(samples, training, found, which), f"nearest in {extractor.label}")
                write_atomically(args.sheet, functools.partial(sheet.save, format="PNG"))
                say(f"sheet        {args.sheet}")
    Table(
        columns=columns, notes=notes,
        about={"samples": args.samples, "training": args.training, "held_out": args.held_out,
               "of_samples": len(samples), "of_training": len(training), "of_held_out": len(held_out)},
    ).show(args.json)  # fmt: skip
    return 0


def _features(images: ImageSet, extractor: Extractor, ranks: Ranks, mirrored: bool = False) -> Tensor:
    def batch(rows: Sequence[int]) -> Tensor:
        pixels = images.pixels(rows)
        return extractor(np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels)

    return torch.cat(ranks.over_batches(len(images), batch))


def _figures(found: Tensor, usual: Tensor, chance: float) -> dict[str, Figure]:
    def figures(i: Tensor, j: Tensor) -> dict[str, float]:
        return {
            "copies, share of the samples": float(copies(found[i], usual[j], chance).double().mean()),
            "nearest training image, median": float(found[i].median()),
            "nearest training image, median of held-out images": float(usual[j].median()),
        }

    return with_intervals(figures, [torch.arange(len(found)), torch.arange(len(usual))])


def _pairs(samples: ImageSet, training: ImageSet, found: Tensor, which: Tensor) -> list[Column]:
    """The samples that are nearest to a training image, each beside it, mirrored where that is nearer."""
    order = found.argsort(stable=True)[: SHEET_COLUMNS * SHEET_ROWS].tolist()
    columns = []
    for first in range(0, len(order), SHEET_ROWS):
        rows = order[first : first + SHEET_ROWS]
        tiles = []
        for row in rows:
            mirrored, number = divmod(int(which[row]), len(training))
            (image,) = training.pixels([number])
            tiles.append([samples.pixels([row])[0], image[:, ::-1] if mirrored else image])
        distances = [float(found[row]) for row in rows]
        columns.append(Column(label=f"{min(distances):.3g} to {max(distances):.3g}", rows=tiles))
    return columns
