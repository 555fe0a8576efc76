"""The settings of the page as flags of sample.py, so that the page checks, draws and restores what sample.py does."""

import contextlib
import dataclasses
import functools
import re
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ilvr_lightning.app.models import Model, Models
from ilvr_lightning.data.references import References, find_references
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, PRESETS, SamplingPlan, as_tuple
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.arguments import BY_HAND, Arguments, flag_of, parse_arguments
from ilvr_lightning.sampling.recipe import Recipe, read_recipe, read_values
from ilvr_lightning.sampling.requests import SampleRequests, expand_sweep

MAX_SAMPLES = 16
"""The page draws at most this many samples at once."""
MAX_EVALUATIONS = 20_000
"""It evaluates the network at most this often for them, samples times steps: others wait meanwhile."""
MAX_CHARS = 1000
"""The further flags have at most this many characters."""
FURTHER = {
    *(flag_of(f.name) for f in dataclasses.fields(SamplingPlan) if f.name not in BY_HAND),
    *(flag_of(f.name).replace("--", "--no-", 1) for f in dataclasses.fields(SamplingPlan) if f.type in ("bool", bool)),
    "--range", "--reference-sigma", "--num-steps", "--fit",
}  # fmt: skip
"""The flags that may be typed on the page. None of them names a file: whoever opens the page could read it."""
CALIBRATED = (*LOW_BAND_FIELDS, "clip")
"""The checkpoint sets these fields of a plan, unless a flag does."""
VALUE = re.compile(r"\w[\w.:+-]*")
"""Matches the value of a further flag."""
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the page's controls say."""

    preset: str = "draft"
    factor: int = 8
    """N."""
    let_go_at: int = 0
    """The timestep down to which the reference is followed."""
    seed: int = 0
    num_samples: int = 4
    further: str = ""
    """Further flags of sample.py, as one types them."""

    @classmethod
    def of_controls(cls, *values: Any) -> "Settings":
        """The settings of the controls' values, in the order of the fields; they may come from anyone.

        Raises:
            UserError: a value is of another kind.
        """
        preset, *numbers, further = values
        try:
            factor, let_go_at, seed, num_samples = map(int, numbers)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"N, the range, the seed and the samples are whole numbers: got {numbers!r:.100}") from None
        if preset not in PRESETS:
            raise UserError(f"there is no preset {preset!r:.50}; the presets are {', '.join(PRESETS)}")
        return cls(
            preset=preset,
            factor=factor,
            let_go_at=let_go_at,
            seed=seed,
            num_samples=num_samples,
            further=str(further or ""),
        )

    def arguments(self, reference: str, T: int, sweep: bool = False) -> Arguments:
        """The command line of sample.py that draws the same.

        Args:
            reference: the file.
            T: the model's number of timesteps.
            sweep: every factor with every range, one sample each.

        Raises:
            UserError: a setting is out of its range, or a further flag is none that the page takes.
        """
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise UserError(f"the page draws from 1 to {MAX_SAMPLES} samples at once: got {self.num_samples}")
        which = ["--sweep"] if sweep else ["--factor", self.factor, "--range", f"{T}:{self.let_go_at}"]
        count = 1 if sweep else self.num_samples
        flags = [
            "--ref", reference, *which, "--preset", self.preset, "--seed", self.seed, "--num-samples", count,
            *further_flags(self.further),
        ]  # fmt: skip
        return parse_arguments([str(flag) for flag in flags])


def further_flags(text: str) -> list[str]:
    """The words of the further flags, as one types them.

    Raises:
        UserError: one of them is none that the page takes.
    """
    try:
        words = shlex.split(text[:MAX_CHARS])
    except ValueError as error:
        raise UserError(f"the further settings cannot be read: {error}") from None
    for word in words:
        flag = word.partition("=")[0]
        if flag not in FURTHER and not VALUE.fullmatch(word):
            raise UserError(f"the page does not take {flag[:50]}; it takes {', '.join(sorted(FURTHER))}")
    return words


def make_requests(model: Model, reference: str, settings: Settings, sweep: bool = False) -> SampleRequests:
    """The images to draw of a reference.

    Raises:
        UserError: the file is no image, or the settings do not fit it, the model or each other.
    """
    if not reference or not Path(reference).is_file():
        raise UserError("there is no reference; drop a picture, draw one, or take one of the examples")
    args = settings.arguments(reference, model.timesteps, sweep)
    plans = expand_sweep(args, model.denoiser, model.shape)
    evaluations = sum(plan.evaluations for plan in plans) * args.num_samples
    if evaluations > MAX_EVALUATIONS:
        raise UserError(
            f"this takes {evaluations} evaluations of the network, and the page allows {MAX_EVALUATIONS}; lower the "
            "number of samples or steps, or use sample.py"
        )
    return SampleRequests(
        read_reference(reference, model, args.fit),
        plans,
        args.num_samples,
        seed=args.seed,
        weights="ema",
        checkpoint_sha256=model.sha256,
        overrides={},
        estimate_noise=args.reference_sigma == "auto",
    )


