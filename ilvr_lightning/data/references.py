"""Reference images: found in files, folders and data sets, and read when they are needed."""

import functools
import glob
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import overload

from PIL import Image

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.fitting import Reference, fit_reference, masks_of, to_mask, with_mask
from ilvr_lightning.data.image_source import Encoded
from ilvr_lightning.data.images import SUFFIXES, BrokenImageError, Fit, open_image
from ilvr_lightning.data.sources import open_split
from ilvr_lightning.errors import UserError

__all__ = ["Reference", "References", "find_images", "find_references", "masks_of"]

EAGER_LIMIT = 1000
"""Up to so many references are read and checked at the start of a run; more of them are read when they are needed."""

CACHE_SIZE = 32
"""So many fitted references are kept in memory."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSource:
    """Images that references can be read from, such as a folder or a split of a data set."""

    count: int
    """Number of images; the functions take numbers from 0 to count - 1."""
    name: Callable[[int], str]
    """Gives the name of a reference, which begins the names of its samples' files."""
    label: Callable[[int], str]
    """Gives what a message calls the reference."""
    content: Callable[[int], Encoded]
    """Gives the encoded image, or the file that holds it."""


def files_source(paths: Sequence[Path]) -> ReferenceSource:
    """References in files, named by them without their endings."""
    return ReferenceSource(
        count=len(paths),
        name=lambda index: paths[index].stem,
        label=lambda index: str(paths[index]),
        content=lambda index: paths[index],
    )


class References(Sequence[Reference]):
    """Fitted references, read when they are asked for.

    Up to EAGER_LIMIT of them are read once at the start, so that every fault is known there, and equal ones (same name,
    same pixels, same mask) are kept once. Equal ones among more have equal noise and so equal samples: a sample is then
    written twice to the same file, which is harmless.

    Args:
        sources: the images.
        size: height and width that they are fitted to.
        channels: 3 or 1.
        fit: crop to the centre, or pad with white margins.
        masks: none, one for all references, or one for each.

    Raises:
        UserError: the number of masks is another one, a name cannot be a file name, or a reference that is read at the
            start cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[ReferenceSource] = (),
        size: tuple[int, int] = (1, 1),
        channels: int = 3,
        fit: Fit = "crop",
        masks: Sequence[Path] = (),
    ) -> None:
        self._sources = list(sources)
        self._ends = [0, *accumulate(source.count for source in sources)]
        self._size, self._channels, self._fit, self._masks = size, channels, fit, list(masks)
        self._cached = functools.lru_cache(CACHE_SIZE)(self._read)
        self._cached_mask = functools.lru_cache(1)(_read_mask)
        total = self._ends[-1]
        for source in sources:
            for index in range(source.count):
                _check_name(source.name(index))
        if len(masks) not in (0, 1, total):
            raise UserError(f"--mask: got {len(masks)} masks for {total} references; give one for all, or one for each")
        self.all_validated = total <= EAGER_LIMIT
        """Whether all references were read at the start."""
        self._indices: Sequence[int] = range(total)
        if self.all_validated:
            first: dict[object, int] = {}
            for index in range(total):
                first.setdefault(self._cached(index).key, index)
            self._indices = list(first.values())
        uses = Counter(map(self.name, range(len(self))))
        self._ambiguous = {name for name, count in uses.items() if count > 1}

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Reference: ...

    @overload
    def __getitem__(self, index: slice) -> list[Reference]: ...

    def __getitem__(self, index: int | slice) -> Reference | list[Reference]:
        """One of the references, or several.

        Raises:
            UserError: a reference cannot be read, or its mask follows it nowhere.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._cached(self._indices[index])

    def name(self, index: int) -> str:
        """The name of a reference, which is not read for it."""
        source, row = self._place(self._indices[index])
        return source.name(row)

    def name_is_ambiguous(self, index: int) -> bool:
        """Whether another reference has the same name; none is read for it."""
        return self.name(index) in self._ambiguous

    def _place(self, index: int) -> tuple[ReferenceSource, int]:
        number = bisect_right(self._ends, index) - 1
        return self._sources[number], index - self._ends[number]

    def _read(self, index: int) -> Reference:
        source, row = self._place(index)
        content = source.content(row)
        try:
            with open_image(content) as image:
                reference = fit_reference(source.name(row), image, self._size, self._channels, self._fit)
        except FileNotFoundError:
            raise BrokenImageError(f"{source.label(row)} no longer exists") from None
        except BrokenImageError as error:
            where = f"{source.label(row)}: " if isinstance(content, bytes) else ""
            raise BrokenImageError(f"{where}{error}") from None
        if not self._masks:
            return reference
        mask = self._masks[index if len(self._masks) > 1 else 0]
        return with_mask(reference, mask.name, self._cached_mask(mask), self._fit)


