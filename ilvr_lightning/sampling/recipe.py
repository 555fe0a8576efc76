"""A picture's recipe: what it was made of, held in its PNG, and enough to make it again."""

import hashlib
import json
import os
import re
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ilvr_lightning.data.images import open_image
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError

KEY = "ilvr_lightning"


HASH = re.compile("[0-9a-f]{64}")


ENVIRONMENT_FIELDS = ("batch_size", "threads", "precision", "compiled", "device", "reference")
"""What does not change which picture is meant, only its last digits, or its name."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a picture depends on; no path, no name of a machine."""

    plan: dict[str, Any]
    seed: int
    sample: int
    weights: str
    checkpoint_sha256: str
    reference: str | None
    reference_sha256: str | None
    mask_sha256: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """What was said of the checkpoint that it cannot tell."""
    batch_size: int = 1
    threads: int = 0
    precision: str = "32"
    compiled: bool = False
    device: str = "cpu"

    @property
    def digest(self) -> str:
        """Equal for equal pictures."""
        meant = {k: v for k, v in asdict(self).items() if k not in ENVIRONMENT_FIELDS}
        return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def recipe_info(recipe: Recipe) -> PngInfo:
    """The recipe as PNG metadata."""
    info = PngInfo()
    info.add_text(KEY, json.dumps(asdict(recipe)))
    return info


END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last bytes of every PNG."""


def read_text(path: Path, key: str) -> str | None:
    """A whole PNG's text under a key, or None; this project's own are not decoded, which takes a tenth of the time."""
    if not path.is_file():  # a pipe may never end
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(1 << 16)
            file.seek(-len(END), os.SEEK_END)
            if file.read() != END:  # half of a file is none
                return None
        text = _text_in(head, key.encode())
        if text is None:
            with open_image(path) as image:
                text = image.info.get(key)
    except (OSError, SyntaxError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _text_in(head: bytes, key: bytes) -> str | None:
    """The text in a PNG's first bytes, where it lies before the pixels."""
    start = 8
    while (kind := head[start + 4 : start + 8]) not in (b"IDAT", b""):
        end = start + 8 + int.from_bytes(head[start : start + 4], "big")
        found, _, text = head[start + 8 : end].partition(b"\0")
        if kind == b"tEXt" and found == key and end <= len(head):
            return text.decode("latin-1")
        start = end + 4
    return None


def read_recipe(path: Path) -> Recipe | None:
    """The recipe that a PNG holds, or None where there is none that this version understands."""
    try:
        values = json.loads(read_text(path, KEY) or "null")
        recipe = Recipe(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    return recipe if _is_sound(recipe) else None


def _is_sound(recipe: Recipe) -> bool:
    """Whether every entry is of its type and within reason: a PNG may come from anywhere."""
    numbers = (recipe.seed, recipe.sample, recipe.batch_size, recipe.threads)
    hashes = (recipe.checkpoint_sha256, recipe.reference_sha256, recipe.mask_sha256)
    return (
        isinstance(recipe.plan, dict)
        and isinstance(recipe.overrides, dict)
        and all(type(n) is int and n >= 0 for n in numbers)
        and 1 <= recipe.batch_size <= 4096
        and recipe.threads <= 1024
        and recipe.seed < 2**32
        and recipe.sample < 2**63
        and all(h is None or (isinstance(h, str) and HASH.fullmatch(h)) for h in hashes)
        and recipe.checkpoint_sha256 is not None
        and (recipe.reference is None or isinstance(recipe.reference, str))
        and recipe.weights in ("ema", "raw")
        and recipe.precision in ("32", "bf16")
        and type(recipe.compiled) is bool
        and recipe.device in ("cpu", "cuda", "mps")
    )


def plan_of(recipe: Recipe) -> SamplingPlan:
    """The plan that a recipe holds."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.plan.items()}
    try:
        if set(values) != {f.name for f in fields(SamplingPlan)}:
            raise ValueError(f"it sets {', '.join(values) or 'nothing'}")
        for name, hint in typing.get_type_hints(SamplingPlan).items():
            if not _is_of(values[name], hint):
                raise ValueError(f"{name} is of another type: got {values[name]!r:.80}")
        return SamplingPlan(**values)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(f"the recipe's plan is not of this version: {error}") from None


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of one picture is of a field's type; what may be one an image is one."""
    if hint in (bool, int, str, NoneType):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(each, typing.get_args(hint)[0]) for each in value)
    kinds = typing.get_args(hint)
    return any(_is_of(value, kind) for kind in kinds if not (int in kinds and typing.get_origin(kind) is tuple))
