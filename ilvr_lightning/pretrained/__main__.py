"""python -m ilvr_lightning.pretrained inspect PATH | export CKPT --to FORMAT OUT"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ilvr_lightning.arguments import Parser, add_override
from ilvr_lightning.cli import command


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
    out.add_argument("--weights", choices=("ema", "raw"), default="ema", help="average or raw weights (%(default)s)")
    return parser


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint is, without loading its weights."""
    from ilvr_lightning.pretrained.load import recognise

    found = recognise(args.checkpoint, overrides=dict(args.override))
    description = found.description
    network, _ = found.outline()
    kind, *rest = description.lines()
    print(f"kind         {kind}")
    print("\n".join(rest))
    print(f"parameters   {sum(p.numel() for p in network.parameters()):,}")
    print(f"EMA          {'the file does not tell' if found.has_ema is None else 'yes' if found.has_ema else 'no'}")
    for name, value in description.facts.items():
        print(f"{name:12} {value}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Convert a checkpoint."""
    from ilvr_lightning.pretrained.export import export as write
    from ilvr_lightning.pretrained.export import note_on_reading
    from ilvr_lightning.pretrained.load import load_denoiser

    loaded = load_denoiser(args.checkpoint, args.weights, dict(args.override))
    for path in write(loaded, args.to, args.out):
        print(f"wrote        {path}")
    if (note := note_on_reading(loaded, args.to)) is not None:
        print(f"note         {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
