"""sample.py's command line, its plan flags made from SamplingPlan itself."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

from ilvr_lightning.checkpoints.description import add_override
from ilvr_lightning.config.describe import field_docs
from ilvr_lightning.config.schema import MAX_SIDE
from ilvr_lightning.diffusion.plan import DEFAULT_PRESET, PRESETS, SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import Parser

FLAGS = {"num_steps": ["--steps", "--num-steps"], "condition_from": [], "condition_to": []}
"""Fields whose flag is not their name; the range of two of them is --range A:B."""


MOST_SAMPLES = 10**7
"""A run makes."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, SamplingPlan]:
    """The arguments, and the plan that they make of a preset.

    Raises:
        UserError: something is missing, unknown or out of its range.
    """
    args = make_parser().parse_args(list(argv))
    if not args.ref and not args.unconditional and args.reproduce is None:
        raise UserError(
            "--ref is missing: give pictures, folders or globs to follow (or --unconditional to follow none)"
        )
    if args.ref and args.unconditional:
        raise UserError("give --ref or --unconditional, not both")
    for name in ("num_samples", "batch_size", "devices"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1: got {getattr(args, name)}")
    if args.num_samples > MOST_SAMPLES:
        raise UserError(
            f"--num-samples must be at most {MOST_SAMPLES}: got {args.num_samples}; another --seed and --out makes more"
        )
    if args.trajectory and args.format != "png":
        raise UserError(f"--trajectory draws beside PNGs; leave --format {args.format} out")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be from 0 to {2**32 - 1}: got {args.seed}")
    if not args.out.strip() or not all(pattern.strip() for pattern in args.ref):
        raise UserError("--out or --ref is empty; give a folder to write to, and pictures")
    if len(set(args.factor)) < len(args.factor):
        raise UserError(f"--factor must list factors, each once: got {' '.join(map(str, args.factor))}")
    for flag in ("range", "factor", "sweep", "mask", "exact_low_band", "start_from", "octave_gains"):
        if args.unconditional and getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} is for --ref; --unconditional follows no reference")
    if args.start_from is not None and args.mask:
        raise UserError("--start-from begins from the whole reference; leave it or --mask out")
    if args.range is not None and len(set(args.range)) < len(args.range):
        raise UserError("--range must list ranges, each once")
    if args.reproduce is not None and args != make_parser().parse_args(_without_plan(args)):
        raise UserError(
            "--reproduce takes the settings from the picture; beside it give --ref, --mask, --fit, --ckpt, --out or "
            "--overwrite"
        )
    return args, make_plan(args)


def _without_plan(args: argparse.Namespace) -> list[str]:
    """What a --reproduce command may say, said again."""
    kept = ["--reproduce", args.reproduce, "--out", args.out, "--fit", args.fit]
    kept += ["--ckpt", args.ckpt] if args.ckpt is not None else []
    kept += ["--mask", *args.mask] if args.mask else []
    kept += ["--overwrite"] if args.overwrite else []
    return kept + (["--ref", *args.ref] if args.ref else [])


def in_flags(message: str) -> str:
    """A message about settings, with sample.py's names for them."""
    message = re.sub(r"sampling\.condition_(from|to)", "--range", message).replace("sampling.num_steps", "--steps")
    message = message.replace("data.image_size", "--image-size")
    return re.sub(r"sampling\.(\w+)", lambda match: "--" + match[1].replace("_", "-"), message)


def make_plan(args: argparse.Namespace) -> SamplingPlan:
    """The preset with what the flags change; several factors become one plan a factor later."""
    changes = {f.name: value for f in _plain_fields() if (value := getattr(args, f.name)) is not None}
    sampler = changes.get("sampler", PRESETS[args.preset].get("sampler", "ddpm"))
    for flag, owners in (("eta", ("ddim", "dpmpp_2m")), ("variance", ("ddpm",))):
        if flag in changes and sampler not in owners:
            raise UserError(f"--{flag} is of --sampler {' or '.join(owners)}; with {sampler} it does nothing")
    try:
        for factor in args.factor:
            SamplingPlan(factor=factor)
        for a, b in args.range or []:
            SamplingPlan(condition_from=a, condition_to=b)
        return SamplingPlan.preset(args.preset, **changes)
    except ValueError as error:
        raise UserError(in_flags(str(error))) from None


