"""The encoded images of a split, which every kind of source gives; a split of a Hugging Face data set as one."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
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


def decode_image_at(source: ImageSource, row: int, content: Encoded, config: DataConfig) -> Pixels:
    """The image of a row, fitted: (H, W, C) 8-bit.

    Args:
        source: names the row in messages.
        row: counted as the source counts.
        content: what source.image_bytes(row) gave.
        config: size and channels.

    Raises:
        BrokenImageError: the image cannot be read; the row is named as its split counts.
    """
    try:
        image = read_image(content, config.channels)
    except (BrokenImageError, FileNotFoundError) as error:
        raise BrokenImageError(
            f"row {source.split_rows[row]} of {source.name} is broken: {error}; data.on_broken=skip leaves it out"
        ) from None
    return to_pixels(fit_image(image, config.size))


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
        functools.partial(_read_cell, images, column),
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
    """The column that holds the images, by a data set's features.

    Raises:
        UserError: there is none, or there are several and data.image_column names none of them.
    """
    import datasets

    column = config.image_column
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if column is None:
        if len(images) != 1:
            raise UserError(
                f"data.image_column must be given: {config.path} has {len(images)} image columns among "
                f"{', '.join(features)}"
            )
        column = images[0]
    elif column not in features:
        raise UserError(f"data.image_column={column!r} is not in {config.path}: it has {', '.join(features)}")
    elif column not in images and getattr(features[column], "dtype", None) not in ("string", "binary"):
        raise UserError(f"data.image_column={column!r} holds no images; image columns: {', '.join(images) or 'none'}")
    return column


def _rows_with_label(dataset: Any, label: str, path: str) -> list[int]:
    """The rows of one class, by the name of the class."""
    import datasets

    classes = {n: f.names for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)}
    for column, names in classes.items():
        if label in names:
            values = np.asarray(dataset.with_format(None)[column][:])
            return np.flatnonzero(values == names.index(label)).tolist()
    if not classes:
        columns = ", ".join(dataset.features)
        raise UserError(f"data.label={label!r}: {path} has no class column among {columns}")
    known = ", ".join(name for names in classes.values() for name in names)
    raise UserError(f"data.label={label!r} is not in {path}: it has {known}")
