"""Where training images come from: every kind of place that data.path may name is an entry of SOURCES."""

import functools
import glob
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.crops import held_out_strip
from ilvr_lightning.data.image_folder import open_image_folder
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import SUFFIXES, BrokenImageError
from ilvr_lightning.data.survey import with_pages
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError, first_line

VALIDATION_NAMES = ("validation", "valid", "val", "test")
"""The first of these splits that a data set has is validated on, unless data.validation_split names another."""

TABLES = (".parquet", ".arrow")
"""Files with these endings hold rows of a data set."""

ImageFolder.EXTENSIONS = sorted({*ImageFolder.EXTENSIONS, *SUFFIXES})  # arrays of NumPy are images here, too

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
"""A data set on the Hub is called NAME or OWNER/NAME."""


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """A kind of place that data.path may name."""

    matches: Callable[[str], bool]
    """Whether data.path names such a place."""
    open: Callable[[DataConfig], Any]
    """A `datasets.DatasetBuilder`, or the splits by name: each an ImageSource or a `datasets.Dataset`.

    data.streaming=true reads the files of a builder, if they are Parquet."""


def _local(path: str) -> Path:
    return Path(path).expanduser()


def _is_files(path: str) -> bool:
    return "://" in path or _local(path).is_file() or (glob.has_magic(path) and not _local(path).is_dir())


def _open_files(config: DataConfig) -> Any:
    path = config.path if "://" in config.path else str(_local(config.path))
    if (ending := Path(path).suffix) not in TABLES:
        raise UserError(f"data.path={config.path}: give Parquet or Arrow files, a folder, or a data set's name")
    return datasets.load_dataset_builder(ending[1:], data_files=path)


def _is_saved(path: str) -> bool:
    return any((_local(path) / name).exists() for name in ("state.json", "dataset_dict.json"))


def _open_saved(config: DataConfig) -> Any:
    saved = datasets.load_from_disk(str(_local(config.path)))
    return {config.split: saved} if isinstance(saved, datasets.Dataset) else saved


def _is_dataset_folder(path: str) -> bool:
    return any(file.suffix in TABLES for file in _local(path).rglob("*"))


def _open_image_folder(config: DataConfig) -> Any:
    return open_image_folder(_local(config.path), config)


def _is_on_hub(path: str) -> bool:
    return HUB_NAME.fullmatch(path) is not None and Path(path).suffix not in (*TABLES, *SUFFIXES)


def _open_by_name(config: DataConfig) -> Any:
    return datasets.load_dataset_builder(str(_local(config.path)), config.name)


SOURCES = {
    "Hub": SourceKind(matches=_is_on_hub, open=_open_by_name),
    "image folder": SourceKind(matches=lambda path: _local(path).is_dir(), open=_open_image_folder),
    "data set folder": SourceKind(matches=_is_dataset_folder, open=_open_by_name),
    "saved data set": SourceKind(matches=_is_saved, open=_open_saved),
    "files": SourceKind(matches=_is_files, open=_open_files),
}
"""The kinds of places by name. The last one that matches a path is used, so that an added kind comes before these."""


def locate(config: DataConfig) -> SourceKind:
    """The kind of place that data.path names.

    Raises:
        UserError: data.path is not set, or there is no such place.
    """
    config.check_path()
    for kind in reversed(SOURCES.values()):
        if kind.matches(config.path):
            return kind
    raise UserError(f"data.path={config.path}: there is no such folder or file")


def open_source(config: DataConfig, seed: int) -> tuple[ImageSource, ImageSource]:
    """The images to train on and those to validate on: another split, or a part of the only one, chosen by the seed.

    Raises:
        UserError: the data set cannot be opened, has no such split, column or class, or too few images.
    """
    splits, name = _open_splits(config)
    train = with_pages(_as_source(splits, config.split, config), config)
    if name is not None:
        return train, with_pages(_as_source(splits, name, config), config)
    if (
        config.crop != "center"
        and len(train) * 2 * config.validation_fraction < 1
        and (parts := _divide(train, config))
    ):
        return parts
    count = count_to_hold_out(len(train), config)
    order = np.random.default_rng(derive_seed(seed, "held out")).permutation(len(train))
    return train.select(sorted(order[count:].tolist())), train.select(sorted(order[:count].tolist()))


