"""Reference images: found in files, folders and data sets, and read when they are needed."""

import functools
import glob
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

from PIL import Image

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.fitting import Reference, fit_reference, masks_of, to_mask, with_mask
from ilvr_lightning.data.image_files import image_files
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import SUFFIXES, BrokenImageError, Fit, from_tensor, open_image, to_image
from ilvr_lightning.data.values import Range
from ilvr_lightning.errors import UserError

__all__ = ["Place", "Reference", "References", "find_images", "find_places", "find_references", "masks_of"]

EAGER_LIMIT = 1000
"""Up to so many references are read and checked at the start of a run; more of them are read when they are needed."""

CACHE_SIZE = 32
"""So many fitted references are kept in memory."""


class Place(NamedTuple):
    """Where a reference is read from."""

    name: str
    """The name of the reference, which begins the names of its samples' files."""
    source: ImageSource
    row: int


class References(Sequence[Reference]):
    """Fitted references, read when they are asked for.

    Up to EAGER_LIMIT of them are read once at the start, so that every fault is known there, and equal ones (same name,
    same pixels, same mask) are kept once. Equal ones among more have equal noise and so equal samples: a sample is then
    written twice to the same file, which is harmless.

    Args:
        places: where they are.
        size: height and width that they are fitted to.
        channels: 3 or 1.
        fit: crop to the centre, or pad with white margins.
        masks: none, one for all references, or one for each.
        value_range: what is black and white in files of more than 8 bits; None decides it by each file alone.

    Raises:
        UserError: the number of masks is another one, a name cannot be a file name, or a reference that is read at the
            start cannot be used.
    """

    def __init__(
        self,
        places: Sequence[Place] = (),
        size: tuple[int, int] = (1, 1),
        channels: int = 3,
        fit: Fit = "crop",
        masks: Sequence[Path] = (),
        value_range: Range | None = None,
    ) -> None:
        for place in places:
            _check_name(place.name)
        if len(masks) not in (0, 1, len(places)):
            raise UserError(
                f"--mask: got {len(masks)} masks for {len(places)} references; give one for all, or one for each"
            )
        self._places, self._size, self._channels, self._fit, self._masks = places, size, channels, fit, masks
        self._value_range = value_range
        self._cached = functools.lru_cache(CACHE_SIZE)(self._read)
        self._cached_mask = functools.lru_cache(1)(_read_mask)
        self.all_validated = len(places) <= EAGER_LIMIT
        """Whether all references were read at the start."""
        self._indices: Sequence[int] = range(len(places))
        if self.all_validated:
            first: dict[object, int] = {}
            for index in self._indices:
                first.setdefault(self._cached(index).key, index)
            self._indices = list(first.values())
        self._uses = Counter(map(self.name, range(len(self))))

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
        return self._places[self._indices[index]].name

    def name_is_ambiguous(self, index: int) -> bool:
        """Whether another reference has the same name; none is read for it."""
        return self._uses[self.name(index)] > 1

    def _read(self, index: int) -> Reference:
        name, source, row = self._places[index]
        content = source.image_bytes(row)
        try:
            with open_image(content, self._value_range) as image:
                reference = fit_reference(name, image, self._size, self._channels, self._fit)
        except BrokenImageError as error:
            where = f"row {source.split_rows[row]} of {source.name}: " if isinstance(content, bytes) else ""
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
            matches = image_files(path)
        else:
            matches = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.suffix.lower() in SUFFIXES)
            if not glob.has_magic(pattern):
                raise UserError(f"{flag}: there is no file or folder {pattern}")
        if not matches:
            raise UserError(f"{flag}: no images in {pattern}; the known endings are {' '.join(SUFFIXES)}")
        found.update(dict.fromkeys(matches))
    return list(found)


DATASET_REFERENCE = re.compile(r"(?P<path>.+):(?P<split>\w+)(\[(?P<first>\d*):(?P<last>\d*)\])?")
"""References in a data set are written DATASET:SPLIT, or DATASET:SPLIT[A:B] for its rows from A to B - 1. DATASET may
be the config of a training; its splits are train and validation."""


def find_references(
    given: Sequence[str],
    shape: tuple[int, int, int],
    fit: Fit = "crop",
    masks: Sequence[str] = (),
    flag: str = "--ref",
    value_range: Range | None = None,
) -> References:
    """References from files, folders and globs, or from a data set's split written DATASET:SPLIT[A:B].

    Args:
        given: their names.
        shape: (C, H, W) that they are fitted to.
        fit: crop to the centre, or pad with white margins.
        masks: one image for all references, or one for each in order.
        flag: the flag or key that they were given by, for messages.
        value_range: what is black and white in files of more than 8 bits, as the model's training had it.

    Raises:
        UserError: a path does not exist, a file is not an image, or the number of masks is another one.
    """
    channels, height, width = shape
    mask_paths = [path for pattern in masks for path in find_images([pattern], "--mask")]
    return References(find_places(given, flag), (height, width), channels, fit, mask_paths, value_range)


def find_places(given: Sequence[str], flag: str = "--ref") -> list[Place]:
    """Where images are that files, folders and globs name, or a data set's split written DATASET:SPLIT[A:B].

    Raises:
        UserError: a path does not exist, or holds no images.
    """
    places: list[Place] = []
    for pattern in given:
        match = DATASET_REFERENCE.fullmatch(pattern)
        if match and not Path(pattern).exists():
            places += _places_in_dataset(match, flag)
        else:
            paths = find_images([pattern], flag)
            files = ImageSource("files", paths.__getitem__, range(len(paths)))
            places += [Place(path.stem, files, row) for row, path in enumerate(paths)]
    return places


def _places_in_dataset(match: re.Match[str], flag: str) -> list[Place]:
    from ilvr_lightning.data.sources import open_split  # which imports `datasets`

    split, of_config = match["split"], match["path"].endswith((".yaml", ".yml"))
    try:
        images = (_training_images if of_config else open_split)(DataConfig(path=match["path"], split=split))
    except ValueError as error:
        raise UserError(f"{flag} {match[0]}: {error}") from None
    rows = range(len(images))[int(match["first"] or 0) : int(match["last"] or len(images))]
    if not rows:
        raise UserError(f"{flag} {match[0]}: it holds {len(images)} images, and the range asked for is empty")
    return [Place(f"{split}_{row}", images, row) for row in rows]


def _training_images(config: DataConfig) -> ImageSource:
    """The images that the training with a config sees, or validates on: decoded, scaled and cropped, not mirrored."""
    from ilvr_lightning.config.load import load_config
    from ilvr_lightning.data.splits import open_splits  # which imports `datasets`

    if config.split not in ("train", "validation"):
        raise UserError("the splits of a config are train and validation")
    whole = load_config([str(config.path)])
    _, train, validation = open_splits(whole.data, whole.seed)
    images = train if config.split == "train" else validation

    def encoded(row: int) -> bytes:
        file = io.BytesIO()
        to_image(from_tensor(images[row][0])).save(file, "PNG", compress_level=1)
        return file.getvalue()

    return ImageSource(f"{config.path}:{config.split}", encoded, range(len(images)))
