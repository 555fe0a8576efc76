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
    builder = _of_images_alone(datasets.load_dataset_builder("imagefolder", data_dir=pattern), config)
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
    return _of_images_alone(datasets.load_dataset_builder("imagefolder", data_files={"train": f"{pattern}/**"}), config)


def _of_images_alone(builder: Any, config: DataConfig) -> Any:
    """The builder without archives and, unless the config names a column, without metadata files.

    `datasets` adds the images in an archive, and drops those that metadata.csv or metadata.jsonl do not name.
    """
    needs_columns = config.label is not None or config.image_column is not None
    for split, files in (builder.config.data_files or {}).items():
        kept = [
            i
            for i, file in enumerate(files)
            if Path(file).suffix.lower() in SUFFIXES or (needs_columns and Path(file).stem == "metadata")
        ]
        builder.config.data_files[split] = DataFilesList(
            [files[i] for i in kept], [files.origin_metadata[i] for i in kept]
        )
    return builder
