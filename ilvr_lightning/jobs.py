"""The pictures of a run of sample.py: their recipes, names, files and grids."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import DataLoader

from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.grid import low_pass_pixels, reference_columns
from ilvr_lightning.images import BrokenImageError, Column, Pixels, draw_grid, read_image, to_pixels
from ilvr_lightning.recipe import Recipe, plan_of, read_recipe, read_text
from ilvr_lightning.references import Reference

MAX_ROWS = 24
"""More references than these are not drawn in one grid."""
GRID_KEY = "ilvr_lightning_grid"


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


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid to draw once its samples are written."""

    path: Path
    columns: Callable[[], list[Column]]
    title: str
    digest: str
    """Equal for equal samples; kept in the file, so that a grid of others is not overwritten."""

    def draw(self) -> None:
        """Draw it and write it."""
        info = PngInfo()
        info.add_text(GRID_KEY, self.digest)
        write_whole(
            self.path, functools.partial(draw_grid(self.columns(), self.title).save, format="PNG", pnginfo=info)
        )


class SampleJobs(pl.LightningDataModule):
    """Pictures that are still to be made, shared out over the ranks; later, the grids that they form.

    Args:
        jobs: all of them, in the grids' order.
        folder: where they go.
        batch_size: pictures sampled at once on a device.
        overwrite: make again what is done.
        trajectory: a picture is done once its steps are drawn, too.
    """

    def __init__(
        self, jobs: Sequence[Job], folder: Path, batch_size: int, overwrite: bool = False, trajectory: bool = False
    ) -> None:
        super().__init__()
        self.jobs = list(jobs)
        self.folder = folder
        self.batch_size = batch_size
        self.overwrite = overwrite
        self.trajectory = trajectory
        self.todo = [job for job in self.jobs if overwrite or not self._is_done(job)]

    def _is_done(self, job: Job) -> bool:
        path = self.folder / job.file
        drawn = all(p.is_file() and p.stat().st_size for p in trajectory_files(path))
        return _is_made(path, job.recipe) and (drawn or not self.trajectory)

    def predict_dataloader(self) -> DataLoader[list[Job]]:
        """This rank's share in batches; an empty one where there is nothing to do, so that no rank ends early."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        mine = self.todo[rank::world]
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)] or [[]]
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]  # a list is enough

    def transfer_batch_to_device(self, batch: list[Job], device: torch.device, dataloader_idx: int) -> list[Job]:
        """Jobs are no tensors; their references go to the device when they are sampled."""
        return batch

    def grids(self) -> Iterator[Grid]:
        """One grid a reference, or one of all unconditional samples; then all references in one, if they are few."""
        groups: dict[tuple[str, str, str | None] | None, list[Job]] = {}
        for job in self.jobs:
            groups.setdefault(job.reference.key if job.reference else None, []).append(job)
        names: set[str] = set()
        for key, jobs in groups.items():
            name = key[0] if key else "unconditional"
            name = f"{name}_{hashlib.sha256(repr(key).encode()).hexdigest()[:6]}" if key and name in names else name
            names.add(name)
            yield self._grid(f"{name}_grid", [jobs], name)
        if 1 < len(groups) <= MAX_ROWS:
            yield self._grid("grid", list(groups.values()), f"{len(groups)} references")

    def _grid(self, stem: str, groups: list[list[Job]], what: str) -> Grid:
        recipe = groups[0][0].recipe
        title = f"{what}: {recipe.plan['sampler']}, {recipe.plan['num_steps']} steps, {recipe.weights} weights"
        digest = hashlib.sha256("".join(job.recipe.digest for jobs in groups for job in jobs).encode()).hexdigest()
        path = self.folder / f"{stem}.png"
        if path.exists() and not self.overwrite and read_text(path, GRID_KEY) != digest:
            path = self.folder / f"{stem}_{digest[:8]}.png"
        return Grid(path=path, columns=functools.partial(self._columns, groups), title=title, digest=digest)

    def _columns(self, groups: list[list[Job]]) -> list[Column]:
        def tiles(jobs: list[Job], setting: Setting | None) -> list[Pixels]:
            return [to_pixels(read_image(self.folder / job.file)) for job in jobs if job.setting == setting]

        references = [jobs[0].reference for jobs in groups if jobs[0].reference is not None]
        if not references:
            made = tiles(groups[0], None)
            across = min(8, len(made))
            return [Column(label="unconditional", rows=[made[i : i + across] for i in range(0, len(made), across)])]
        settings = [s for s in dict.fromkeys(job.setting for job in groups[0]) if s is not None]
        plan = plan_of(groups[0][0].recipe)
        if len({setting.range for setting in settings}) == 1:
            by_factor = {setting.factor: setting for setting in settings}
            return reference_columns(
                references, list(by_factor), plan, lambda row, factor: tiles(groups[row], by_factor[factor])
            )
        columns = [Column(label="reference", rows=[[r.shown()] for r in references])]
        for factor in dict.fromkeys(setting.factor for setting in settings):
            low = low_pass_pixels(references, factor, plan)
            columns.append(Column(label=f"N={factor}: low-pass", rows=[[low[row]] for row in range(len(references))]))
            for setting in (s for s in settings if s.factor == factor):
                rows = [tiles(jobs, setting) for jobs in groups]
                a, b = setting.range
                columns.append(Column(label=f"N={factor}, t {a} to {b}", rows=rows))
        return columns


def _as_it_is(batch: list[Job]) -> list[Job]:
    return batch


def make_jobs(
    references: Sequence[Reference],
    settings: Sequence[Setting],
    num_samples: int,
    plan: SamplingPlan,
    *,
    seed: int,
    weights: str,
    checkpoint_sha256: str,
    overrides: dict[str, Any] | None = None,
    folder: Path,
    overwrite: bool = False,
) -> list[Job]:
    """Every picture of a run, with its recipe and its file name; without references, unconditional ones.

    A name that another recipe has taken, in this run or (unless it may be overwritten) in the folder, gets a short hash
    of its recipe.
    """
    jobs: list[Job] = []
    taken: set[str] = set()
    choices: list[Reference | None] = [*references] or [None]
    several = len({setting.range for setting in settings}) > 1
    for reference in choices:
        for setting in settings if reference is not None else [None]:
            for sample in range(num_samples):
                recipe = Recipe(
                    plan=plan_settings(plan, setting),
                    seed=seed,
                    sample=sample,
                    weights=weights,
                    checkpoint_sha256=checkpoint_sha256,
                    overrides=overrides or {},
                    reference=reference.name if reference else None,
                    reference_sha256=reference.sha256 if reference else None,
                    mask_sha256=reference.mask_sha256 if reference else None,
                )
                stem = f"{_name(reference, setting, several)}_{sample}"
                file = f"{stem}.png"
                if file in taken or not (overwrite or _free(folder / file, recipe)):
                    file = f"{stem}_{recipe.digest[:8]}.png"
                taken.add(file)
                jobs.append(Job(reference=reference, setting=setting, sample=sample, recipe=recipe, file=file))
    return jobs


def _name(reference: Reference | None, setting: Setting | None, several_ranges: bool) -> str:
    if reference is None or setting is None:
        return "unconditional"
    a, b = setting.range
    return f"{reference.name}_N{setting.factor}" + (f"_t{a}-{b}" if several_ranges else "")


def plan_settings(plan: SamplingPlan, setting: Setting | None) -> dict[str, Any]:
    """A plan as a recipe holds it: plain values, one setting."""
    chosen = plan if setting is None else replace(plan, **asdict(setting))
    plain: dict[str, Any] = json.loads(json.dumps(asdict(chosen)))
    return plain


def trajectory_files(picture: Path) -> tuple[Path, Path]:
    """The strip and the animation of a picture."""
    return picture.with_name(f"{picture.stem}_steps.png"), picture.with_name(f"{picture.stem}_steps.webp")


def _is_made(path: Path, recipe: Recipe) -> bool:
    """Whether a file holds this very picture, whole."""
    found = read_recipe(path) if path.exists() else None
    return found is not None and found.digest == recipe.digest


def _free(path: Path, recipe: Recipe) -> bool:
    """Whether a file may be written: it is not there, is this very picture, or is the broken half of one of ours."""
    return not path.exists() or _is_made(path, recipe) or _is_broken(path)


def _is_broken(path: Path) -> bool:
    try:
        read_image(path)
    except BrokenImageError:
        return True
    return False


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file and rename it, so that no reader ever sees half of one."""
    partial = path.with_name(f".{path.name[:200]}.partial")
    write(partial)
    partial.replace(path)