def make_parser() -> Parser:
    """Every flag; those of the plan from its fields."""
    parser = Parser(
        prog="sample.py",
        description="Sample pictures that follow reference pictures (ILVR, Choi et al. 2021).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python sample.py --ref data/references --factor 4 8 --num-samples 4",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ref", nargs="+", default=[], metavar="PATH",
        help="reference pictures: files, folders, globs, or DATASET:SPLIT or DATASET:SPLIT[A:B]")  # fmt: skip
    add("--ckpt", metavar="PATH",
        help="checkpoint, foreign ones too, or the name of a model in data/pretrained; unless given, the newest run's "
        "last one, else the model that comes with the project")  # fmt: skip
    add("--out", default="samples", metavar="DIR", help="folder for the pictures (%(default)s)")
    add("--num-samples", type=int, default=4, metavar="N", help="pictures a reference and factor (%(default)s)")
    add("--format", choices=("png", "parquet", "npz"), default="png",
        help="png: a file a picture; parquet: a data set that load_dataset reads; npz: an array for ADM's evaluator "
        "(%(default)s)")  # fmt: skip
    add("--unconditional", action="store_true", help="follow no reference")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add_override(parser)
    add("--weights", choices=("ema", "raw"), default="ema", help="average or raw weights (%(default)s)")
    add("--fit", choices=("crop", "pad"), default="crop", help="how references of another shape fit (%(default)s)")
    add("--mask", nargs="+", default=[], metavar="PATH",
        help="where the reference is followed: white to the end, grey for a part of the steps, black not at all; one "
        "picture for all references, or one for each; a reference with transparency brings its own")  # fmt: skip
    add("--trajectory", action="store_true", help="draw x_0 over the steps: a strip and an animation a picture")
    add("--image-size", type=_size, metavar="S|HxW", help="pixels, where the network allows another size")
    add("--batch-size", type=int, default=16, metavar="B", help="pictures sampled at once on a device (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to sample (%(default)s)")
    add("--devices", type=int, default=1, metavar="N", help="number of devices (%(default)s)")
    add("--precision", choices=("auto", "32", "bf16"), default="auto",
        help="of the network; auto: bf16 on a GPU that has it, 32 elsewhere")  # fmt: skip
    add("--compile", type=_compile, default="auto", metavar="auto|true|false",
        help="compile the network; auto: on a GPU, and on a CPU where a long run wins the time back")  # fmt: skip
    add("--overwrite", action="store_true", help="make again what the folder already holds")
    add("--reproduce", metavar="FILE.png", help="make a picture of ours again, from the recipe in it")
    plan = parser.add_argument_group("plan", "a preset, and what changes it; unless given, a setting is the preset's")
    plan.add_argument("--preset", choices=tuple(PRESETS), default=DEFAULT_PRESET, help="named plan (%(default)s)")
    plan.add_argument("--factor", type=int, nargs="+", default=[], metavar="N",
                      help="the paper's N, one or several; each is sampled (8)")  # fmt: skip
    plan.add_argument("--range", type=_range, nargs="+", metavar="A:B",
                      help="condition in timesteps A down to B (T:0), one or several")  # fmt: skip
    plan.add_argument("--sweep", action="store_true",
                      help="every factor with every range; those that are not given are the paper's")  # fmt: skip
    docs, hints = field_docs(SamplingPlan), typing.get_type_hints(SamplingPlan)
    for f in _plain_fields():
        plan.add_argument(*_flags(f.name), dest=f.name, default=None, help=docs[f.name], **_kind(hints[f.name]))
    return parser


def _plain_fields() -> list[dataclasses.Field[Any]]:
    """The plan's fields that have a flag of their own."""
    return [f for f in dataclasses.fields(SamplingPlan) if f.name != "factor" and _flags(f.name)]


def _flags(name: str) -> list[str]:
    return FLAGS.get(name, ["--" + name.replace("_", "-")])


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's options for a field's type."""
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, float, int | None):
        return {"type": float if hint is float else int, "metavar": "X" if hint is float else "N"}
    if hint == tuple[float, ...]:
        return {"type": float, "nargs": "+", "metavar": "X", "action": _Tuple}
    return {"type": int, "nargs": "+", "metavar": "T", "action": _Tuple}


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}; give two timesteps A:B, as in 1000:250")
    return int(first), int(last)


def _compile(text: str) -> bool | str:
    if text not in ("auto", "true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}; give auto, true or false")
    return text if text == "auto" else text == "true"


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"got {text!r}; give one number, or height x width as in 64x96")
    if max(map(int, sides)) > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"got {text!r}; give at most {MAX_SIDE} pixels")
    return int(sides[0]), int(sides[-1])