def _read_mask(path: Path) -> Image.Image:
    with open_image(path) as image:
        return to_mask(image)


def _check_name(name: str) -> None:
    """Raise a UserError for a reference whose name cannot begin the name of a file."""
    if len(name.encode(errors="replace")) > 200 or not name.isprintable():
        raise UserError(
            f"--ref: the file name {name[:40]!r} is too long, or has characters that cannot be printed; rename it"
        )


def find_images(patterns: Sequence[str], flag: str = "--ref") -> list[Path]:
    """The files that paths, folders and globs name, in order, each once.

    Args:
        patterns: paths, folders or globs.
        flag: the flag or key that they were given by, for messages.

    Raises:
        UserError: a path does not exist, or a folder or glob holds no images.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if not pattern.strip():
            raise UserError(f"{flag}: a name is empty; give images, folders or globs")
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            matches = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.suffix.lower() in SUFFIXES)
            if not glob.has_magic(pattern):
                raise UserError(f"{flag}: there is no file or folder {pattern}")
        if not matches:
            raise UserError(f"{flag}: no images in {pattern}; known endings are {' '.join(SUFFIXES)}")
        found.update(dict.fromkeys(matches))
    return list(found)


DATASET_REFERENCE = re.compile(r"(?P<path>.+):(?P<split>\w+)(\[(?P<first>\d*):(?P<last>\d*)\])?")
"""References in a data set are written DATASET:SPLIT, or DATASET:SPLIT[A:B] for its rows from A to B - 1."""


def find_references(
    given: Sequence[str], shape: tuple[int, int, int], fit: Fit = "crop", masks: Sequence[str] = (), flag: str = "--ref"
) -> References:
    """References from files, folders and globs, or from a data set's split written DATASET:SPLIT[A:B].

    Args:
        given: their names.
        shape: (C, H, W) that they are fitted to.
        fit: crop to the centre, or pad with white margins.
        masks: one image for all references, or one for each in order.
        flag: the flag or key that they were given by, for messages.

    Raises:
        UserError: a path does not exist, a file is not an image, or the number of masks is another one.
    """
    channels, height, width = shape
    sources: list[ReferenceSource] = []
    for pattern in given:
        match = DATASET_REFERENCE.fullmatch(pattern)
        if match and not Path(pattern).exists():
            sources.append(_dataset_source(match, flag))
        else:
            sources.append(files_source(find_images([pattern], flag)))
    paths = [path for pattern in masks for path in find_images([pattern], "--mask")]
    return References(sources, (height, width), channels, fit, paths)


def _dataset_source(match: re.Match[str], flag: str) -> ReferenceSource:
    path, split = match["path"], match["split"]
    try:
        images = open_split(DataConfig(path=path, split=split))
    except ValueError as error:
        raise UserError(f"{flag} {match[0]}: {error}") from None
    first, end = int(match["first"] or 0), min(int(match["last"] or len(images)), len(images))
    if first >= end:
        raise UserError(f"{flag} {match[0]}: it holds {len(images)} images, and the range asked for is empty")
    return ReferenceSource(
        count=end - first,
        name=lambda index: f"{split}_{first + index}",
        label=lambda index: f"{path}:{split}[{first + index}:{first + index + 1}]",
        content=lambda index: images.image_bytes(first + index),
    )
