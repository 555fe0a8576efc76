"""Sets of images that are compared: folders, data sets, npz files, and the folders of sample.py with their sources."""

import functools
import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ilvr_lightning.data.images import BrokenImageError, Pixels, fit_image, read_image, to_pixels
from ilvr_lightning.data.references import Place, find_places
from ilvr_lightning.data.values import Range
from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.sampling.index import listed_images

MIN_SIDE = 8
"""Images of a smaller side are refused: they have too few octaves."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size that are read when they are needed."""

    name: str
    """What messages and tables call it."""
    names: Sequence[str]
    """The name of each image; samples are paired with their sources by it."""
    load: Callable[[int], Pixels]
    """Gives an image (H, W, 3) of 8 bits."""
    size: tuple[int, int]
    """The height and width that every image has."""

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, rows: Sequence[int]) -> Pixels:
        """(B, H, W, 3) images of some rows.

        Raises:
            UserError: one cannot be read, or has another size than the first.
        """
        images = [self.load(row) for row in rows]
        for row, image in zip(rows, images, strict=True):
            if image.shape[:2] != self.size:
                raise UserError(
                    f"{self.name}: {self.names[row]} has {_size(image.shape[:2])} pixels and the first image "
                    f"{_size(self.size)}; give images of one size, or --image-size, to which they are fitted"
                )
        return np.stack(images)

    def select(self, rows: Sequence[int], name: str) -> "ImageSet":
        """Some of the images, in the order given, under another name."""
        return ImageSet(name, [self.names[row] for row in rows], lambda i: self.load(rows[i]), self.size)


class Entry(NamedTuple):
    """What the index of sample.py's folder says of a sample."""

    file: Path
    reference: str
    """The name of what it followed; empty where it followed nothing."""
    sha256: str
    """The hash of that."""
    sample: int
    """Its number among the samples of the reference."""
    setting: tuple[int, int, int]
    """N and the range, or zeros."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of one setting."""

    images: ImageSet
    entries: Sequence[Entry] = ()
    """One per image, or none at all."""

    @property
    def factor(self) -> int | None:
        """N, where the index tells it."""
        return (self.entries[0].setting[0] if self.entries else 0) or None

    def select(self, rows: Sequence[int], name: str) -> "Samples":
        """Some of the samples, under another name."""
        entries = [self.entries[row] for row in rows] if self.entries else ()
        return Samples(images=self.images.select(rows, name), entries=entries)


def open_images(
    given: str, size: tuple[int, int] | None = None, what: str = "", value_range: Range | None = None
) -> ImageSet:
    """A set of images: a folder, files, DATASET:SPLIT[A:B], or an npz file whose arr_0 is (N, H, W, 3) of 8 bits.

    A folder of sample.py holds what its index lists, without the references and grids in it.

    Args:
        given: where they are.
        size: height and width that each is fitted to as training images are; None takes them as they are.
        what: the argument that named them, for messages.
        value_range: what is black and white in files of more than 8 bits; None decides it by each file alone.

    Raises:
        UserError: there is nothing of the kind, or it holds no images of 8 bits.
    """
    name = Path(given).name or given
    if Path(given).suffix == ".npz":
        array = _read_npz(given)
        names, load = [str(i) for i in range(len(array))], array.__getitem__
    else:
        places = find_places([str(entry.file) for entry in _index(Path(given))] or [given], what or "images")
        names, load = [place.name for place in places], lambda row: _read_place(places[row], value_range)
    if size is not None:
        load = functools.partial(_fitted, load, size)
    height, width = size or load(0).shape[:2]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{given}: images have {_size((height, width))} pixels; a side has at least {MIN_SIDE}")
    return ImageSet(name, names, load, (height, width))


def _fitted(load: Callable[[int], Pixels], size: tuple[int, int], row: int) -> Pixels:
    return to_pixels(fit_image(Image.fromarray(load(row)), size))


