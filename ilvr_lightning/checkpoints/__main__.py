"""python -m ilvr_lightning.checkpoints inspect PATH | export PATH --to FORMAT OUT | push PATH USER/NAME"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_lightning.checkpoints.description import add_override
from ilvr_lightning.checkpoints.families import export_formats, what_loads
from ilvr_lightning.diffusion.plan import MAX_SCORED
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import Parser, command

if TYPE_CHECKING:
    from torch import Tensor

    from ilvr_lightning.checkpoints.load import LoadedDenoiser

MAX_CALIBRATION_IMAGES = 64
"""A calibration uses at most so many images."""


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = make_parser().parse_args(list(argv))
    return int(args.run(args))


def make_parser() -> Parser:
    """The parser of the three commands; what loads and what is written comes from the families."""
    formats, epilog = export_formats(), f"PATH is {what_loads()}."
    parser = Parser(
        prog="python -m ilvr_lightning.checkpoints", description="Inspect checkpoints, convert and upload them."
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|export|push")
    look = commands.add_parser(
        "inspect", help="print what a checkpoint is: kind, hyper-parameters, schedule, EMA", epilog=epilog
    )
    look.set_defaults(run=inspect)
    out = commands.add_parser("export", help=f"write a checkpoint as {', '.join(formats)}", epilog=epilog)
    out.set_defaults(run=export)
    share = commands.add_parser("push", help="upload a checkpoint to the Hugging Face Hub", epilog=epilog)
    share.set_defaults(run=push)
    for each in (look, out, share):
        each.add_argument("checkpoint", type=Path, metavar="PATH",
                          help="a checkpoint, as a file or a folder, or the name of a bundled model")  # fmt: skip
        add_override(each)
    out.add_argument("--to", choices=tuple(formats), required=True,
                     help="; ".join(f"{name}: {family.writes}" for name, family in formats.items()))  # fmt: skip
    out.add_argument("out", type=Path, metavar="OUT", help="the file or folder to write; it must not exist")
    out.add_argument("--calibrate", nargs="+", default=[], metavar="IMAGES",
                     help="calibrate the presets on held-out images of the training domain, given as for sample.py "
                     f"--ref; at most {MAX_CALIBRATION_IMAGES} are used")  # fmt: skip
    out.add_argument("--training-images", nargs="+", default=[], metavar="IMAGES",
                     help="with --calibrate: images that the model was trained on, a thousand or more if there are so "
                     "many; their principal components say what belongs to a reference's low frequencies")  # fmt: skip
    out.add_argument("--check-images", nargs="+", default=[], metavar="IMAGES",
                     help="held-out images, with whose scores sample.py --check compares references; at most "
                     f"{MAX_SCORED} are used; with --calibrate alone they are its own images, those that it does "
                     "not use if there are any")  # fmt: skip
    share.add_argument("repository", metavar="USER/NAME", help="the repository; it is made if it does not exist")
    share.add_argument("--private", action="store_true", help="make a private repository (default: a public one)")
    for each in (out, share):
        each.add_argument("--half", action="store_true", help="write the weights in float16, half the size")
        each.add_argument("--weights", choices=("ema", "raw"), default="ema",
                          help="average or raw weights (%(default)s)")  # fmt: skip
    return parser


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint is, without copying its weights."""
    from ilvr_lightning.checkpoints.load import identify

    info = identify(args.checkpoint, overrides=dict(args.override))
    description, has_ema = info.description, info.state.has_ema
    network, _ = info.empty_network()
    kind, *rest = description.lines()
    print(f"kind         {kind}")
    print("\n".join([*rest, *description.gain_lines()]))
    print(f"parameters   {sum(p.numel() for p in network.parameters()):,}")
    print(f"EMA          {'the file does not say' if has_ema is None else 'yes' if has_ema else 'no'}")
    for name, value in description.facts.items():
        print(f"{name:12} {value}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Convert a checkpoint."""
    from ilvr_lightning.checkpoints.export import check_target
    from ilvr_lightning.checkpoints.export import export as write
    from ilvr_lightning.checkpoints.load import load_denoiser

    check_target(args.out)
    if args.training_images and not args.calibrate:
        raise UserError("--training-images needs --calibrate; give held-out images with --calibrate")
    for name in ("calibrate", "check_images"):
        if getattr(args, name) and args.to != "safetensors":
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} needs --to safetensors, because {args.to} cannot hold what is calibrated")
    loaded = load_denoiser(args.checkpoint, args.weights, dict(args.override))
    if args.calibrate:
        _calibrate(loaded, args.calibrate, args.training_images, args.check_images)
    elif args.check_images:
        _score(loaded, args.check_images)
    for path in write(loaded, args.to, args.out, args.half):
        print(f"wrote        {path}")
    if overrides := export_formats()[args.to].overrides_for(loaded.description, loaded.network.state_dict()):
        print("note         read it with", *(f"--override {name}={value}" for name, value in overrides.items()))
    return 0


