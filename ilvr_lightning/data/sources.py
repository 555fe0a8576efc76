"""Where training images come from: the Hub, a folder of images, a local data set, Parquet or Arrow files."""

import glob
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.images import SUFFIXES, BrokenImageError, Pixels, fit_image, read_image, to_pixels
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError

VALIDATION_NAMES = ("validation", "valid", "val", "test")


class Rows(Protocol):
    """Encoded images of one split."""

    name: str
    fingerprint: str | None
    """Equal for equal rows; None where nothing tells."""

    def __len__(self) -> int: ...

    def number(self, row: int) -> int:
        """Of the row in its split, before anything was held out or dropped."""

    def image_bytes(self, row: int) -> bytes | Path: ...

    def select(self, rows: Sequence[int]) -> "Rows": ...


class DatasetSource:
    """A split of a Hugging Face data set, with its image column left encoded.

    `datasets` would turn a 16-bit PNG white and drop alpha; the project decodes for itself.
    """

    def __init__(self, dataset: Any, column: str, name: str, numbers: NDArray[np.int64] | None = None) -> None:
        import datasets

        holds_paths = isinstance(dataset.features[column], datasets.Value)  # behind which the files may change
        self.dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.name = name
        self.numbers = numbers
        self.fingerprint: str | None = None if holds_paths else self.dataset._fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def number(self, row: int) -> int:
        """Of the row in its split, before anything was held out or dropped."""
        return row if self.numbers is None else int(self.numbers[row])

    def image_bytes(self, row: int) -> bytes | Path:
        """The encoded image, or the file that holds it."""
        return encoded(self.dataset[int(row)][self.column])

    def select(self, rows: Sequence[int]) -> "DatasetSource":
        """Some of the rows, in the order given."""
        chosen = np.asarray(rows, dtype=np.int64)
        numbers = chosen if self.numbers is None else self.numbers[chosen]
        selected = DatasetSource(self.dataset.select(rows), self.column, self.name, numbers)
        if self.fingerprint is None:
            selected.fingerprint = None
        return selected


def encoded(value: Any) -> bytes | Path:
    """What a cell of an image column holds: the encoded image, or the file that does."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return Path(value)
    value = value or {}
    return value["bytes"] if value.get("bytes") is not None else Path(value.get("path") or "")


def decode_image_at(rows: Rows, row: int, source: bytes | Path, config: DataConfig) -> Pixels:
    """A row's image (H, W, C), 8-bit.

    Raises:
        BrokenImageError: it cannot be read; the row is named as its split counts.
    """
    try:
        image = read_image(source, config.channels)
    except (BrokenImageError, FileNotFoundError) as error:
        raise BrokenImageError(
            f"row {rows.number(row)} of {rows.name} is broken: {error}; data.on_broken=skip leaves it out"
        ) from None
    return to_pixels(fit_image(image, config.size))


def open_splits(config: DataConfig, seed: int, hold_out: bool = True) -> tuple[Rows, Rows]:
    """The training and the validation rows; with hold_out=False a split is given whole, twice if it is the only one.

    Raises:
        UserError: the data set cannot be had, has no such split, column or class, or too few images.
    """
    splits = _load(config)
    name = validation_name(splits, config)
    train = _rows(splits[config.split], config, config.split)
    if not hold_out:
        return train, train
    if name is not None:
        return train, _rows(splits[name], config, name)
    held_out = held_out_rows(len(train), config)
    order = np.random.default_rng(derive_seed(seed, "held out")).permutation(len(train))
    return train.select(sorted(order[held_out:].tolist())), train.select(sorted(order[:held_out].tolist()))


def validation_name(splits: Collection[str], config: DataConfig) -> str | None:
    """The split to validate on, or None where a part of the training split is held out.

    Raises:
        UserError: a split that is asked for is not there.
    """
    wanted = config.validation_split
    for key, split in (("split", config.split), ("validation_split", wanted)):
        if split is not None and split not in splits:
            raise UserError(f"data.{key}={split!r} is not in {config.path}: it has {', '.join(splits)}")
    return wanted or next((n for n in VALIDATION_NAMES if n in splits and n != config.split), None)


def held_out_rows(count: int, config: DataConfig) -> int:
    """How many of a split's rows are held out.

    Raises:
        UserError: there is no row to hold out.
    """
    if count < 2:
        raise UserError(f"data.path={config.path} holds {count} image; at least 2 are needed, one to validate on")
    return max(1, min(count - 1, round(config.validation_fraction * count)))


def _load(config: DataConfig) -> dict[str, Any]:
    """Every split by name."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said in one line, below
    path = Path(config.path).expanduser()
    try:
        if glob.has_magic(config.path) or path.is_file():
            return dict(_load_files(config.path))
        if not path.is_dir():
            return _load_hub(config)
        if (path / "state.json").exists():
            return {config.split: datasets.load_from_disk(str(path))}
        if (path / "dataset_dict.json").exists():
            return {str(k): v for k, v in datasets.load_from_disk(str(path)).items()}
        if not any(p.suffix in (".parquet", ".arrow") for p in path.rglob("*")):
            if not any(p.suffix.lower() in SUFFIXES for p in path.rglob("*")):
                raise UserError(f"data.path={config.path}: no images in this folder, and no Parquet or Arrow files")
            return {str(k): v for k, v in datasets.load_dataset("imagefolder", data_dir=str(path)).items()}
        return {str(k): v for k, v in datasets.load_dataset(str(path), config.name).items()}
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(config.path, error)) from error


def _load_files(pattern: str) -> Any:
    import datasets

    files = sorted(glob.glob(pattern, recursive=True))
    kinds = {Path(file).suffix for file in files}
    if not files or kinds - {".parquet", ".arrow"} or len(kinds) > 1:
        raise UserError(f"data.path={pattern}: give Parquet or Arrow files, a folder, or a data set's name")
    return datasets.load_dataset(kinds.pop()[1:], data_files=files)


def _load_hub(config: DataConfig) -> dict[str, Any]:
    import datasets

    is_file = Path(config.path).suffix in (".parquet", ".arrow", *SUFFIXES)
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or "\\" in config.path or is_file:
        raise UserError(f"data.path={config.path}: there is no such folder or file")
    return {str(k): v for k, v in datasets.load_dataset(config.path, config.name).items()}


def explain(path: str, error: Exception) -> str:
    """One line that says what to do about a data set that did not load."""
    text, kind = str(error), type(error).__name__
    if "gated" in text.lower() or re.search(r"\b40[13] (Client|Unauthorized|Forbidden)", text):
        return f"data.path={path} is gated or private: accept its terms on the Hub, then run `hf auth login`"
    if kind in ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError") or "reach" in text.lower():
        return f"data.path={path} is no local folder, and the Hub cannot be reached: check the network or the path"
    if kind in ("DatasetNotFoundError", "RepositoryNotFoundError"):
        return f"data.path={path} is neither a local folder nor a data set on the Hub (or it needs `hf auth login`)"
    first = text.strip().partition("\n")[0]
    return f"data.path={path} could not be loaded: {first or kind}"


def _rows(dataset: Any, config: DataConfig, split: str) -> DatasetSource:
    rows = DatasetSource(dataset, image_column(dataset.features, config), f"{Path(config.path).name}/{split}")
    return rows if config.label is None else rows.select(_rows_with_label(dataset, config.label, config.path))


def image_column(features: Mapping[str, Any], config: DataConfig) -> str:
    """The column that holds the images, by a data set's features.

    Raises:
        UserError: there is none, or more than one and none is named.
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
    """The rows of one class, by its name."""
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
