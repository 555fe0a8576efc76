"""sample.py's command line; the flags of the sampling settings are made from SamplingPlan's fields. No torch here."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from ilvr_lightning.checkpoints.description import add_override
from ilvr_lightning.config.describe import field_docs
from ilvr_lightning.config.schema import MAX_SIDE
from ilvr_lightning.diffusion.plan import DEFAULT_PRESET, PRESETS, SAMPLER_SETTINGS, SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import Parser
from ilvr_lightning.sampling.formats import FORMATS, PARQUET_ADVICE

Arguments = argparse.Namespace
"""sample.py's flags by their names, `plan`, and with --factor auto `chosen`, the N of each reference."""
DEFAULT_BATCH_SIZE = 16
"""The number of images that a device samples at once, if none is given."""
AUTO = "auto"
"""--factor auto takes for each reference the smallest N at which it fits."""
OTHER_FLAGS = {"num_steps": "--steps", "condition_from": "--range", "condition_to": "--range"}
"""The fields of a plan whose flag is not simply their name."""
BY_HAND = ("factor", "condition_from", "condition_to", "reference_sigma")
"""The fields of a plan whose flags take several values and are not made from the field."""
GROUPS = {
    "exact_low_band": "closely", "start_from": "closely", "candidates": "closely",
    "sampler": "drawn", "num_steps": "drawn", "spacing": "drawn", "eta": "drawn",
}  # fmt: skip
"""The group in --help of a plan's fields; all others are in the group "advanced"."""
REFERENCE_FLAGS = (
    "check", "range", "factor", "sweep", "mask", "exact_low_band", "start_from", "octave_gains", "reference_sigma",
    "candidates",
)  # fmt: skip
"""These flags say how a reference is followed."""
BESIDE_REPRODUCE = (
    "reproduce", "ref", "mask", "fit", "ckpt", "out", "overwrite", "device", "batch_size", "precision", "compile",
)  # fmt: skip
"""The flags that may be given with --reproduce: where its parts are found, where it is computed, where it goes."""


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The flags, and as `plan` the SamplingPlan that they make of a preset, without its several factors and ranges.

    Raises:
        UserError: a flag is missing, unknown, out of its range, or does not go with another.
    """
    args = make_parser().parse_args(list(argv))
    _check(args)
    args.compile = {"true": True, "false": False}.get(args.compile, args.compile)
    if args.reproduce is None and args.batch_size is None:
        args.batch_size = DEFAULT_BATCH_SIZE
    with flags_in_errors():
        args.plan, args.chosen = _make_plan(args), []
    if args.trajectory and args.plan.candidates > 1:
        raise UserError("--trajectory shows one run, and excludes --candidates; remove one")
    return args


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """Turn a ValueError about a setting into a UserError about its flag: sampling.num_steps is --steps here."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        message = str(error).replace("data.image_size", "--image-size")
        raise UserError(re.sub(r"sampling\.(\w+)", lambda match: flag_of(match[1]), message)) from None


def flag_of(field: str) -> str:
    """The flag of a field of a plan."""
    return OTHER_FLAGS.get(field, "--" + field.replace("_", "-"))


