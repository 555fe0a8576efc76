"""translation: sample after the images of one domain, and measure as papers on translation do."""

import argparse
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.checkpoints.find import find_checkpoint
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.images import Pixels, read_image, to_pixels
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.plan import as_tuple
from ilvr_lightning.errors import UserError
from ilvr_lightning.evaluation.compare import Origin, column, describe
from ilvr_lightning.evaluation.features import INSTALL, load_features, load_lpips
from ilvr_lightning.evaluation.images import ImageSet, open_images
from ilvr_lightning.evaluation.table import INTERVAL, RETRAINING, Table, bias_note
from ilvr_lightning.metrics.intervals import Figure
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.signals import StopOnSignal
from ilvr_lightning.runtime.trainer import make_predictor
from ilvr_lightning.sampling.arguments import AUTO, Arguments, parse_arguments
from ilvr_lightning.sampling.folder import SampleFolder
from ilvr_lightning.sampling.module import ILVRSampler, SampleLoader
from ilvr_lightning.sampling.requests import SampleRequests, check_image_size, expand_sweep
from ilvr_lightning.sampling.writer import SampleWriter

PLOT = "translation.png"
"""The plot's name in --out, if no other is given."""
NOT_TAKEN = ("--ref", "--num-samples", "--unconditional", "--reproduce", "--format", "--trajectory")
"""Flags of sample.py that have no sense here."""
OF_PAIRS = ("L2", "PSNR", "SSIM", "LPIPS")


@dataclass(frozen=True, kw_only=True)
class OverRepeats(Figure):
    """A mean over repeats, whose `error` is their standard deviation."""

    @property
    def margin(self) -> float:
        """The deviation itself, as papers give it."""
        return self.error


def translation(args: argparse.Namespace) -> int:
    """Sample, measure, print the table, draw the plot."""
    if not_taken := [flag for flag in NOT_TAKEN if flag in args.rest]:
        raise UserError(f"translation takes no {not_taken[0]}; --sources, --targets and --repeats say what is sampled")
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1: got {args.repeats}")
    asked = parse_arguments(
        [*args.rest, "--ref", *args.sources, "--num-samples", str(args.repeats), "--device", args.device]
    )
    if asked.factor == [AUTO]:
        raise UserError("--factor auto: the table compares values of N; give one or several, such as --factor 4 8 16")
    extractors = load_features(args.features, args.device)  # what may be missing is known before hours of sampling
    lpips = load_lpips(args.device) if args.lpips else None
    open_images(args.targets, None, "--targets")
    denoiser = load_denoiser(find_checkpoint(asked.ckpt), asked.weights, dict(asked.override), say)
    folder = _sampled(asked, denoiser)
    if folder is None:
        return 0
    sources = _sources(folder.requests)
    target_set = open_images(args.targets, sources.size, "--targets", denoiser.value_range)
    targets = describe(target_set, extractors)
    distances = [extractor.distances[0] for extractor in extractors]
    rows: dict[str, dict[str, Figure]] = {}
    for number, plan in enumerate(folder.requests.plans):
        label = f"N={plan.factor}, {plan.condition_from}:{plan.condition_to}"
        say(f"measuring    {label}")
        repeats = []
        for repeat in range(args.repeats):
            images, of_source = _repeat(folder, number, repeat)
            origin = Origin(units=of_source, factor=as_tuple(plan.factor)[0], sources=sources, rows=of_source)
            repeats.append(column(images, targets, extractors, origin, lpips=lpips, replicates=args.replicates))
        rows[label] = {name: _over(repeats, name) for name in (*distances, *OF_PAIRS) if name in repeats[0]}
    Table(
        columns=rows, upright=False, notes=[_note(args.repeats), *bias_note(distances, len(sources), len(target_set))],
        about={"sources": args.sources, "targets": args.targets, "checkpoint": asked.ckpt, "repeats": args.repeats,
               "of_sources": len(sources), "of_targets": len(target_set)},
    ).show(args.json)  # fmt: skip
    if distances:
        _plot(folder, rows, distances[0], args.plot or folder.path / PLOT)
    return 0


