"""The grids that a run of sample.py ends with, drawn of its PNGs."""

import functools
import hashlib
from collections.abc import Iterator, Sequence

from ilvr_lightning.data.images import Pixels, read_image, to_pixels
from ilvr_lightning.data.references import Reference
from ilvr_lightning.sampling.folder import SampleFolder
from ilvr_lightning.sampling.recipe import digest, identity, png_text, read_values
from ilvr_lightning.visual.grids import GRID_KEY, Column, Grid, low_pass_pixels, reference_columns

MAX_ROWS = 24
"""A grid of all references is drawn for at most this many."""
MAX_IMAGES = 256
"""A grid is drawn for at most this many images per reference, or unconditional images."""
UNCONDITIONAL_ACROSS = 8
"""The number of unconditional images in a row."""


class SampleGrids:
    """The source of the grids for ILVRGrid.of_samples: one per reference, and one of all references if they are few.

    Args:
        folder: where the images are, and where the grids go.
    """

    def __init__(self, folder: SampleFolder) -> None:
        self.folder, self.requests = folder, folder.requests
        self.drawn: list[Grid] = []
        """The grids, once the run has ended; the last one shows the most."""

    def grids(self) -> list[Grid]:
        """The grids of the references all of whose images are there.

        There are none for a run of so many references that they are read lazily, or of too many images per reference.
        """
        self.drawn = list(self._grids())
        return self.drawn

    def _grids(self) -> Iterator[Grid]:
        requests, per_reference = self.requests, self.requests.per_reference
        if not requests.references_are_few or per_reference > MAX_IMAGES:
            return
        complete: list[int] = []
        for group in range(max(1, len(requests.references))):
            indices = range(group * per_reference, (group + 1) * per_reference)
            if any(read_values(self.folder.file(index)) is None for index in indices):
                continue
            complete.append(group)
            name = self.folder.reference_name(group)
            yield self._grid(f"{name}_grid", [group], name)
        if 1 < len(complete) <= MAX_ROWS:
            yield self._grid("grid", complete, f"{len(complete)} references")

    def _grid(self, stem: str, groups: Sequence[int], what: str) -> Grid:
        """The grid of some references; one of other images that has the name is not overwritten."""
        requests, per_reference = self.requests, self.requests.per_reference
        recipe = requests[groups[0] * per_reference].recipe
        raw = ", raw weights" if recipe.weights == "raw" else ""
        title = f"{what}: {recipe.plan.num_steps} steps of {recipe.plan.sampler}{raw}"
        shown = (requests[g * per_reference + i].recipe for g in groups for i in range(per_reference))
        images = hashlib.sha256("".join(digest(identity(each.plain())) for each in shown).encode()).hexdigest()
        path = self.folder.path / f"{stem}.png"
        if path.exists() and not self.folder.overwrite and png_text(path, GRID_KEY) != images:
            path = path.with_stem(f"{stem}_{images[:8]}")
        return Grid(path=path, title=title, digest=images, columns=functools.partial(self._columns, groups))

    def _columns(self, groups: Sequence[int]) -> list[Column]:
        if not len(self.requests.references):
            tiles, across = self._tiles(0, 0), UNCONDITIONAL_ACROSS
            return [Column(label="unconditional", rows=[tiles[i : i + across] for i in range(0, len(tiles), across)])]
        references = [self.requests.references[group] for group in groups]
        plans = self.requests.plans_of(groups[0])
        if any(self.requests.plans_of(group) != plans for group in groups):
            return [Column(label="reference", rows=[[r.preview()] for r in references]), self._own_factors(groups)]
        factors = list(dict.fromkeys(plan.factor for plan in plans if isinstance(plan.factor, int)))
        if len(plans) == len(factors):  # one range
            return reference_columns(
                references, factors, plans[0], lambda row, factor: self._tiles(groups[row], factors.index(factor))
            )
        if len(groups) == 1:
            return list(self._table(references[0], groups[0], factors))
        return [
            Column(label="reference", rows=[[r.preview()] for r in references]),
            *(column for factor in factors for column in self._columns_of_ranges(references, groups, factor)),
        ]

    def _table(self, reference: Reference, group: int, factors: Sequence[int]) -> Iterator[Column]:
        """The samples of one reference: a row per factor, with its low-pass image, and a column per range."""
        yield Column(label="reference", rows=[[reference.preview()]])
        plans = self.requests.plans_of(group)
        low = [low_pass_pixels([reference], factor, plans[0]) for factor in factors]
        yield Column(label=f"low-pass, N={', '.join(map(str, factors))}", rows=low)
        for first, last in dict.fromkeys((plan.condition_from, plan.condition_to) for plan in plans):
            numbers = [i for i, plan in enumerate(plans) if (plan.condition_from, plan.condition_to) == (first, last)]
            yield Column(label=f"t {first} to {last}", rows=[self._tiles(group, number) for number in numbers])

    def _own_factors(self, groups: Sequence[int]) -> Column:
        """One column for references that each have an N of their own."""
        requests, rows = self.requests, []
        for group in groups:
            plans, reference = requests.plans_of(group), requests.references[group]
            assert isinstance(plans[0].factor, int)
            low = low_pass_pixels([reference], plans[0].factor, plans[0])
            rows.append([*low, *(tile for i in range(len(plans)) for tile in self._tiles(group, i))])
        factors = sorted({plan.factor for group in groups for plan in requests.plans_of(group)})
        return Column(label=f"N={', '.join(map(str, factors))}: low-pass, samples", rows=rows)

    def _columns_of_ranges(
        self, references: Sequence[Reference], groups: Sequence[int], factor: int
    ) -> Iterator[Column]:
        """The low-pass images of a factor, then its samples, a column per range."""
        plans = self.requests.plans_of(groups[0])
        low = low_pass_pixels(references, factor, plans[0])
        yield Column(label=f"N={factor}: low-pass", rows=[[pixels] for pixels in low])
        for number, plan in enumerate(plans):
            if plan.factor == factor:
                label = f"N={factor}, t {plan.condition_from} to {plan.condition_to}"
                yield Column(label=label, rows=[self._tiles(group, number) for group in groups])

    def _tiles(self, group: int, plan: int) -> list[Pixels]:
        """The samples of a reference and a plan."""
        start = group * self.requests.per_reference + plan * self.requests.num_samples
        files = map(self.folder.file, range(start, start + self.requests.num_samples))
        return [to_pixels(read_image(file)) for file in files]
