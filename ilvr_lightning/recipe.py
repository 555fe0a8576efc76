"""A picture's recipe: what it was made of, held in its PNG, and enough to make it again."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "ilvr_lightning"
CIRCUMSTANCES = ("batch_size", "threads", "precision", "device", "reference")
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
    batch_size: int = 1
    threads: int = 0
    precision: str = "32"
    device: str = "cpu"

    @property
    def digest(self) -> str:
        """Equal for equal pictures."""
        meant = {k: v for k, v in asdict(self).items() if k not in CIRCUMSTANCES}
        return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def recipe_info(recipe: Recipe) -> PngInfo:
    """The recipe as PNG metadata."""
    info = PngInfo()
    info.add_text(KEY, json.dumps(asdict(recipe)))
    return info


def read_text(path: Path, key: str) -> str | None:
    """A PNG's text under a key, or None."""
    try:
        with Image.open(path) as image:
            text = image.info.get(key)
    except (OSError, SyntaxError, ValueError):
        return None
    return text if isinstance(text, str) else None


def read_recipe(path: Path) -> Recipe | None:
    """The recipe that a PNG holds, or None where there is none that this version understands."""
    try:
        values = json.loads(read_text(path, KEY) or "null")
        known = {f.name for f in fields(Recipe)}
        return Recipe(**values) if isinstance(values, dict) and set(values) <= known else None
    except (ValueError, TypeError):
        return None
