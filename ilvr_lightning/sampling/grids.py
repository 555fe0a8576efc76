"""The grids that a run of sample.py ends with."""

import functools
import hashlib
from collections.abc import Iterator, Sequence

from ilvr_lightning.data.images import Pixels, read_image, to_pixels
from ilvr_lightning.sampling.pictures import Pictures
from ilvr_lightning.sampling.recipe import plan_of, read_text
from ilvr_lightning.sampling.requests import Job, Setting
from ilvr_lightning.visual.grids import GRID_KEY, Column, Grid, low_pass_pixels, reference_columns

MAX_ROWS = 24
"""More references than these are not drawn in one grid."""


MAX_PICTURES = 256
"""More pictures of a reference, or unconditional ones, are not drawn in a grid."""


def grids_of(pictures: Pictures) -> Iterator[Grid]:
    """One grid a reference, or one of all unconditional samples; then all references in one, if they are few.

    None of a run whose references are too many to be read at the start, or have too many samples.
    """
    jobs = pictures.jobs
    if not jobs.references.all_validated or jobs.each > MAX_PICTURES:
        return
    groups = [g for g in range(max(1, len(jobs.references))) if all(map(pictures.read, _indices(pictures, g)))]
    names: set[str] = set()
    for group in groups:
        key = jobs.references[group].key if len(jobs.references) else None
        name = key[0] if key else "unconditional"
        name = f"{name}_{hashlib.sha256(repr(key).encode()).hexdigest()[:6]}" if key and name in names else name
        names.add(name)
        yield _grid(pictures, f"{name}_grid", [group], name)
    if 1 < len(groups) <= MAX_ROWS:
        yield _grid(pictures, "grid", groups, f"{len(groups)} references")


def _jobs(pictures: Pictures, group: int) -> list[Job]:
    return [pictures.job(index) for index in _indices(pictures, group)]


def _indices(pictures: Pictures, group: int) -> range:
    each = pictures.jobs.each
    return range(group * each, (group + 1) * each)


def _grid(pictures: Pictures, stem: str, groups: Sequence[int], what: str) -> Grid:
    recipe = pictures.jobs[groups[0] * pictures.jobs.each].recipe
    title = f"{what}: {recipe.plan['sampler']}, {recipe.plan['num_steps']} steps, {recipe.weights} weights"
    digests = (job.recipe.digest for group in groups for job in _jobs(pictures, group))
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    path = pictures.folder / f"{stem}.png"
    if path.exists() and not pictures.overwrite and read_text(path, GRID_KEY) != digest:
        path = pictures.folder / f"{stem}_{digest[:8]}.png"
    return Grid(path=path, columns=functools.partial(_columns, pictures, groups), title=title, digest=digest)


def _columns(pictures: Pictures, numbers: Sequence[int]) -> list[Column]:
    def tiles(jobs: list[Job], setting: Setting | None) -> list[Pixels]:
        return [to_pixels(read_image(pictures.folder / job.file)) for job in jobs if job.setting == setting]

    groups = [_jobs(pictures, number) for number in numbers]
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
    columns = [Column(label="reference", rows=[[r.preview()] for r in references])]
    for factor in dict.fromkeys(setting.factor for setting in settings):
        low = low_pass_pixels(references, factor, plan)
        columns.append(Column(label=f"N={factor}: low-pass", rows=[[low[row]] for row in range(len(references))]))
        for setting in (s for s in settings if s.factor == factor):
            rows = [tiles(jobs, setting) for jobs in groups]
            a, b = setting.range
            columns.append(Column(label=f"N={factor}, t {a} to {b}", rows=rows))
    return columns
