"""python -m ilvr_lightning.pretrained inspect PATH | export CKPT --to FORMAT OUT"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_lightning.checkpoints.description import add_override
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import Parser, command

if TYPE_CHECKING:
    from ilvr_lightning.checkpoints.load import LoadedDenoiser


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = make_parser().parse_args(list(argv))
    return int(args.run(args))


def make_parser() -> Parser:
    """The two commands."""
    parser = Parser(prog="python -m ilvr_lightning.pretrained", description="Look into checkpoints, and convert them.")
    commands = parser.add_subparsers(required=True, metavar="inspect|export")
    look = commands.add_parser("inspect", help="say what a checkpoint is: kind, hyper-parameters, schedule, EMA")
    look.set_defaults(run=inspect)
    out = commands.add_parser("export", help="write it as safetensors, ADM's .pt or a diffusers folder")
    out.set_defaults(run=export)
    for each in (look, out):
        each.add_argument("checkpoint", type=Path, metavar="PATH")
        add_override(each)
    out.add_argument("--to", choices=("safetensors", "adm", "diffusers"), required=True)
    out.add_argument("out", type=Path, metavar="OUT")
    out.add_argument("--calibrate", nargs="+", default=[], metavar="IMAGES",
                     help="held-out images of what it was trained on, as sample.py --ref takes them, 64 at most: "
                     "set the presets' octave_gains on them; safetensors alone holds it")  # fmt: skip
    out.add_argument("--half", action="store_true", help="weights in float16, half the size")
    out.add_argument("--notes", type=Path, metavar="FILE.md",
                     help="for the model card: images, their licence, what the model can and cannot do")  # fmt: skip
    out.add_argument("--picture", type=Path, nargs="+", default=[], metavar="PNG", help="shown in the model card")
    out.add_argument("--weights", choices=("ema", "raw"), default="ema", help="average or raw weights (%(default)s)")
    return parser


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint is, without loading its weights."""
    from ilvr_lightning.checkpoints.description import gain_lines
    from ilvr_lightning.checkpoints.load import identify

    found = identify(args.checkpoint, overrides=dict(args.override))
    description = found.description
    network, _ = found.empty_network()
    kind, *rest = description.lines()
    print(f"kind         {kind}")
    print("\n".join([*rest, *gain_lines(description)]))
    print(f"parameters   {sum(p.numel() for p in network.parameters()):,}")
    print(f"EMA          {'the file does not tell' if found.has_ema is None else 'yes' if found.has_ema else 'no'}")
    for name, value in description.facts.items():
        print(f"{name:12} {value}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Convert a checkpoint."""
    from ilvr_lightning.checkpoints.export import Options, check_target, note_on_reading
    from ilvr_lightning.checkpoints.export import export as write
    from ilvr_lightning.checkpoints.load import load_denoiser

    check_target(args.out)
    notes = _read_notes(args)
    loaded = load_denoiser(args.checkpoint, args.weights, dict(args.override))
    if args.calibrate:
        _calibrate(loaded, args)
    for path in write(loaded, args.to, args.out, Options(half=args.half, notes=notes, pictures=tuple(args.picture))):
        print(f"wrote        {path}")
    if (note := note_on_reading(loaded, args.to)) is not None:
        print(f"note         {note}")
    return 0


def _read_notes(args: argparse.Namespace) -> str:
    """The card's notes, once they and the pictures are known to have a place and to be there."""
    if (args.notes or args.picture) and (args.to != "safetensors" or args.out.suffix == ".safetensors"):
        raise UserError("--notes and --picture go into a model card: give --to safetensors and a folder")
    for picture in args.picture:
        if not picture.is_file():
            raise UserError(f"--picture: there is no file {picture}")
    if args.notes is None:
        return ""
    try:
        if args.notes.exists() and not args.notes.is_file():
            raise OSError("it is no file")  # a pipe or a device, which may never end
        return str(args.notes.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--notes: {args.notes} cannot be read as text ({error})") from None


MOST_IMAGES = 64
"""That a calibration looks at."""


def _calibrate(loaded: "LoadedDenoiser", args: argparse.Namespace) -> None:
    import torch

    from ilvr_lightning.checkpoints.description import gain_lines
    from ilvr_lightning.data.references import find_references
    from ilvr_lightning.metrics.calibration import MAX_CHANGE, calibrate_presets

    if args.to != "safetensors":
        raise UserError(f"--calibrate is for --to safetensors; {args.to} has no place for it")
    references = find_references(args.calibrate, loaded.image_shape, "crop", flag="--calibrate")[:MOST_IMAGES]
    images = torch.stack([r.tensor for r in references])
    print(f"calibrating  on {len(images)} images ...", flush=True)
    gains = calibrate_presets(loaded, loaded.schedule, images, clip=loaded.clip)
    loaded.description = replace(loaded.description, octave_gains=gains)
    print("\n".join(gain_lines(loaded.description)))
    every = [gain for by_factor in gains.values() for each in by_factor.values() for gain in each]
    if any(abs(gain - 1) > MAX_CHANGE - 1e-3 for gain in every):
        print("note         a gain is at its limit: are the images of the training domain, and enough of them?")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