def _note(repeats: int) -> str:
    if repeats == 1:
        return f"{INTERVAL}; {RETRAINING}"
    return f"mean ± standard deviation over {repeats} repeats, each of one sample per source with other noise"


def _over(repeats: Sequence[Mapping[str, Figure]], name: str) -> Figure:
    """The only repeat with its interval, or the mean of several with their deviation."""
    if len(repeats) == 1:
        return repeats[0][name]
    values = torch.tensor([figures[name].value for figures in repeats], dtype=torch.float64)
    return OverRepeats(value=float(values.mean()), error=float(values.std()))


def _colour(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _sources(requests: SampleRequests) -> ImageSet:
    """The references as they were followed."""
    references = requests.references
    height, width = references[0].pixels.shape[:2]
    names = [references.name(row) for row in range(len(references))]
    return ImageSet("--sources", names, lambda row: _colour(references[row].pixels), (height, width))


def _repeat(folder: SampleFolder, plan: int, repeat: int) -> tuple[ImageSet, list[int]]:
    """One sample per source under one plan, and the row of each one's source."""
    found = [(folder.requests.locate(index), index) for index in folder.written.tolist()]
    chosen = [(place[0], folder.file(index)) for place, index in found if place[1:] == (plan, repeat)]
    files = [file for _, file in chosen]
    size = to_pixels(read_image(files[0])).shape[:2]
    images = ImageSet("SAMPLES", [file.stem for file in files], lambda row: to_pixels(read_image(files[row])), size)
    return images, [row for row, _ in chosen]


def _plot(folder: SampleFolder, rows: Mapping[str, Mapping[str, Figure]], distance: str, file: Path) -> None:
    """Draw the distance from the targets against that from the sources: a curve over N for each range."""
    if importlib.util.find_spec("matplotlib") is None:
        say(f"note         no plot, because matplotlib is not installed; run {INSTALL}")
        return
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(6, 4.5), layout="constrained")
    axes = drawing.subplots()
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for plan, figures in zip(folder.requests.plans, rows.values(), strict=True):
        point = (figures["L2"].value, figures[distance].value, f"N={plan.factor}")
        curves.setdefault(f"{plan.condition_from}:{plan.condition_to}", []).append(point)
    for label, points in curves.items():
        x, y, names = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", label=f"--range {label}")
        for at in zip(names, zip(x, y, strict=True), strict=True):
            axes.annotate(*at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="L2 from the source", ylabel=f"{distance} from the targets")
    axes.legend(frameon=False)
    write_atomically(file, functools.partial(drawing.savefig, format="png", dpi=120))
    say(f"plot         {file}")


def _sampled(args: Arguments, denoiser: LoadedDenoiser) -> SampleFolder | None:
    """What sample.py makes of these flags, without grids; None on ranks other than the first.

    Raises:
        UserError: as sample.py, or images are missing at the end.
    """
    shape = check_image_size(denoiser, args.image_size)
    plans = expand_sweep(args, denoiser, shape)
    references = find_references(args.ref, shape, args.fit, args.mask, "--sources", denoiser.value_range)
    requests = SampleRequests.of_arguments(args, references, plans, denoiser.found.sha256)
    folder = SampleFolder(args.out, requests, overwrite=args.overwrite)
    loader, stop = SampleLoader(requests, folder.missing(), args.batch_size), StopOnSignal()
    trainer = make_predictor(args.device, args.devices, [stop, SampleWriter(folder, loader)])
    sampler = ILVRSampler(denoiser, shape, args.precision, args.compile, trainer.strategy.root_device, loader.passes)
    say(f"samples      {len(loader.todo)} to make, {len(requests) - len(loader.todo)} already there")
    with stop.listening():
        trainer.predict(sampler, datamodule=loader, return_predictions=False)
        if not trainer.is_global_zero:
            return None
        if missing := folder.write_index():
            raise UserError(f"{missing} images are missing; run the same command again")
    return folder
