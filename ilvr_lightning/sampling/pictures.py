"""The pictures of a run: each a PNG with its recipe, written whole, found again by a run that goes on."""

import functools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import BrokenImageError, Pixels, read_image, to_image
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.manifest import Entry
from ilvr_lightning.sampling.recipe import Recipe, read_recipe, recipe_info
from ilvr_lightning.sampling.requests import Job, Jobs, trajectory_files

Indices = NDArray[np.int64]


FLAT = 5000
"""A run of more pictures than these puts them into subfolders."""


STAGED = ".pictures"
"""Where pictures wait to be packed."""


HASHED, ELSEWHERE = 1, 2
"""A picture's name, with a hash of its recipe; where a run of another size would have put it."""


PARTIAL = re.compile(r"\.(.+\.(png|webp)\.(?P<writer>\d+)|manifest\.jsonl|samples_.+\.npz|train-.+\.parquet)\.partial")


SUBFOLDER = re.compile(r"\d{5}|[0-9a-f]{2}")


class Made(NamedTuple):
    """A picture that is there."""

    number: int
    path: Path
    recipe: Recipe


class Pictures:
    """A PNG a picture, with its recipe.

    A name that a picture of another recipe has taken gets a short hash of the new recipe. Large runs put the
    unconditional pictures into folders of a thousand, others into 256 folders by a hash of their name: what a picture
    is called does not depend on the order of the references.
    """

    def __init__(self, jobs: Jobs, folder: Path, overwrite: bool = False, trajectory: bool = False) -> None:
        self.pictures = self
        self.jobs, self.folder, self.overwrite, self.trajectory = jobs, folder, overwrite, trajectory
        self.where = str(folder)
        self._large = len(jobs) > FLAT
        self._chosen = bytearray(len(jobs))  # which of its possible names each picture has
        self._folders: set[str] = set()

    def todo(self) -> Indices:
        return self.todo_of(np.arange(len(self.jobs)))

    def todo_of(self, indices: Indices) -> Indices:
        """Those of some pictures that are not there yet."""
        self._folders = _subfolders(self.folder)
        if self.overwrite or not self._folders:
            return indices
        return np.fromiter((i for i in indices.tolist() if not self._find(i)), np.int64)

    def meets_others(self) -> bool:
        """Whether pictures of other recipes have names that these would have."""
        return any(choice & HASHED for choice in set(self._chosen))

    def job(self, index: int) -> Job:
        """A picture to make, with the file that it goes to.

        Raises:
            UserError: its reference cannot be used.
        """
        job = self.jobs[index]
        return replace(job, file=self._file(index, self._chosen[index], job))

    def write(self, job: Job, pixels: Pixels, recipe: Recipe) -> Path:
        """Write a picture (H, W, C); returns its file."""
        path = self.folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, functools.partial(to_image(pixels).save, format="PNG", pnginfo=recipe_info(recipe)))
        return path

    def read(self, index: int) -> Made | None:
        """A picture, or None where it is missing."""
        try:
            path = self.folder / self._file(index, self._chosen[index])
        except UserError:
            return None
        recipe = read_recipe(path)
        return None if recipe is None or not self.jobs.fits(index, recipe) else Made(index, path, recipe)

    def made(self, indices: Iterable[int]) -> Iterator[Made | None]:
        """Every picture of some, once; None for one that is missing, nothing for one that cannot be made."""
        told: set[Path] = set()
        for index in indices:
            made = self.read(index)
            if made is None:
                if self.jobs.is_usable(index):
                    yield None
            elif not self.jobs.shares_stem(index):
                yield made
            elif made.path not in told:  # equal pictures of one name share their file
                told.add(made.path)
                yield made

    def entry(self, made: Made) -> Entry:
        """Its line in the manifest."""
        return {"file": made.path.relative_to(self.folder).as_posix(), **vars(made.recipe)}

    def pack(self, rank: int, world: int) -> None:
        """Nothing: they are where they belong."""

    def entries(self) -> Iterator[Entry | None]:
        return (made and self.entry(made) for made in self.made(range(len(self.jobs))))

    def finish(self, whole: bool) -> None:
        """Nothing."""

    def _find(self, index: int) -> bool:
        """Choose a picture's name; whether it is there."""
        taken = False
        for elsewhere in (0, ELSEWHERE):
            if self._subfolder(index, elsewhere) not in self._folders:
                continue
            for hashed in (0, HASHED):
                try:
                    path = self.folder / self._file(index, elsewhere | hashed)
                except UserError:
                    break
                if not path.exists():
                    break
                recipe = read_recipe(path)
                if recipe is not None and self.jobs.is_of(index, recipe):
                    self._chosen[index] = elsewhere | hashed
                    drawn = all(p.is_file() and p.stat().st_size for p in trajectory_files(path))
                    return drawn or not self.trajectory
                if hashed or (recipe is None and _is_broken(path)):
                    break
                taken = taken or not elsewhere
        self._chosen[index] = HASHED if taken else 0
        return False

    def _file(self, index: int, choice: int, job: Job | None = None) -> str:
        stem, folder = self.jobs.stem(index), self._subfolder(index, choice)
        if choice & HASHED or self.jobs.shares_stem(index):
            stem += f"_{(job or self.jobs[index]).recipe.digest[:8]}"
        return f"{folder}/{stem}.png" if folder else f"{stem}.png"

    def _subfolder(self, index: int, choice: int) -> str:
        if self._large == bool(choice & ELSEWHERE):
            return ""
        if len(self.jobs.references):
            return f"{zlib.crc32(self.jobs.stem(index).encode()) % 256:02x}"
        return f"{index // 1000:05d}"


def _subfolders(folder: Path) -> set[str]:
    """Those that may hold pictures, "" for the folder itself."""
    found: set[str] = set()
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if SUBFOLDER.fullmatch(entry.name):
            found.add(entry.name)
        elif entry.name.endswith(".png"):
            found.add("")
    return found


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed have left half-written."""
    places = [folder, folder / "references", folder / "data", folder / STAGED]
    places += [top / name for top in (folder, folder / STAGED) for name in _subfolders(top)]
    for path in {p for place in places for p in place.glob(".*.partial")}:
        name = PARTIAL.fullmatch(path.name)
        if name and not _is_running(int(name["writer"] or 0)):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether another process has this number."""
    if process in (0, os.getpid()):
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _is_broken(path: Path) -> bool:
    try:
        read_image(path)
    except BrokenImageError:
        return True
    return False
