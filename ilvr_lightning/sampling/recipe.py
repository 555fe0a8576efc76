"""The recipe in a PNG: every setting that the image depends on, enough to make it again."""

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ilvr_lightning.config.load import from_dict
from ilvr_lightning.diffusion.plan import FORMER_DEFAULTS, SamplingPlan
from ilvr_lightning.errors import UserError

KEY = "ilvr_lightning"
"""The PNG key under which the recipe is stored, as JSON."""
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last bytes of every complete PNG."""
SHA256 = re.compile("[0-9a-f]{64}")
"""Matches a SHA-256 in hexadecimal digits; files are looked for by it, so it must be nothing else."""
OUTSIDE_IDENTITY = ("batch_size", "threads", "precision", "compiled", "device", "reference", "evidence")
"""These fields of a recipe say how an image was computed, what it is called and what was found, not which is meant."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that an image depends on. It holds no path and no name of a machine.

    A field that an old PNG lacks means its default here, which therefore never changes.

    Raises:
        ValueError: a field is out of its range, or the plan is that of several images.
    """

    plan: SamplingPlan
    """The resolved settings of this one image."""
    seed: int
    sample: int
    """The sample's number: with the seed and the reference it determines the noise."""
    weights: Literal["ema", "raw"]
    checkpoint_sha256: str
    reference: str | None
    """The reference's name, or None for an unconditional image."""
    reference_sha256: str | None
    mask_sha256: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """What the user said of a checkpoint that does not tell it."""
    batch_size: int = 1
    threads: int = 0
    """The number of CPU threads; 0 means that it is not known."""
    precision: Literal["32", "bf16"] = "32"
    compiled: bool = False
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    evidence: float | None = None
    """How well the run explained the reference (diffusion/evidence.py): comparable between images of one reference."""

    def __post_init__(self) -> None:
        for name, low in {"seed": 0, "sample": 0, "batch_size": 1, "threads": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}: got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below {2**32}: got {self.seed}")
        for name in ("checkpoint_sha256", "reference_sha256", "mask_sha256"):
            value = getattr(self, name)
            if value is not None and not SHA256.fullmatch(value):
                raise ValueError(f"{name} must have 64 hexadecimal digits: got {value!r:.80}")
        plan = self.plan
        per_image = (
            plan.factor, plan.condition_from, plan.condition_to, plan.reference_sigma, *plan.octave_gains,
        )  # fmt: skip
        if any(isinstance(value, tuple | list) for value in per_image):
            raise ValueError("the plan must be that of one image")

    def plain(self) -> dict[str, Any]:
        """The recipe as the JSON in the PNG holds it."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def png_info(self) -> PngInfo:
        """The recipe as PNG metadata."""
        info = PngInfo()
        info.add_text(KEY, json.dumps(asdict(self)))
        return info


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """What two recipes, as JSON holds them, must share to be of one image.

    A field is left out where it has the value that its absence stands for. So a field that is added later changes the
    identity of no image that exists already.
    """
    meant = _without_defaults({name: values[name] for name in values if name not in OUTSIDE_IDENTITY}, Recipe)
    return {**meant, "plan": _without_defaults(values["plan"], SamplingPlan)}


def digest(meant: Mapping[str, Any]) -> str:
    """The SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def _without_defaults(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    absent = _meaning_of_absence(cls)
    return {name: value for name, value in values.items() if name not in absent or value != absent[name]}


@functools.cache
def _meaning_of_absence(cls: type) -> dict[str, Any]:
    """What each field that may be absent meant to the program before the field existed, as JSON holds it."""
    made = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    former = FORMER_DEFAULTS if issubclass(cls, SamplingPlan) else {}
    known = {name: value for name, value in {**made, **former}.items() if value is not MISSING}
    values: dict[str, Any] = json.loads(json.dumps(known))
    return values


def read_values(path: Path) -> dict[str, Any] | None:
    """The recipe that a PNG holds, as JSON holds it and unchecked, or None where a complete PNG holds none."""
    try:
        values = json.loads(png_text(path, KEY) or "null")
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("plan"), dict) else None


def read_recipe(path: Path) -> Recipe:
    """The recipe that a PNG holds, checked: the PNG may come from anywhere.

    Raises:
        UserError: there is none, or it holds fields or values that this version does not know.
    """
    values = read_values(path)
    if values is None:
        raise UserError(f"{path} holds no recipe; give a PNG that sample.py wrote")
    name = values.get("reference")  # a file name may hold anything, ${...} included
    try:
        checked = from_dict(Recipe, {**values, "reference": None, "plan": {**FORMER_DEFAULTS, **values["plan"]}})
    except UserError as error:
        raise UserError(f"the recipe in {path} cannot be used by this version: {error}") from None
    return replace(checked, reference=name if isinstance(name, str) else None)


def png_text(path: Path, key: str) -> str | None:
    """The text under a key of a complete PNG, or None. The pixels are not decoded."""
    try:
        if not path.is_file():  # a pipe may never end
            return None
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            file.seek(-len(PNG_END), os.SEEK_END)
            is_complete = file.read() == PNG_END
            text = Image.open(file, formats=("PNG",)).info.get(key) if is_complete else None
    except Exception:  # Pillow raises anything from struct.error to IndexError on damaged files
        return None
    return text if isinstance(text, str) else None