def _check(args: Arguments) -> None:
    """Raise a UserError for flags that are out of their range or do not go together."""
    if args.reproduce is not None:
        defaults = vars(make_parser().parse_args([]))
        wrong = [n for n, value in defaults.items() if n not in BESIDE_REPRODUCE and getattr(args, n) != value]
        if wrong:
            raise UserError(
                f"--reproduce cannot be combined with {flag_of(wrong[0])}, because what is sampled comes from the "
                f"image; give only {', '.join(map(flag_of, BESIDE_REPRODUCE[1:]))}"
            )
    elif not args.ref and not args.unconditional:
        raise UserError("--ref is missing; give images, folders or globs to follow, or --unconditional to follow none")
    if args.ref and args.unconditional:
        raise UserError("give --ref or --unconditional, not both")
    for name in ("num_samples", "batch_size", "devices"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_of(name)} must be at least 1: got {value}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be from 0 to {2**32 - 1}: got {args.seed}")
    if not args.out.strip() or not all(pattern.strip() for pattern in args.ref):
        raise UserError("--out or --ref is empty; give a folder to write to, and images to follow")
    if AUTO in args.factor and len(args.factor) > 1:
        raise UserError("--factor auto chooses one N for each reference; give it alone")
    for name in ("factor", "range"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UserError(f"{flag_of(name)} must list each value once")
    for name in REFERENCE_FLAGS:
        if args.unconditional and getattr(args, name):
            raise UserError(f"{flag_of(name)} needs --ref; --unconditional follows no reference")
    if args.start_from is not None and args.mask:
        raise UserError("--start-from cannot be combined with --mask; remove one of them")


def _make_plan(args: Arguments) -> SamplingPlan:
    """The preset with what the flags change."""
    given = {name: value for name in _made_fields() if (value := getattr(args, name)) is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    sampler = changes.get("sampler", SamplingPlan.preset(args.preset).sampler)
    for name in changes:
        owners = [owner for owner, settings in SAMPLER_SETTINGS.items() if name in settings]
        if owners and sampler not in owners:
            raise UserError(
                f"{flag_of(name)} is a setting of --sampler {' or '.join(owners)}; {sampler} does not read it"
            )
    if args.reference_sigma not in (None, "auto"):
        changes["reference_sigma"] = args.reference_sigma
    plan = SamplingPlan.preset(args.preset, **changes)
    if args.reference_sigma == "auto" and plan.exact_low_band:
        raise UserError("--exact-low-band keeps a reference's noise, and excludes --reference-sigma; remove one")
    for factor in set(args.factor) - {AUTO}:
        dataclasses.replace(plan, factor=factor)
    return plan


def make_parser() -> Parser:
    """The parser of every flag, in groups."""
    parser = Parser(
        prog="sample.py",
        description="Sample images that follow reference images (ILVR, Choi et al. 2021).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python sample.py --ref data/references --factor 4 8 --num-samples 4",
        allow_abbrev=False,
        stray="a reference image is given by --ref",
    )
    groups = {
        "what": parser.add_argument_group("what is sampled"),
        "closely": parser.add_argument_group("how closely the reference is followed"),
        "drawn": parser.add_argument_group("how it is drawn", "A preset, and changes to it."),
        "goes": parser.add_argument_group("where it goes"),
        "computed": parser.add_argument_group("where it is computed"),
        "advanced": parser.add_argument_group("advanced", "Changes to the preset, and what a checkpoint cannot tell."),
    }
    add = groups["what"].add_argument
    add(
        "--ref",
        nargs="+",
        default=[],
        metavar="PATH",
        help="reference images: files, folders, globs, or rows of a data set, DATASET:SPLIT or DATASET:SPLIT[A:B]; "
        "CONFIG.yaml:validation[A:B] are those that a training holds out",
    )
    add("--ckpt", metavar="PATH",
        help="a checkpoint, of another program too, or the name of a bundled model; default: the newest run's last "
        "checkpoint, or else a bundled model")  # fmt: skip
    add("--num-samples", type=int, default=4, metavar="N", help="images per reference, factor and range (%(default)s)")
    add("--unconditional", action="store_true", help="follow no reference")
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise (%(default)s)")
    add("--image-size", type=image_size, metavar="S|HxW",
        help="size in pixels, if the network allows another than its own")  # fmt: skip
    add("--fit", choices=("crop", "pad"), default="crop",
        help="how a reference of another shape is fitted: cropped, or padded with white (%(default)s)")  # fmt: skip
    add("--reproduce", metavar="FILE.png", help="make an image of sample.py again from the settings stored in it")
    add = groups["closely"].add_argument
    add("--factor", type=_factor, nargs="+", default=[], metavar="N|auto",
        help="the paper's N: a small N follows the reference closely, a large N leaves more to the model; several "
        "values are sampled side by side; auto: for each reference the smallest N from 4 to a quarter of the side at "
        "which it fits (auto; 8 for a checkpoint that holds no scores of held-out images)")  # fmt: skip
    add("--check", action="store_true",
        help="sample nothing; say at which N each reference fits, those of --factor or all")  # fmt: skip
    add("--range", type=_range, nargs="+", default=[], metavar="A:B",
        help="follow the reference from timestep A down to B; several are sampled side by side (T:0)")  # fmt: skip
    add("--sweep", action="store_true",
        help="sample every factor with every range; unless given, factors 4, 8, 16 ... and ranges that end at 0, T/4, "
        "T/2 and 3T/4")  # fmt: skip
    add("--mask", nargs="+", default=[], metavar="PATH",
        help="where the reference is followed: white to the end, grey during a part of the steps, black not at all; "
        "one mask for all references, or one per reference; a transparent reference is its own mask")  # fmt: skip
    add("--reference-sigma", type=_sigma, metavar="X|auto",
        help="standard deviation of the references' noise, for pixels in [-1, 1], or auto, which estimates it for each "
        "reference; noise is not followed (0)")  # fmt: skip
    groups["drawn"].add_argument("--preset", choices=tuple(PRESETS), default=DEFAULT_PRESET,
                                 help="named settings (%(default)s)")  # fmt: skip
    docs, hints = field_docs(SamplingPlan), typing.get_type_hints(SamplingPlan)
    for name in _made_fields():
        flags = [flag_of(name)] + ["--num-steps"] * (name == "num_steps")
        group = groups[GROUPS.get(name, "advanced")]
        group.add_argument(*flags, dest=name, default=None, help=docs[name], **_kind(hints[name]))
    add = groups["goes"].add_argument
    add("--out", default="samples", metavar="DIR", help="folder for the images (%(default)s)")
    add("--format", type=_format, choices=tuple(FORMATS), default="png",
        help="png: one file per image, and their index metadata.jsonl; npz: packed beside them for ADM's evaluator "
        "(%(default)s)")  # fmt: skip
    add(
        "--trajectory",
        action="store_true",
        help="also save the predicted image over the steps, as a strip and an animation per sample",
    )
    add("--overwrite", action="store_true", help="replace samples that the folder already holds")
    add = groups["computed"].add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="kind of device (%(default)s)")
    add("--devices", type=int, default=1, metavar="N", help="number of devices (%(default)s)")
    add("--batch-size", type=int, metavar="B", help=f"images sampled at once per device ({DEFAULT_BATCH_SIZE})")
    add("--precision", choices=("auto", "32", "bf16"), default="auto",
        help="precision of the network; auto: bf16 on a GPU that computes it fast, 32 elsewhere")  # fmt: skip
    add("--compile", choices=("auto", "true", "false"), default="auto",
        help="compile the network; auto: on a GPU, in runs that evaluate it for 5000 batches or more")  # fmt: skip
    add = groups["advanced"].add_argument
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights (%(default)s)")
    add_override(groups["advanced"])
    return parser


def _made_fields() -> list[str]:
    """The plan's fields whose flags are made from the field."""
    return [f.name for f in dataclasses.fields(SamplingPlan) if f.name not in BY_HAND]


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's options for a field's type."""
    if hint is str:
        return {"choices": tuple(SAMPLER_SETTINGS)}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, int | None):
        return {"type": int, "metavar": "N"}
    if hint is float:
        return {"type": float, "metavar": "X"}
    if hint == int | Literal["all"]:
        return {"type": _integer_or_all, "metavar": "N|all"}
    number = float if hint == tuple[float, ...] else int
    return {"type": number, "nargs": "+", "metavar": "X" if number is float else "T"}


def _integer_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; give an integer or all") from None


def _factor(text: str) -> int | Literal["auto"]:
    if text == AUTO:
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; give an integer, or auto") from None


def _sigma(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number, or auto") from None


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}; give two timesteps A:B, as in 1000:250")
    if int(first) < int(last):
        raise argparse.ArgumentTypeError(f"got {text!r}, which is reversed; give the larger timestep first")
    return int(first), int(last)


def _format(text: str) -> str:
    if text == "parquet":
        raise argparse.ArgumentTypeError(PARQUET_ADVICE)
    return text


def image_size(text: str) -> tuple[int, int]:
    """Height and width in pixels from S or HxW.

    Raises:
        argparse.ArgumentTypeError: the text is neither, or a side is longer than MAX_SIDE.
    """
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"got {text!r}; give one number, or height x width as in 64x96")
    if max(map(int, sides)) > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"got {text!r}; give at most {MAX_SIDE} pixels")
    return int(sides[0]), int(sides[-1])