def _divide(train: ImageSource, config: DataConfig) -> tuple[ImageSource, ImageSource] | None:
    """The pictures without their held-out strips, and the strips; None if all pictures are too small for that.

    A whole picture of so few would be more than twice data.validation_fraction of the images.
    """
    divided = []
    for row in range(len(train)):
        with suppress(BrokenImageError):
            if held_out_strip(train.picture_size(row, config), config) is not None:
                divided.append(row)
    if not divided:
        return None
    fraction = config.validation_fraction
    return train.with_part("training", fraction), train.select(divided).with_part("held out", fraction)


def open_split(config: DataConfig) -> ImageSource:
    """All images of data.split.

    Raises:
        UserError: the data set cannot be opened, or has no such split, column or class.
    """
    return _as_source(_open_splits(config)[0], config.split, config)


def _open_splits(config: DataConfig) -> tuple[Mapping[str, Any], str | None]:
    """All splits, and the name of the one to validate on."""
    with explain_errors(config):
        splits = locate(config).open(config)
        if not isinstance(splits, Mapping):
            splits.download_and_prepare()
            splits = splits.as_dataset()
        return splits, validation_split(splits, config)


def _as_source(splits: Mapping[str, Any], name: str, config: DataConfig) -> ImageSource:
    split = splits[name]
    return split if isinstance(split, ImageSource) else dataset_source(split, config, name)


def dataset_source(dataset: Any, config: DataConfig, split: str) -> ImageSource:
    """The images of a Hugging Face data set's split, by data.image_column and data.label.

    The column is left encoded: `datasets` would turn a 16-bit PNG white and drop alpha.

    Raises:
        UserError: the image column is missing or ambiguous, or there is no such class.
    """
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


def _read_cell(images: Any, column: str, row: int) -> bytes | Path:
    return image_bytes_of(images[row][column])


def image_bytes_of(value: Any) -> bytes | Path:
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
    classes = {n: f.names for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)}
    for column, names in classes.items():
        if label in names:
            values = np.asarray(dataset.with_format(None)[column][:])
            return np.flatnonzero(values == names.index(label)).tolist()
    known = ", ".join(name for names in classes.values() for name in names)
    raise UserError(f"data.label={label!r} is not in {path}: its classes are {known or 'none'}")


def validation_split(splits: Collection[str], config: DataConfig) -> str | None:
    """The split to validate on, or None where a part of the training split is held out.

    Raises:
        UserError: data.split or data.validation_split names a split that does not exist.
    """
    wanted = config.validation_split
    for key, split in (("split", config.split), ("validation_split", wanted)):
        if split is not None and split not in splits:
            raise UserError(f"data.{key}={split!r} is not in {config.path}: it has {', '.join(splits)}")
    return wanted or next((n for n in VALIDATION_NAMES if n in splits and n != config.split), None)


def count_to_hold_out(count: int, config: DataConfig) -> int:
    """How many of so many images are held out to validate on.

    Raises:
        UserError: there are fewer than two.
    """
    if count < 2:
        instead = ", or one that is large with data.crop=random"
        if config.crop != "center":
            instead = (
                f"; shrunk by data.scale={config.scale}, it is too small to hold out a strip: give a smaller scale "
                "(1 shrinks nothing), or more images"
            )
        raise UserError(
            f"data.path={config.path} holds {count} image; at least 2 are needed, one to validate on{instead}"
        )
    return max(1, min(count - 1, round(config.validation_fraction * count)))


@contextmanager
def explain_errors(config: DataConfig) -> Iterator[None]:
    """Make whatever goes wrong with a data set a UserError of one line, and keep `datasets` quiet meanwhile."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(load_error_message(config.path, error)) from error


def load_error_message(path: str, error: BaseException) -> str:
    """One line that says what to do about a data set that did not load."""
    text, kind = str(error), type(error).__name__
    if "gated" in text.lower() or re.search(r"\b40[13] (Client|Unauthorized|Forbidden)", text):
        return f"data.path={path} is gated or private: accept its terms on the Hub, then run `hf auth login`"
    if kind in ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError") or "reach" in text.lower():
        return f"data.path={path} is not a local folder, and the Hub cannot be reached: check the network or the path"
    if kind in ("DatasetNotFoundError", "RepositoryNotFoundError"):
        return f"data.path={path} is neither a local folder nor a data set on the Hub (or it needs `hf auth login`)"
    if kind == "DatasetGenerationError":  # whose cause alone says what went wrong
        error = error.__cause__ or error
    return f"data.path={path} could not be loaded: {first_line(error)}"
