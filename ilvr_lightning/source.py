"""Where training images come from: the Hub, a folder of images, a local data set, Parquet or Arrow files."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ilvr_lightning.config import DataConfig
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError
from ilvr_lightning.images import SUFFIXES

VALIDATION_NAMES = ("validation", "valid", "val", "test")


class Rows(Protocol):
    """Encoded images of one split."""

    name: str
    fingerprint: str | None
    """Equal for equal rows; None where nothing tells."""

    def __len__(self) -> int: ...

    def image_bytes(self, row: int) -> bytes | Path: ...

    def select(self, rows: Sequence[int]) -> "Rows": ...


class HFRows:
    """A split of a Hugging Face data set, with its image column left encoded.

    `datasets` would turn a 16-bit PNG white and drop alpha; the project decodes for itself.
    """

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        import datasets

        holds_paths = isinstance(dataset.features[column], datasets.Value)  # behind which the files may change
        self.dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.name = name
        self.fingerprint: str | None = None if holds_paths else self.dataset._fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def image_bytes(self, row: int) -> bytes | Path:
        """The encoded image, or the file that holds it."""
        value = self.dataset[int(row)][self.column] or {}
        return value["bytes"] if value.get("bytes") is not None else Path(value.get("path") or "")

    def select(self, rows: Sequence[int]) -> "HFRows":
        """Some of the rows, in the order given."""
        selected = HFRows(self.dataset.select(rows), self.column, self.name)
        if self.fingerprint is None:
            selected.fingerprint = None
        return selected


def open_splits(config: DataConfig, seed: int, hold_out: bool = True) -> tuple[Rows, Rows]:
    """The training and the validation rows; with hold_out=False a split is given whole, twice if it is the only one.

    Raises:
        UserError: the data set cannot be had, has no such split, column or class, or too few images.
    """
    splits = _load(config)
    if config.split not in splits:
        raise UserError(f"data.split={config.split!r} is not in {config.path}: it has {', '.join(splits)}")
    train = _rows(splits[config.split], config, config.split)
    if not hold_out:
        return train, train
    name = config.validation_split or next((n for n in VALIDATION_NAMES if n in splits and n != config.split), None)
    if name is not None:
        if name not in splits:
            raise UserError(f"data.validation_split={name!r} is not in {config.path}: it has {', '.join(splits)}")
        return train, _rows(splits[name], config, name)
    if len(train) < 2:
        raise UserError(f"data.path={config.path} holds {len(train)} image; at least 2 are needed, one to validate on")
    order = np.random.default_rng(derive_seed(seed, "held out")).permutation(len(train))
    held_out = max(1, min(len(train) - 1, round(config.validation_fraction * len(train))))
    return train.select(sorted(order[held_out:].tolist())), train.select(sorted(order[:held_out].tolist()))


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
        raise UserError(_explain(config.path, error)) from error


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


def _explain(path: str, error: Exception) -> str:
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


def _rows(dataset: Any, config: DataConfig, split: str) -> HFRows:
    import datasets

    features = dataset.features
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
    if config.label is not None:
        dataset = _one_class(dataset, config)
    return HFRows(dataset, column, f"{Path(config.path).name}/{split}")


def _one_class(dataset: Any, config: DataConfig) -> Any:
    """The rows of one class, by its name."""
    import datasets

    classes = {n: f.names for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)}
    for column, names in classes.items():
        if config.label in names:
            wanted = names.index(config.label)
            return dataset.select(np.flatnonzero(np.asarray(dataset.with_format(None)[column][:]) == wanted))
    if not classes:
        columns = ", ".join(dataset.features)
        raise UserError(f"data.label={config.label!r}: {config.path} has no class column among {columns}")
    known = ", ".join(name for names in classes.values() for name in names)
    raise UserError(f"data.label={config.label!r} is not in {config.path}: it has {known}")