def push(args: argparse.Namespace) -> int:
    """Upload a checkpoint."""
    from ilvr_lightning.checkpoints.load import load_denoiser
    from ilvr_lightning.checkpoints.push import push as upload

    loaded = load_denoiser(args.checkpoint, args.weights, dict(args.override))
    print(f"uploaded     {upload(loaded, args.repository, args.private, args.half)}")
    return 0


def _score(loaded: "LoadedDenoiser", given: list[str]) -> None:
    """Replace the scores of a denoiser by those of held-out images."""
    from ilvr_lightning.diffusion.low_band import radial_spectrum
    from ilvr_lightning.metrics.fit import fit_scores

    images = _images(loaded, given, "--check-images", MAX_SCORED)
    print(f"scoring      {len(images)} images ...", flush=True)
    loaded.spectrum = loaded.spectrum or tuple(float(f"{variance:.4g}") for variance in radial_spectrum(images))
    scores = fit_scores(loaded.fastest(), images)
    loaded.description = replace(loaded.description, spectrum=loaded.spectrum, fit_scores=scores)


def _images(loaded: "LoadedDenoiser", given: list[str], flag: str, most: int) -> "Tensor":
    """The first images (B, C, H, W) in [-1, 1] of what a flag names."""
    import torch

    from ilvr_lightning.data.references import find_references

    found = find_references(given, loaded.image_shape, flag=flag, value_range=loaded.value_range)[:most]
    return torch.stack([reference.tensor for reference in found])


def _calibrate(loaded: "LoadedDenoiser", given: list[str], training: list[str], checked: list[str]) -> None:
    """Replace the octave_gains of a denoiser by those that held-out images call for."""
    import torch

    from ilvr_lightning.config.schema import DataConfig
    from ilvr_lightning.data.references import find_references
    from ilvr_lightning.diffusion.components import principal_components
    from ilvr_lightning.metrics.calibration import MAX_CHANGE, calibrate_presets

    shape, values = loaded.image_shape, loaded.value_range
    most = MAX_CALIBRATION_IMAGES + (0 if checked else MAX_SCORED)
    images, rest = _images(loaded, given, "--calibrate", most).tensor_split((MAX_CALIBRATION_IMAGES,))
    scored = _images(loaded, checked, "--check-images", MAX_SCORED) if checked else rest
    components = loaded.components
    if training:
        train = find_references(training, shape, flag="--training-images", value_range=values)
        if len(train) < 3:
            raise UserError(f"--training-images: give at least 3 images: got {len(train)}")
        parts = (train[first : first + 64] for first in range(0, len(train), 64))
        trained_on = loaded.description.data or DataConfig(flip="none")
        components = principal_components(
            (torch.stack([r.tensor for r in part]) for part in parts), trained_on.mirrors, trained_on.rotate90
        )
    print(f"calibrating  on {len(images)} images ...", flush=True)
    found = calibrate_presets(loaded.fastest(), images, components, scored, clip=loaded.clip, say=print)
    loaded.description = replace(loaded.description, **vars(found))
    print("\n".join(loaded.description.gain_lines()))
    every = [gain for by_factor in found.octave_gains.values() for each in by_factor.values() for gain in each]
    if any(abs(gain - 1) > MAX_CHANGE - 1e-3 for gain in every):
        print("note         a gain is at its limit; give more images, and only images like the training images")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
