"""Reference pictures: found, fitted to the model's size, with the mask that says where each is followed."""

import functools
import glob
import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.images import (
    SUFFIXES,
    BrokenImageError,
    Fit,
    Pixels,
    convert,
    decoded,
    fit_image,
    fit_mask,
    from_tensor,
    to_image,
    to_pixels,
    to_tensor,
)
from ilvr_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference picture, fitted to the model's size."""

    name: str
    """Base name of the file without its ending."""
    pixels: Pixels
    """(H, W, C)."""
    mask: Pixels | None = None
    """(H, W, 1): 255 where it is followed, 0 where it is not; None is everywhere."""
    size: tuple[int, int] | None = None
    """Height and width before it was fitted."""

    @functools.cached_property
    def sha256(self) -> str:
        """Of the fitted 8-bit pixels: what an image's noise depends on."""
        return _sha256(self.pixels)

    @functools.cached_property
    def mask_sha256(self) -> str | None:
        """Of the fitted mask."""
        return None if self.mask is None else _sha256(self.mask)

    @property
    def key(self) -> tuple[str, str, str | None]:
        """Equal for what makes equal pictures of one name."""
        return self.name, self.sha256, self.mask_sha256

    @property
    def tensor(self) -> Tensor:
        """(C, H, W) in [-1, 1]."""
        return to_tensor(self.pixels)

    def shown(self, pixels: Pixels | None = None) -> Pixels:
        """The picture (or another in its place), a checkerboard where the mask does not follow it."""
        pixels = self.pixels if pixels is None else pixels
        if self.mask is None:
            return pixels
        height, width, _ = pixels.shape
        cell = max(2, min(height, width) // 8)
        rows, columns = np.ogrid[:height, :width]
        board = np.where((rows // cell + columns // cell) % 2, 150, 190)[:, :, None]
        weight = self.mask / 255.0
        return np.rint(weight * pixels + (1 - weight) * board).astype(np.uint8)


def _sha256(pixels: Pixels) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def masks_of(references: Sequence[Reference]) -> Tensor | None:
    """(B, 1, H, W) in [0, 1], or None where no reference has a mask."""
    if all(reference.mask is None for reference in references):
        return None
    whole = np.full_like(references[0].pixels[:, :, :1], 255)
    stacked = np.stack([whole if r.mask is None else r.mask for r in references])
    return torch.from_numpy(np.moveaxis(stacked, -1, -3).copy()).float() / 255


def fitted(name: str, image: Image.Image, size: tuple[int, int], channels: int, fit: Fit = "crop") -> Reference:
    """A picture of any mode and size, made a reference; its alpha channel, if it says anything, is the mask.

    Raises:
        UserError: it is transparent all over.
    """
    image = ImageOps.exif_transpose(image)
    mask = None
    if image.has_transparency_data and not image.mode.startswith("I"):  # 16 bits would be clipped to 8
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        values = np.asarray(alpha)
        if values.max() == 0:
            raise UserError(f"the reference {name} is transparent all over; give one that shows something")
        if values.min() < 255:
            mask, image = to_pixels(fit_mask(alpha, size, fit)), _inpaint_transparent(image)
            if not mask.any():
                raise UserError(
                    f"the reference {name} is transparent in all of the part that is used; crop it, or give --fit pad"
                )
    pixels = to_pixels(fit_image(convert(image, channels), size, fit))
    return Reference(name=name, pixels=pixels, mask=mask, size=(image.height, image.width))


def _inpaint_transparent(image: Image.Image) -> Image.Image:
    """RGBA to RGB; transparent parts take the colours nearest to them, so that phi meets no edge there.

    Pull-push (Gortler et al. 1996): what a level does not have comes from the next coarser one.
    """
    rgba = to_tensor(to_pixels(image))[None] / 2 + 0.5
    levels = [(rgba[:, :3] * rgba[:, 3:], rgba[:, 3:])]
    while max(levels[-1][0].shape[2:]) > 1:
        size = [-(-side // 2) for side in levels[-1][0].shape[2:]]
        colour, alpha = (F.interpolate(part, size, mode="area") for part in levels[-1])
        levels.append((colour, alpha))
    filled = torch.zeros(1, 3, 1, 1)
    for colour, alpha in reversed(levels):
        coarser = F.interpolate(filled, colour.shape[2:], mode="bilinear")
        own = alpha if colour.shape == rgba[:, :3].shape else (alpha > 0).float()
        filled = torch.where(alpha > 0, own * (colour / alpha.clamp(min=1e-9)) + (1 - own) * coarser, coarser)
    return to_image(from_tensor(2 * filled[0] - 1))


def to_mask(image: Image.Image) -> Image.Image:
    """A picture of any mode as a greyscale mask; its transparent parts are not followed."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return convert(image, 1)


def with_mask(reference: Reference, name: str, mask: Image.Image, fit: Fit = "crop") -> Reference:
    """The reference, followed only where a picture is bright, and less where it is grey; its own mask still holds.

    Args:
        reference: fitted.
        name: of the mask, for messages.
        mask: greyscale.
        fit: as the reference was fitted.

    Raises:
        UserError: the mask has other proportions than the reference, or follows it nowhere.
    """
    if reference.size is not None:
        height, width = reference.size
        if abs(mask.height * width - mask.width * height) > max(mask.height * width, mask.width * height) * 0.02:
            raise UserError(
                f"--mask: {name} is {mask.width}x{mask.height} px, its reference {reference.name} {width}x{height}; "
                "give a mask of the same proportions"
            )
    height, width, _ = reference.pixels.shape
    pixels = to_pixels(fit_mask(mask, (height, width), fit))
    if reference.mask is not None:
        pixels = np.rint(pixels * (reference.mask / 255.0)).astype(np.uint8)
    if not pixels.any():
        raise UserError(f"--mask: {name} is black all over; white is where {reference.name} is followed")
    return replace(reference, mask=pixels)


def find_images(patterns: Sequence[str], flag: str = "--ref") -> list[Path]:
    """Files that paths, folders and globs name, in order, each once.

    Raises:
        UserError: a path is missing, or a folder or glob holds no images.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if not pattern.strip():
            raise UserError(f"{flag}: a name is empty; give pictures, folders or globs")
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


def read_references(paths: Sequence[Path], size: tuple[int, int], channels: int, fit: Fit = "crop") -> list[Reference]:
    """Read and fit reference pictures; equal pictures under one name are kept once."""
    references: dict[tuple[str, str, str | None], Reference] = {}
    for path in paths:
        fit_it = functools.partial(fitted, path.stem, size=size, channels=channels, fit=fit)
        reference = decoded(path, fit_it)
        references.setdefault(reference.key, reference)
    return list(references.values())


CHECKED = 1000
"""So many references are read before anything starts; more of them, when they are needed."""


CACHED = 32
"""Fitted references that are kept at a time."""


class Part(Protocol):
    """Pictures that are there to be read, as a folder's or a split's."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What its reference is called."""

    def label(self, row: int) -> str:
        """What a message calls it."""

    def source(self, row: int) -> Path | bytes:
        """The file, or what it holds."""


@dataclass(frozen=True)
class Files:
    """Pictures in files."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        """The file's, without its ending."""
        return self.paths[row].stem

    def label(self, row: int) -> str:
        """Its path."""
        return str(self.paths[row])

    def source(self, row: int) -> Path | bytes:
        """The file."""
        return self.paths[row]


@dataclass(frozen=True)
class DatasetReferences:
    """Rows of a data set's split, from first on."""

    image_bytes: Callable[[int], Path | bytes]
    path: str
    split: str
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        """Split and number."""
        return f"{self.split}_{self.first + row}"

    def label(self, row: int) -> str:
        """As --ref would ask for it."""
        return f"{self.path}:{self.split}[{self.first + row}:{self.first + row + 1}]"

    def source(self, row: int) -> Path | bytes:
        """The encoded picture, or its file."""
        return self.image_bytes(self.first + row)


class References(Sequence[Reference]):
    """Fitted references, read when they are asked for; equal pictures of one name are one.

    At most CHECKED of them are read once before, so that what is wrong with one is known at the start.

    Args:
        parts: the pictures.
        size: height and width that they are fitted to.
        channels: 1 or 3.
        fit: how.
        masks: none, one for all, or one for each.

    Raises:
        UserError: there is another number of masks, a name cannot be a file's, or a picture of few cannot be used.
    """

    def __init__(
        self,
        parts: Sequence[Part] = (),
        size: tuple[int, int] = (1, 1),
        channels: int = 3,
        fit: Fit = "crop",
        masks: Sequence[Path] = (),
    ) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in parts))
        self._size, self._channels, self._fit, self._masks = size, channels, fit, list(masks)
        self._read = functools.lru_cache(CACHED)(self._read_anew)
        self._mask = functools.lru_cache(1)(functools.partial(decoded, use=to_mask))
        total = self._ends[-1] if self._ends else 0
        names = [part.name(row) for part in parts for row in range(len(part))]
        check_names(names)
        if len(masks) not in (0, 1, total):
            raise UserError(f"--mask: got {len(masks)} masks for {total} references; give one for all, or one for each")
        self.few = total <= CHECKED
        """Whether all were read at the start."""
        kept: Iterable[int] = range(total)
        if self.few:
            first: dict[object, int] = {}
            for index in kept:
                first.setdefault(self._read(index).key, index)
            kept = first.values()
        elif len(set(names)) < total:
            kept = self._unequal_files(names)
        self._order = np.fromiter(kept, np.int64)
        first_of = {names[index]: i for i, index in reversed(list(enumerate(self._order)))}
        self._later = {i for i, index in enumerate(self._order) if first_of[names[index]] != i}

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Reference: ...

    @overload
    def __getitem__(self, index: slice) -> list[Reference]: ...

    def __getitem__(self, index: int | slice) -> Reference | list[Reference]:
        """One of them, or several.

        Raises:
            UserError: it cannot be read, or its mask says nothing.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(int(self._order[index]))

    def name(self, index: int) -> str:
        """Its name, without reading it."""
        part, row = self._place(int(self._order[index]))
        return part.name(row)

    def shares_name(self, index: int) -> bool:
        """Whether another one before it has its name."""
        return index in self._later

    def _place(self, index: int) -> tuple[Part, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)

    def _read_anew(self, index: int) -> Reference:
        part, row = self._place(index)
        fit_it = functools.partial(fitted, part.name(row), size=self._size, channels=self._channels, fit=self._fit)
        source = part.source(row)
        try:
            reference = decoded(source, fit_it)
        except FileNotFoundError:
            raise BrokenImageError(f"{part.label(row)} is there no more") from None
        except BrokenImageError as error:
            raise (BrokenImageError(f"{part.label(row)}: {error}") if isinstance(source, bytes) else error) from None
        mask = self._mask_of(index)
        return reference if mask is None else with_mask(reference, mask.name, self._mask(mask), self._fit)

    def _mask_of(self, index: int) -> Path | None:
        return self._masks[index if len(self._masks) > 1 else 0] if self._masks else None

    def _unequal_files(self, names: Sequence[str]) -> list[int]:
        """All but those that have another's name, mask and content, byte by byte."""
        often = Counter(names)

        def of_equal_size(index: int) -> tuple[str, Path | None, int]:
            part, row = self._place(index)
            source = part.source(row)
            size = len(source) if isinstance(source, bytes) else source.stat().st_size if source.is_file() else 0
            return names[index], self._mask_of(index), size

        def content(index: int) -> str:
            part, row = self._place(index)
            source = part.source(row)
            held = source if isinstance(source, bytes) else source.read_bytes() if source.is_file() else b""
            return hashlib.sha256(held).hexdigest()

        sizes = {index: of_equal_size(index) for index in range(len(names)) if often[names[index]] > 1}
        shared = Counter(sizes.values())
        kept: dict[object, int] = {}
        for index in range(len(names)):
            alike = index in sizes and shared[sizes[index]] > 1
            kept.setdefault((sizes[index], content(index)) if alike else index, index)
        return list(kept.values())


def check_names(names: Iterable[str]) -> None:
    """Raise a UserError for a reference whose name cannot be a file name of ours."""
    for name in names:
        if len(name.encode(errors="replace")) > 200 or not name.isprintable():
            raise UserError(
                f"--ref: the file name {name[:40]!r} is too long, or has characters that cannot be printed; rename it"
            )


DATASET_REFERENCE = re.compile(r"(?P<path>.+):(?P<split>\w+)(\[(?P<first>\d*):(?P<last>\d*)\])?")


def find_references(
    given: Sequence[str], shape: tuple[int, int, int], fit: Fit, masks: Sequence[str] = (), flag: str = "--ref"
) -> References:
    """References from files, folders and globs, or from a data set's split written DATASET:SPLIT[A:B].

    More than a thousand are read when they are asked for.

    Args:
        given: their names.
        shape: (C, H, W) that they are fitted to.
        fit: how.
        masks: one picture for all of them, or one for each in order.
        flag: the flag, for messages.

    Raises:
        UserError: a path is missing, a file is no image, or there is another number of masks.
    """
    channels, height, width = shape
    parts: list[Part] = []
    for pattern in given:
        match = DATASET_REFERENCE.fullmatch(pattern)
        if match and not Path(pattern).exists():
            parts.append(_dataset_reference(match))
        else:
            parts.append(Files(find_images([pattern], flag)))
    paths = [path for pattern in masks for path in find_images([pattern], "--mask")]
    return References(parts, (height, width), channels, fit, paths)


def _dataset_reference(match: re.Match[str]) -> DatasetReferences:
    from ilvr_lightning.data.sources import open_splits

    try:
        config = DataConfig(path=match["path"], split=match["split"])
        rows, _ = open_splits(config, seed=0, hold_out=False)
    except ValueError as error:
        raise UserError(f"--ref {match[0]}: {error}") from None
    first, last = int(match["first"] or 0), min(int(match["last"] or len(rows)), len(rows))
    if first >= last:
        raise UserError(f"--ref {match[0]}: it holds {len(rows)} images; the part asked for is empty")
    return DatasetReferences(rows.image_bytes, match["path"], match["split"], first, last - first)
