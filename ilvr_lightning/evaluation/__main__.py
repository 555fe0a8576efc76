"""python -m ilvr_lightning.evaluation compare | translation | bpd | memorised"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ilvr_lightning.checkpoints.description import add_override
from ilvr_lightning.runtime.command import Parser, command
from ilvr_lightning.sampling.arguments import image_size

SETS = "a folder, DATASET:SPLIT, DATASET:SPLIT[A:B], CONFIG.yaml:train or :validation, or an npz file of 8-bit images"
DEFAULT_FEATURES = ("efflite",)
DEFAULT_REPLICATES = 100


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args, rest = make_parser().parse_known_args(list(argv))
    args.rest = rest
    if args.rest and args.run is not _translation:
        args.parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
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
    each = commands.add_parser(
        "translation", allow_abbrev=False, help="sample after images of one domain, and measure as papers do",
        epilog="Every flag of sample.py that says how samples are drawn is taken, too, such as --ckpt, --factor "
        "(integers alone; 8), --range, --preset, --steps and --out. The samples lie in --out; a second start "
        "continues the first.",
    )  # fmt: skip
    each.set_defaults(run=_translation, parser=each)
    each.add_argument("--sources", nargs="+", required=True, metavar="SET",
                      help="the images to translate, as sample.py's --ref")  # fmt: skip
    each.add_argument("--targets", required=True, metavar="SET", help=f"images of the other domain: {SETS}")
    each.add_argument("--repeats", type=int, default=1, metavar="N",
                      help="samples per source; of several, the table has means and deviations (1)")  # fmt: skip
    each.add_argument("--plot", type=Path, metavar="FILE", help="the plot of distances (translation.png in --out)")
    _add_measures(each)
    each = commands.add_parser("bpd", allow_abbrev=False, help="bits per dimension of held-out images under a model")
    each.set_defaults(run=_bpd, parser=each)
    each.add_argument("--ckpt", metavar="PATH", help="as sample.py's")
    each.add_argument("--data", required=True, metavar="SET", help=f"the images: {SETS}")
    each.add_argument("--levels", type=int, default=48, metavar="N",
                      help="evaluations of the network per image (%(default)s)")  # fmt: skip
    each.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights (%(default)s)")
    add_override(each)
    _add_output(each)
    each = commands.add_parser(
        "memorised", allow_abbrev=False, help="the samples that repeat training images, as a rate and a sheet"
    )
    each.set_defaults(run=_memorised, parser=each)
    each.add_argument("samples", metavar="SAMPLES", help=SETS)
    each.add_argument("training", metavar="TRAINING", help="what the model was trained on; mirror images count, too")
    each.add_argument(
        "held_out", metavar="HELD_OUT", help="images like those, not trained on: 20 or more, and better 100"
    )
    each.add_argument("--sheet", type=Path, metavar="FILE", help="draw the 32 samples nearest to a training image")
    _add_size(each)
    _add_features(each)
    _add_output(each)
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=image_size, metavar="S|HxW",
                        help="fit every image to this size, as training images are fitted")  # fmt: skip


def _add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", nargs="*", default=list(DEFAULT_FEATURES), metavar="NAME[=FILE]",
        help="feature spaces, each with a file of its weights if they are not to be downloaded: inception (FID), "
        "dinov2, clip, efflite (needs no download), pixels (needs no package); none leaves them out (efflite)",
    )  # fmt: skip


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="kind of device (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures into a file")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    _add_features(parser)
    parser.add_argument("--lpips", action="store_true", help="also LPIPS (VGG16), whose weights are downloaded")
    parser.add_argument("--replicates", type=int, default=DEFAULT_REPLICATES, metavar="N",
                        help="random halves that make the intervals; 0 for none (%(default)s)")  # fmt: skip
    _add_output(parser)


def _compare(args: argparse.Namespace) -> int:
    from ilvr_lightning.evaluation.compare import compare

    return compare(args)


def _translation(args: argparse.Namespace) -> int:
    from ilvr_lightning.evaluation.translation import translation

    return translation(args)


def _bpd(args: argparse.Namespace) -> int:
    from ilvr_lightning.evaluation.bpd import bpd

    return bpd(args)


def _memorised(args: argparse.Namespace) -> int:
    from ilvr_lightning.evaluation.memorised import memorised

    return memorised(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
