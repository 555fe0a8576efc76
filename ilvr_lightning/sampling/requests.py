"""The pictures of a run of sample.py, made up one by one when they are asked for: their recipes and names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from ilvr_lightning.data.references import Reference, References
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.recipe import ENVIRONMENT_FIELDS, Recipe

MOST_PICTURES = 10**7
"""Of one run."""


IDENTITY_FIELDS = [f.name for f in fields(Recipe) if f.name not in ENVIRONMENT_FIELDS]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a sweep varies: a column of its grid."""

    factor: int
    """N."""
    condition_from: int
    """The paper's a."""
    condition_to: int
    """The paper's b."""
    octave_gains: tuple[float, ...] = ()
    """What goes with this factor."""

    @property
    def range(self) -> tuple[int, int]:
        """(a, b)."""
        return self.condition_from, self.condition_to


def settings_of(
    plan: SamplingPlan,
    factors: Sequence[int],
    ranges: Sequence[tuple[int, int]] = (),
    gains: Mapping[int, tuple[float, ...]] | None = None,
) -> list[Setting]:
    """Every factor with every range; a resolved plan's own range, and gain, where none is given.

    Raises:
        ValueError: a range is reversed, or holds what is no timestep.
    """
    highs, lows = plan.condition_from, plan.condition_to
    assert isinstance(highs, int) and isinstance(lows, int)
    settings = [
        Setting(
            factor=factor, condition_from=a, condition_to=b, octave_gains=(gains or {}).get(factor, plan.octave_gains)
        )
        for factor in factors
        for a, b in ranges or [(highs, lows)]
    ]
    for setting in settings:
        replace(plan, **asdict(setting))
    return settings


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to make."""

    reference: Reference | None
    setting: Setting | None
    """None without a reference."""
    sample: int
    recipe: Recipe
    """What determines the picture; batch size, precision and device are filled in when it is made."""
    file: str
    index: int = 0
    """Its place in the run."""


class Jobs(Sequence[Job]):
    """Every picture of a run: references, their settings, their samples, in this order; none is kept.

    Args:
        references: what is followed; with none the pictures are unconditional.
        settings: of the plan, for each reference; [None] without.
        num_samples: of each.
        recipes: one a setting, of sample 0 and no reference.

    Raises:
        UserError: these are more than one run makes.
    """

    def __init__(
        self,
        references: References,
        settings: Sequence[Setting | None],
        num_samples: int,
        recipes: Sequence[Recipe],
    ) -> None:
        self.references, self.settings, self.num_samples = references, list(settings), num_samples
        self._recipes = list(recipes)
        ranges = {setting.range for setting in settings if setting is not None}
        self._stems = [_stem(setting, len(ranges) > 1) for setting in settings]
        self.unusable: dict[int, UserError] = {}
        """References that were found to be broken, and why."""
        if len(self) > MOST_PICTURES:
            raise UserError(
                f"--num-samples: these are {len(self)} pictures; a run makes at most {MOST_PICTURES}, another --seed "
                "and --out makes more"
            )

    @property
    def each(self) -> int:
        """Pictures of a reference, or of the run without one."""
        return len(self.settings) * self.num_samples

    def __len__(self) -> int:
        return max(1, len(self.references)) * self.each

    @overload
    def __getitem__(self, index: int) -> Job: ...

    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...

    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        """A picture, its reference read, its file named as if nothing had the name.

        Raises:
            UserError: its reference cannot be used.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = int(index)
        reference = self._reference(index)
        _, setting, sample = self._place(index)
        recipe = replace(
            self._recipes[setting],
            sample=sample,
            reference=reference.name if reference else None,
            reference_sha256=reference.sha256 if reference else None,
            mask_sha256=reference.mask_sha256 if reference else None,
        )
        file = f"{self.stem(index)}.png"
        return Job(
            reference=reference, setting=self.settings[setting], sample=sample, recipe=recipe, file=file, index=index
        )

    def _place(self, index: int) -> tuple[int, int, int]:
        number, sample = divmod(index, self.num_samples)
        return (*divmod(number, len(self.settings)), sample)

    def _reference(self, index: int) -> Reference | None:
        if not len(self.references):
            return None
        number = self._place(index)[0]
        if number in self.unusable:
            raise self.unusable[number]
        try:
            reference = self.references[number]
            if reference.mask is not None and self._recipes[0].plan["start_from"] is not None:
                raise UserError(f"--start-from begins from the whole reference; {reference.name} has a mask of its own")
        except UserError as error:
            self.unusable[number] = error
            raise
        return reference

    def is_usable(self, index: int) -> bool:
        """Whether a picture has a reference that can be read, or needs none."""
        try:
            self._reference(index)
        except UserError:
            return False
        return True

    def stem(self, index: int) -> str:
        """A picture's name, without reading its reference."""
        number, setting, sample = self._place(index)
        return f"{self.references.name(number) if len(self.references) else ''}{self._stems[setting]}_{sample}"

    def shares_stem(self, index: int) -> bool:
        """Whether another reference has the name of this one's."""
        return len(self.references) > 0 and self.references.name_is_ambiguous(self._place(index)[0])

    def fits(self, index: int, recipe: Recipe) -> bool:
        """Whether a recipe is a picture's, its reference taken on trust."""
        _, setting, sample = self._place(index)
        hashes = {name: getattr(recipe, name) for name in ("reference_sha256", "mask_sha256")}
        wanted = replace(self._recipes[setting], sample=sample, **hashes)
        follows = recipe.reference_sha256 is not None
        return follows == bool(len(self.references)) and all(
            getattr(wanted, n) == getattr(recipe, n) for n in IDENTITY_FIELDS
        )

    def is_of(self, index: int, recipe: Recipe) -> bool:
        """Whether a recipe is a picture's; reads its reference only if everything else agrees."""
        if not self.fits(index, recipe) or not self.is_usable(index):
            return False
        reference = self._reference(index)
        return reference is None or reference.key[1:] == (recipe.reference_sha256, recipe.mask_sha256)


def make_jobs(
    references: References,
    settings: Sequence[Setting],
    num_samples: int,
    plan: SamplingPlan,
    *,
    seed: int,
    weights: str,
    checkpoint_sha256: str,
    overrides: dict[str, Any] | None = None,
) -> Jobs:
    """Every picture of a run; without references, unconditional ones.

    Raises:
        UserError: these are more than one run makes.
    """
    chosen: list[Setting | None] = [*settings] if len(references) else [None]
    recipes = [
        Recipe(
            plan=plan_settings(plan, setting),
            seed=seed,
            sample=0,
            weights=weights,
            checkpoint_sha256=checkpoint_sha256,
            overrides=overrides or {},
            reference=None,
            reference_sha256=None,
        )
        for setting in chosen
    ]
    return Jobs(references, chosen, num_samples, recipes)


def _stem(setting: Setting | None, several_ranges: bool) -> str:
    """What a name says of a setting, after the reference's name."""
    if setting is None:
        return "unconditional"
    a, b = setting.range
    return f"_N{setting.factor}" + (f"_t{a}-{b}" if several_ranges else "")


def plan_settings(plan: SamplingPlan, setting: Setting | None) -> dict[str, Any]:
    """A plan as a recipe holds it: plain values, one setting."""
    chosen = plan if setting is None else replace(plan, **asdict(setting))
    plain: dict[str, Any] = json.loads(json.dumps(asdict(chosen)))
    return plain


def trajectory_files(picture: Path) -> tuple[Path, Path]:
    """The strip and the animation of a picture."""
    return picture.with_name(f"{picture.stem}_steps.png"), picture.with_name(f"{picture.stem}_steps.webp")
