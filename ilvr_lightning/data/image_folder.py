"""Folders of images."""

import glob
import warnings
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.image_files import image_files
from ilvr_lightning.data.images import SUFFIXES
from ilvr_lightning.errors import UserError


def open_image_folder(path: Path, config: DataConfig) -> Any:
    """The `datasets.DatasetBuilder` of a folder of images.

    `datasets` takes folders and files that have "train", "test" or the like in their names for splits, and drops the
    others. Where it would drop images, and the config names no split, all images are one split, train.

    Raises:
        UserError: the folder holds no images.
    """
    count = len(image_files(path))
    if not count:
        raise UserError(f"data.path={config.path}: no images in this folder, and no Parquet or Arrow files")
    pattern = glob.escape(str(path))
    builder = _builder(config, data_dir=pattern)
    splits = builder.config.data_files or {}
    used = sum(Path(file).suffix.lower() in SUFFIXES for files in splits.values() for file in files)
    if used >= count or {config.split, config.validation_split} - {"train", None}:
        return builder
    names = ", ".join(map(str, splits))
    warnings.warn(
        f"data.path={config.path}: only {used} of {count} images have the name of a split ({names}) in "
        "their path, and so all are read as one split, train; to use the splits, put every image into a folder named "
        "train, validation or test",
        stacklevel=2,
    )
    return _builder(config, data_files={"train": f"{pattern}/**"})


def _builder(config: DataConfig, **where: Any) -> Any:
    """The builder without archives and, unless the config names an image column, without metadata files.

    `datasets` adds the images in an archive, and drops those that metadata.csv or metadata.jsonl do not name.
    """
    builder: Any = datasets.load_dataset_builder("imagefolder", drop_metadata=config.image_column is None, **where)
    for split, files in (builder.config.data_files or {}).items():
        paths = map(Path, files)
        kept = [i for i, path in enumerate(paths) if path.suffix.lower() in SUFFIXES or path.stem == "metadata"]
        builder.config.data_files[split] = DataFilesList(
            [files[i] for i in kept], [files.origin_metadata[i] for i in kept]
        )
    return builder
