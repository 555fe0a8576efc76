"""python -m ilvr_lightning.evaluation compare | translation | bpd | memorised"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ilvr_lightning.runtime.command import Parser, command
from ilvr_lightning.sampling.arguments import image_size

SETS = "a folder, DATASET:SPLIT, DATASET:SPLIT[A:B], or an npz file of 8-bit images"
DEFAULT_FEATURES = ("efflite",)
DEFAULT_REPLICATES = 100


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args, rest = make_parser().parse_known_args(list(argv))
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return int(args.run(args))


def make_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(
        prog="python -m ilvr_lightning.evaluation", description="Measure samples as papers report them.",
        allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="compare|translation|bpd|memorised")
    each = commands.add_parser(
        "compare", allow_abbrev=False, help="samples against images, and against the sources that they were made from",
        epilog="A folder of sample.py gives a column per factor and range. Under torchrun, the ranks share the images.",
    )  # fmt: skip
    each.set_defaults(run=_compare, parser=each)
    each.add_argument("samples", metavar="SAMPLES", help=f"{SETS}; a folder of sample.py is read by its index")
    each.add_argument("references", metavar="REFERENCES", help=SETS)
    each.add_argument(
        "--sources", metavar="SET",
        help="what the samples were made from: by name where SAMPLES is a folder of sample.py, else in the same order; "
        "default: the references that a folder of sample.py keeps",
    )  # fmt: skip
    _add_size(each)
    _add_measures(each)
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=image_size, metavar="S|HxW",
                        help="fit every image to this size, as training images are fitted")  # fmt: skip


def _add_features(parser: argparse.ArgumentParser) -> None:
    """Flags of the feature spaces and of the output."""
    parser.add_argument(
        "--features", nargs="*", default=list(DEFAULT_FEATURES), metavar="NAME[=FILE]",
        help="feature spaces, each with a file of its weights if they are not to be downloaded: inception (FID), "
        "dinov2, clip, efflite (needs no download), pixels (needs no package); none leaves them out (efflite)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the features (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures into a file")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    _add_features(parser)
    parser.add_argument("--lpips", action="store_true", help="also LPIPS (VGG16), whose weights are downloaded")
    parser.add_argument("--replicates", type=int, default=DEFAULT_REPLICATES, metavar="N",
                        help="random halves that make the intervals; 0 for none (%(default)s)")  # fmt: skip


def _compare(args: argparse.Namespace) -> int:
    from ilvr_lightning.evaluation.compare import compare

    return compare(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