def read_reference(path: str, model: Model, fit: str = "crop") -> References:
    """The reference in a file, fitted to a model's images. One file is decoded at a time, so that memory is bounded.

    Raises:
        UserError: it is no image, or too large.
    """
    with _one_at_a_time:
        return _read(path, model.shape, fit, model.denoiser.value_range)


@functools.lru_cache(64)
def _read(path: str, shape: tuple[int, int, int], fit: Any, value_range: Any) -> References:
    return find_references([path], shape, fit, value_range=value_range)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What the recipe in a PNG says."""

    model: str | None
    """The name of its model, where the page has it."""
    reference: str | None
    """The file of its reference, where the page has it."""
    settings: Settings
    notes: Sequence[str]
    """Sentences that say what is restored and what differs."""


def restore(path: str, models: Models, current: str, known: Sequence[str]) -> Restored | None:
    """The settings of a PNG of this project; None for another picture.

    Args:
        path: the PNG.
        models: which the page has.
        current: the name of the model that is chosen.
        known: the files of references that the page knows, of which one may be that of the PNG.

    Raises:
        UserError: it holds a recipe that this version cannot use.
    """
    if read_values(Path(path)) is None:
        return None
    recipe = read_recipe(Path(path))
    model = next((name for name in models.names if models.sha256(name) == recipe.checkpoint_sha256), None)
    loaded = models.load(model or current)
    settings, is_exact = _settings_of(recipe, loaded)
    fits = ((file, fit) for file in known for fit in ("crop", "pad") if _is_reference(file, fit, loaded, recipe))
    reference, fit = next(fits, (None, "crop"))
    if fit == "pad":
        settings = replace(settings, further=f"{settings.further} --fit pad".strip())
    notes = []
    if model is None:
        notes.append(
            f"Its model differs: the one with SHA-256 {recipe.checkpoint_sha256[:12]} is not here, and {current} is "
            "used. Start app.py with --ckpt to add it."
        )
    with Image.open(path) as image:
        size = (image.height, image.width)
    if model is not None and size != loaded.shape[1:]:
        height, width = loaded.shape[1:]
        notes.append(f"It has {size[1]}x{size[0]} pixels, and the page draws {width}x{height}.")
        is_exact = False
    elif recipe.reference_sha256 is None:
        notes.append("It follows no reference, and the samples of the page follow the present one.")
        is_exact = False
    elif reference is None:
        notes.append(f"Its reference differs: {recipe.reference or 'its file'} is not here. Drop that picture, too.")
    if not is_exact:
        notes.append("The page cannot restore every setting; sample.py --reproduce makes the picture again.")
    notes.insert(
        0,
        f"The settings of {Path(path).name} are restored"
        + ("." if notes else ", and model and reference are the same."),
    )
    return Restored(model=model, reference=reference, settings=settings, notes=notes)


def _is_reference(file: str, fit: str, model: Model, recipe: Recipe) -> bool:
    with contextlib.suppress(UserError):
        found = read_reference(file, model, fit)[0]
        return (found.sha256, found.mask_sha256) == (recipe.reference_sha256, recipe.mask_sha256)
    return False


def _settings_of(recipe: Recipe, model: Model) -> tuple[Settings, bool]:
    """The settings that draw an image, and whether they do so exactly."""
    plan = recipe.plan
    factor, let_go_at = as_tuple(plan.factor)[0], as_tuple(plan.condition_to)[0]
    plain = Settings(
        factor=min(model.factors, key=lambda n: abs(n - factor)),
        let_go_at=min(let_go_at, model.timesteps),
        seed=recipe.seed,
        num_samples=min(max(Settings.num_samples, recipe.sample + 1), MAX_SAMPLES),
    )
    attempts = [
        replace(plain, preset=preset, further=further)
        for preset in PRESETS
        for further in (
            "",
            _flags(plan, preset, model.timesteps, ()),
            _flags(plan, preset, model.timesteps, CALIBRATED),
        )
    ]
    for attempt in sorted(attempts, key=lambda each: len(each.further)):
        with contextlib.suppress(UserError):
            if expand_sweep(attempt.arguments("-", model.timesteps), model.denoiser, model.shape) == [plan]:
                return attempt, recipe.sample < MAX_SAMPLES and recipe.weights == "ema" and not recipe.overrides
    return plain, False


def _flags(plan: SamplingPlan, preset: str, T: int, always: Sequence[str]) -> str:
    """The flags by which a plan differs from a preset, and those of some fields in any case."""
    base = SamplingPlan.preset(preset)
    words: list[str] = []
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        is_given = value == getattr(base, field.name) and field.name not in always
        if field.name in BY_HAND or value in (None, ()) or is_given:
            continue
        flag = flag_of(field.name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    if plan.condition_from != T:
        words += ["--range", f"{plan.condition_from}:{plan.condition_to}"]
    if plan.reference_sigma:
        words += ["--reference-sigma", str(plan.reference_sigma)]
    return " ".join(words)
