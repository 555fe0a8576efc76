"""SampleFolder: where the images of a run lie, which of them are there, and their index metadata.jsonl."""

import functools
import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_lightning.atomic import check_writable, remove_partials, write_atomically
from ilvr_lightning.data.images import BrokenImageError, Pixels, read_image, to_image
from ilvr_lightning.data.references import Reference
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.gallery import save_low_pass, write_gallery
from ilvr_lightning.sampling.index import INDEX, listed_images
from ilvr_lightning.sampling.recipe import digest, identity, read_values
from ilvr_lightning.sampling.requests import SampleRequest, SampleRequests
from ilvr_lightning.visual.pages import PAGE

Indices = NDArray[np.int64]
"""Positions in a run, ascending."""
PER_SUBFOLDER = 1000
"""The number of samples of one name in a folder."""


class SampleFolder:
    """The images of a run as PNGs that hold their recipes, so that a second start finds what is there.

    Samples 0 to 999 of each reference and plan lie in the folder itself, later ones in a subfolder per thousand:
    00001/, 00002/ and so on. A file is named after its reference, factor, range (where there are several) and sample.
    A reference whose name is another's too adds six digits of its hash; where an image of another recipe has the name,
    eight digits of the recipe's hash follow.

    Args:
        path: the folder.
        requests: the images of the run.
        overwrite: make again what is there.
        trajectory: an image counts as there only with its drawn steps.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self, path: str | Path, requests: SampleRequests, *, overwrite: bool = False, trajectory: bool = False
    ) -> None:
        self.path, self.requests, self.overwrite, self.trajectory = Path(path), requests, overwrite, trajectory
        check_writable(self.path, "--out")
        self.written: Indices = np.arange(0)
        """The images of the run that the index lists."""
        self.gallery = self.path / PAGE
        """The page that shows them."""
        self._hashed = bytearray(len(requests))  # whether the plain name of each image is taken
        ranges = {(plan.condition_from, plan.condition_to) for plan in requests.plans}
        self._settings = [
            f"_N{plan.factor}" + (f"_t{plan.condition_from}-{plan.condition_to}" if len(ranges) > 1 else "")
            if len(requests.references)
            else ""
            for plan in requests.plans
        ]

    def missing(self) -> Indices:
        """The images that are not there yet. All ranks must have asked before one of them writes."""
        everything = np.arange(len(self.requests))
        if self.overwrite or not any(next(self.path.glob(pngs), None) for pngs in ("*.png", "[0-9]*/*.png")):
            return everything
        return np.fromiter((i for i in everything.tolist() if not self._find(i)), np.int64)

    def file(self, index: int) -> Path:
        """The file of an image. Its reference is read where the name holds a hash.

        Raises:
            UserError: the reference cannot be used.
        """
        return self._file(index, None)

    def reference_name(self, number: int) -> str:
        """What the files of a reference begin with; it is read where another reference has its name.

        Raises:
            UserError: it has to be read and cannot be.
        """
        references = self.requests.references
        if not len(references):
            return "unconditional"
        if not self._is_ambiguous(number):
            return references.name(number)
        reference = references[number]
        both = f"{reference.sha256} {reference.mask_sha256}"
        return f"{reference.name}_{hashlib.sha256(both.encode()).hexdigest()[:6]}"

    def write(self, request: SampleRequest, pixels: Pixels, environment: Mapping[str, Any]) -> Path:
        """Write an image and its recipe.

        Args:
            request: the image.
            pixels: (H, W, C).
            environment: fields of the recipe that say where and how it was computed, and its evidence.

        Returns:
            The file.
        """
        path = self._file(request.index, request)
        path.parent.mkdir(parents=True, exist_ok=True)
        info = replace(request.recipe, **environment).png_info()
        write_atomically(path, functools.partial(to_image(pixels).save, format="PNG", pnginfo=info))
        for old in trajectory_files(path):
            old.unlink(missing_ok=True)
        if request.reference is not None and self.requests.references_are_few:
            save_reference(request.reference, self.path / "references")
        return path

    def images(self) -> Iterator[Path]:
        """The files that the index lists of this run, in order."""
        return (self.file(index) for index in self.written.tolist())

    def remove_partials(self) -> None:
        """Remove what killed writers left. No other process may write into the folder meanwhile."""
        for folder in (self.path, self.path / "references", self.path / "low_pass", *self.path.glob("[0-9]" * 5)):
            remove_partials(folder, recursive=False)

    def write_index(self) -> int:
        """Write metadata.jsonl: the images of this run in order, then those of other runs that are still there.

        Then write index.html, which shows them, and the low-pass images for it where the references are few.

        Returns:
            How many images of this run are missing, without those whose reference cannot be used.
        """
        written, missing = array("q"), array("q")

        def write(partial: Path) -> None:
            names = array("q")  # their hashes: a run may have millions
            with open(partial, "w") as lines:
                for index, path, values in self._looked_up():
                    if values is None:
                        missing.append(index)
                        continue
                    name = path.relative_to(self.path).as_posix()
                    lines.write(self._line(index, name, values))
                    written.append(index)
                    names.append(hash(name))
                known = np.sort(np.array(names, np.int64))
                for entry in listed_images(self.path):
                    name = entry["file_name"]
                    i = int(np.searchsorted(known, hash(name)))
                    is_own = i < len(known) and known[i] == hash(name)
                    if not is_own and read_values(self.path / name) is not None:
                        lines.write(json.dumps(entry) + "\n")

        write_atomically(self.path / INDEX, write, durable=True)
        self.written = np.array(written, np.int64)
        if self.requests.references_are_few:
            for number, reference in enumerate(self.requests.references):
                for plan in self.requests.plans_of(number):
                    save_low_pass(reference, plan, self.path)
        self.gallery = write_gallery(self.path)
        return len(missing)

    def _looked_up(self) -> Iterator[tuple[int, Path, dict[str, Any] | None]]:
        """(position, file, recipe) of every image once, without those whose reference cannot be used."""
        shared: set[Path] = set()  # equal references of one name share their images
        for index in range(len(self.requests)):
            try:
                path = self.file(index)
            except UserError:
                continue
            values = read_values(path)
            if path in shared or (values is None and not self.requests.is_usable(index)):
                continue
            if self._is_ambiguous(self.requests.locate(index)[0]):
                shared.add(path)
            yield index, path, values

    def _line(self, index: int, name: str, values: Mapping[str, Any]) -> str:
        number, plan_number, sample = self.requests.locate(index)
        references, plan = self.requests.references, self.requests.plans[plan_number]
        follows = len(references) > 0
        entry = {
            "file_name": name,
            "reference": references.name(number) if follows else "",
            "seed": self.requests.seed,
            "sample": sample,
            "factor": plan.factor if follows else 0,
            "condition_from": plan.condition_from if follows else 0,
            "condition_to": plan.condition_to if follows else 0,
            "recipe": json.dumps(values),
        }
        return json.dumps(entry) + "\n"

    def _find(self, index: int) -> bool:
        """Settle an image's name; whether the image is there."""
        for hashed in (False, True):
            self._hashed[index] = hashed
            try:
                path = self.file(index)
            except UserError:
                return False
            if not path.exists():
                return False
            values = read_values(path)
            if values is not None and self.requests.matches(index, values):
                return not self.trajectory or all(p.is_file() and p.stat().st_size for p in trajectory_files(path))
            if values is None and _is_broken(path):
                return False
        return False

    def _file(self, index: int, request: SampleRequest | None) -> Path:
        number, plan, sample = self.requests.locate(index)
        name = f"{self.reference_name(number)}{self._settings[plan]}_{sample}"
        if self._hashed[index]:
            recipe = (request or self.requests[index]).recipe
            name += f"_{digest(identity(recipe.plain()))[:8]}"
        folder = self.path / f"{sample // PER_SUBFOLDER:05d}" if sample >= PER_SUBFOLDER else self.path
        return folder / f"{name}.png"

    def _is_ambiguous(self, number: int) -> bool:
        references = self.requests.references
        return len(references) > 0 and references.name_is_ambiguous(number)


def trajectory_files(image: Path) -> tuple[Path, Path]:
    """The strip and the animation of an image's steps."""
    return image.with_name(f"{image.stem}_steps.png"), image.with_name(f"{image.stem}_steps.webp")


def save_reference(reference: Reference, folder: Path) -> None:
    """Keep a fitted reference and its mask, named by their hashes, so that --reproduce finds them."""
    for pixels, sha256 in ((reference.pixels, reference.sha256), (reference.mask, reference.mask_sha256)):
        path = folder / f"{sha256}.png"
        if pixels is not None and not path.exists():
            folder.mkdir(exist_ok=True)
            write_atomically(path, functools.partial(to_image(pixels).save, format="PNG"))


def _is_broken(path: Path) -> bool:
    try:
        read_image(path)
    except BrokenImageError:
        return True
    return False