def _read_place(place: Place, value_range: Range | None) -> Pixels:
    try:
        return to_pixels(read_image(place.source.image_bytes(place.row), value_range=value_range))
    except BrokenImageError as error:
        raise BrokenImageError(f"{place.name}: {error}") from None


def _read_npz(path: str) -> Pixels:
    """(N, H, W, 3) the images of ADM's format."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive["arr_0"]
    except KeyError:
        raise UserError(
            f"{path} holds no arr_0; give an npz file of images, as sample.py --format npz writes"
        ) from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz file: {first_line(error)}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not len(array):
        raise UserError(
            f"{path}: arr_0 is {array.dtype} of the shape {array.shape}; images are uint8 (0 to 255) of (N, H, W, 3)"
        )
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))


def _index(folder: Path) -> list[Entry]:
    """The entries of the index of a folder that sample.py wrote; none for other folders."""
    found, runs = [], set()
    for values in listed_images(folder):
        recipe = json.loads(values["recipe"]) or {}
        sha256, plan = recipe.get("reference_sha256"), recipe.get("plan") or {}
        runs.add((recipe.get("checkpoint_sha256"), plan.get("sampler"), plan.get("num_steps")))
        setting = (values["factor"], values["condition_from"], values["condition_to"])
        found.append(Entry(folder / values["file_name"], values["reference"], str(sha256), values["sample"], setting))
    if len(runs) > 1:
        warnings.warn(
            f"{folder} holds samples of several checkpoints, samplers or numbers of steps, which are measured "
            "together; sample each into a folder of its own",
            stacklevel=2,
        )
    return [entry for entry in found if entry.file.is_file()]


def open_samples(given: str, size: tuple[int, int] | None = None) -> list[Samples]:
    """Samples by their settings: one set per factor and range of a folder of sample.py, or one of all images.

    Raises:
        UserError: as `open_images`.
    """
    entries = _index(Path(given))
    everything = Samples(images=open_images(given, size, "SAMPLES"), entries=entries)
    ranges = {entry.setting[1:] for entry in entries if entry.setting[0]}
    found = []
    for factor, first, last in dict.fromkeys(entry.setting for entry in entries):
        label = f"N={factor}" + (f", {first}:{last}" if len(ranges) > 1 else "") if factor else "unconditional"
        rows = [i for i, entry in enumerate(entries) if entry.setting == (factor, first, last)]
        found.append(everything.select(rows, label))
    return found or [everything]


def pair(samples: Samples, sources: ImageSet, by_hash: bool) -> list[int]:
    """The row of the source that each sample was made from: by the index, or by order where there is none.

    Args:
        samples: the samples.
        sources: what they were made from.
        by_hash: whether the sources are called by their hashes.

    Raises:
        UserError: a source is missing, two have one name, or they are not as many as the samples.
    """
    if not samples.entries:
        if len(sources) != len(samples.images):
            raise UserError(
                f"--sources: {sources.name} has {len(sources)} images and {samples.images.name} {len(samples.images)}; "
                "without the index of a folder of sample.py they are paired by order, so give as many"
            )
        return list(range(len(sources)))
    wanted = [entry.sha256 if by_hash else entry.reference for entry in samples.entries]
    rows = {name: row for row, name in enumerate(sources.names)}
    for name in dict.fromkeys(wanted):
        if name not in rows:
            raise UserError(f"--sources: there is no {name!r} in {sources.name}, which a sample followed")
        if list(sources.names).count(name) > 1:
            raise UserError(f"--sources: {sources.name} has two images called {name!r}; give each its own name")
    return [rows[name] for name in wanted]


def kept_sources(folder: str, size: tuple[int, int]) -> ImageSet | None:
    """The references that a folder of sample.py keeps, called by their hashes; None if it keeps none."""
    path = Path(folder) / "references"
    return open_images(str(path), size) if path.is_dir() and next(path.glob("*.png"), None) else None


def _size(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"
