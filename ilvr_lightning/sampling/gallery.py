"""The page that shows a folder of samples, made of its index, and the low-pass images that it shows beside them."""

import contextlib
import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import read_image, to_image
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.plan import CHOICES, FORMER_DEFAULTS, SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.index import count_lines, listed_images
from ilvr_lightning.sampling.recipe import SHA256
from ilvr_lightning.visual.grids import low_pass_pixels
from ilvr_lightning.visual.pages import write_page

MAX_IMAGES = 10_000
"""A page shows at most this many images, the first of the index, so that a browser opens it at once; it says so."""
MAX_RECIPE_CHARS = 20_000
"""A longer recipe is not shown; those of sample.py have a tenth of that."""
PER_IMAGE = {
    "sample", "reference", "reference_sha256", "mask_sha256", "evidence", "factor", "condition_from", "condition_to",
}  # fmt: skip
"""These fields of a recipe are stored with the image; it shares all others with other images."""


def save_low_pass(reference: Reference, plan: SamplingPlan, folder: Path) -> None:
    """Keep phi_N of a reference as an image in a folder of samples, unless it is there.

    Args:
        reference: fitted.
        plan: gives N, one value, and the filter.
        folder: the folder of the samples.
    """
    assert isinstance(plan.factor, int)
    path = folder / _low_pass_name(reference.sha256, plan.factor, plan.kernel, plan.orthogonal)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        (pixels,) = low_pass_pixels([replace(reference, mask=None)], plan.factor, plan)
        write_atomically(path, functools.partial(to_image(pixels).save, format="PNG"))


def write_gallery(folder: Path) -> Path:
    """Write the page of a folder of samples, which shows what its index lists; equal folders give equal bytes.

    The index and the recipes in it may come from anyone.

    Returns:
        The page.
    """
    references: dict[tuple[Any, ...], int] = {}
    low_pass: dict[str, int] = {}
    recipes: dict[str, int] = {}
    images: list[list[Any]] = []
    for line in itertools.islice(listed_images(folder), MAX_IMAGES):
        recipe = _read_recipe(line["recipe"])
        low = _low_pass_of(folder, line["factor"], recipe)
        kept = (_kept(folder, recipe.get(name)) for name in ("reference_sha256", "mask_sha256"))
        shared = {name: value for name, value in recipe.items() if name not in PER_IMAGE}
        images.append(
            [
                line["file_name"],
                _number(references, (line["reference"], *kept)),
                (line["factor"], line["condition_to"], -line["condition_from"]),  # from close to loose
                _number(recipes, json.dumps(shared)),
                None if low is None else _number(low_pass, low),
                line["sample"],
                recipe.get("evidence"),
            ]
        )
    settings = sorted({image[2] for image in images})
    places = {setting: place for place, setting in enumerate(settings)}
    for image in images:
        image[2] = places[image[2]]
    different = [json.loads(recipe) for recipe in recipes]
    shared = {
        name: value
        for name, value in (different[0] if different else {}).items()
        if all(name in recipe and recipe[name] == value for recipe in different)
    }
    data = {
        "total": len(images) if len(images) < MAX_IMAGES else count_lines(folder),
        "size": _size_of_first(folder, images),
        "references": list(references),
        "settings": [(factor, -first, last) for factor, last, first in settings],
        "shared": shared,
        "recipes": [{name: v for name, v in recipe.items() if name not in shared} for recipe in different],
        "low_pass": list(low_pass),
        "images": images,
    }
    return write_page(folder, "samples.html", data)


def _number(table: dict[Any, int], key: Any) -> int:
    """The place of a key in a table, which is added where it is new."""
    return table.setdefault(key, len(table))


def _read_recipe(text: str) -> dict[str, Any]:
    """The settings that a recipe holds, those of its plan among them, without those that are empty."""
    try:
        recipe = json.loads(text[:MAX_RECIPE_CHARS], parse_float=_finite, parse_constant=str)
        values = {**FORMER_DEFAULTS, **recipe.pop("plan"), **recipe}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _finite(text: str) -> float | str:
    return number if math.isfinite(number := float(text)) else text  # a browser's JSON has no infinity


def _kept(folder: Path, sha256: object) -> str | None:
    """The copy of a reference or a mask, if it is there."""
    name = f"references/{sha256}.png"
    return name if isinstance(sha256, str) and SHA256.fullmatch(sha256) and (folder / name).is_file() else None


def _low_pass_of(folder: Path, factor: int, recipe: dict[str, Any]) -> str | None:
    """The low-pass image that belongs to a recipe, if it is there."""
    sha256, kernel, orthogonal = recipe.get("reference_sha256"), recipe.get("kernel"), recipe.get("orthogonal")
    if not (isinstance(sha256, str) and SHA256.fullmatch(sha256)) or kernel not in CHOICES["kernel"]:
        return None
    name = _low_pass_name(sha256, factor, kernel, orthogonal is True)
    return name if (folder / name).is_file() else None


def _low_pass_name(sha256: str, factor: int, kernel: str, orthogonal: bool) -> str:
    return f"low_pass/{sha256}_N{factor}_{kernel}{'_orthogonal' if orthogonal else ''}.png"


def _size_of_first(folder: Path, images: list[list[Any]]) -> tuple[int, int]:
    """Width and height in pixels; all images of a run have one size."""
    with contextlib.suppress(UserError):
        return read_image(folder / images[0][0]).size if images else (1, 1)
    return 1, 1
