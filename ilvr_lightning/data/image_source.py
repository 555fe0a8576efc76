"""The encoded images of a split, which every kind of source gives; a split of a Hugging Face data set as one."""

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.images import BrokenImageError, Pixels, fit_image, read_image, to_pixels
from ilvr_lightning.errors import UserError

Encoded = bytes | Path
"""An encoded image, or the file that holds it."""


class ImageSource:
    """The encoded images of a split, or of some of its rows.

    Args:
        name: what messages call the split.
        read: gives the encoded image of a row of the split, or the file that holds it.
        split_rows: the rows of the split that belong to the source, in order.
        fingerprint: equal for equal images, so that they are decoded once and kept in a file; None where that cannot be
            known.
    """

    def __init__(
        self, name: str, read: Callable[[int], Encoded], split_rows: Sequence[int], fingerprint: str | None = None
    ) -> None:
        self.name, self.read, self.split_rows, self.fingerprint = name, read, split_rows, fingerprint

    def __len__(self) -> int:
        return len(self.split_rows)

    def image_bytes(self, row: int) -> Encoded:
        """The encoded image of a row of the source, or the file that holds it."""
        return self.read(self.split_rows[row])

    def select(self, rows: Sequence[int]) -> "ImageSource":
        """Some of the source's rows, in the order given."""
        chosen = [self.split_rows[row] for row in rows]
        fingerprint = self.fingerprint and hashlib.sha256(repr((self.fingerprint, chosen)).encode()).hexdigest()
        return ImageSource(self.name, self.read, chosen, fingerprint)

    def decode(self, row: int, content: Encoded, config: DataConfig) -> Pixels:
        """The image of a row, fitted: (H, W, C) 8-bit.

        Args:
            row: counted as the source counts; messages name it as the split counts.
            content: what image_bytes(row) gave.
            config: size and channels.

        Raises:
            BrokenImageError: the image cannot be read.
        """
        try:
            return to_pixels(fit_image(read_image(content, config.channels), config.size))
        except BrokenImageError as error:
            raise BrokenImageError(f"row {self.split_rows[row]} of {self.name} is skipped: {error}") from None

    def decode_first(self, candidates: Iterable[tuple[int, Encoded]], config: DataConfig) -> tuple[Pixels, int]:
        """The first of some images that can be read, as `decode` gives it, and its row; a warning names each other.

        Raises:
            UserError: none can be read.
        """
        for row, content in candidates:
            try:
                return self.decode(row, content, config), row
            except BrokenImageError as error:
                warnings.warn(str(error), stacklevel=2)
        raise UserError(f"data.path={config.path}: no image in it can be read")


def dataset_source(dataset: Any, config: DataConfig, split: str) -> ImageSource:
    """The images of a Hugging Face data set's split, by data.image_column and data.label.

    The column is left encoded: `datasets` would turn a 16-bit PNG white and drop alpha.

    Raises:
        UserError: the image column is missing or ambiguous, or there is no such class.
    """
    import datasets

    column = image_column(dataset.features, config)
    holds_paths = isinstance(dataset.features[column], datasets.Value)  # behind which the files may change
    images = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    source = ImageSource(
        f"{Path(config.path).name}/{split}",
        functools.partial(_read_cell, images, column),  # which a worker that is not forked can load
        range(len(images)),
        None if holds_paths else images._fingerprint,
    )
    return source if config.label is None else source.select(_rows_with_label(dataset, config.label, config.path))


def _read_cell(images: Any, column: str, row: int) -> Encoded:
    return image_bytes_of(images[row][column])


def image_bytes_of(value: Any) -> Encoded:
    """The encoded image that a cell of an image column holds, or the file that it names."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return Path(value)
    value = value or {}
    return value["bytes"] if value.get("bytes") is not None else Path(value.get("path") or "")


def image_column(features: Mapping[str, Any], config: DataConfig) -> str:
    """The column that holds the images, by a data set's features: data.image_column, or the only one.

    Raises:
        UserError: there is no such column, or there are several and data.image_column is not given.
    """
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    column = images[0] if config.image_column is None and len(images) == 1 else config.image_column
    if column not in images and getattr(features.get(column or ""), "dtype", None) not in ("string", "binary"):
        raise UserError(
            f"data.image_column must name the column of the images: got {column!r}; {config.path} has "
            f"{', '.join(features)}, and images in {', '.join(images) or 'none'}"
        )
    return str(column)


def _rows_with_label(dataset: Any, label: str, path: str) -> list[int]:
    """The rows of one class, by the name of the class."""
    import datasets

    classes = {n: f.names for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)}
    for column, names in classes.items():
        if label in names:
            values = np.asarray(dataset.with_format(None)[column][:])
            return np.flatnonzero(values == names.index(label)).tolist()
    known = ", ".join(name for names in classes.values() for name in names)
    raise UserError(f"data.label={label!r} is not in {path}: its classes are {known or 'none'}")
