"""Small data sets whose images are known: the red of each image says which row it is."""

import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.datamodule import ImageDataModule

Hub = Callable[[dict[str, list[str]]], None]
"""Makes every data set on the Hub have these files by split."""
SIZES = (7, 1, 13, 0, 29)
"""Rows of the shards that `write_shards` writes; each row group holds three."""
ROWS = sum(SIZES)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(value: int) -> bytes:
    """An image of 8 by 8 pixels with this red."""
    return encode(Image.new("RGB", (8, 8), (value, 0, 255 - value)))


def table(count: int, first: int = 0, **columns: Any) -> datasets.Dataset:
    """A data set whose row i has a red of first + i."""
    values = [{"bytes": png(first + i), "path": None} for i in range(count)]
    return datasets.Dataset.from_dict({"image": values, **columns}).cast_column("image", datasets.Image())


def write_shards(
    folder: Path | str, sizes: Sequence[int] = SIZES, name: str = "train", broken: Iterable[int] = ()
) -> None:
    """Write Parquet shards whose row i has a red of i; the files of broken rows are cut short."""
    schema = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}).arrow_schema
    rows, broken = itertools.count(), set(broken)
    for number, size in enumerate(sizes):
        in_shard = list(itertools.islice(rows, size))
        images = [{"bytes": png(row)[: 20 if row in broken else None], "path": None} for row in in_shard]
        shard = pa.Table.from_pydict({"image": images, "caption": [str(row) for row in in_shard]}, schema)
        with fsspec.open(f"{folder}/{name}-{number:05}-of-{len(sizes):05}.parquet", "wb") as file:
            pq.write_table(shard, file, row_group_size=3)


def write_noise_shards(folder: Path, images: Path) -> None:
    """Write the images of a folder, twice, as five shards that do not divide; one of them is empty."""
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    values = [{"bytes": path.read_bytes(), "path": None} for path in sorted(images.glob("*.png"))] * 2
    for number, (first, end) in enumerate(itertools.pairwise([0, 5, 6, 6, 23, 42])):
        shard = pa.Table.from_pydict({"image": values[first:end]}, schema)
        pq.write_table(shard, folder / f"train-{number:05}-of-00005.parquet", row_group_size=3)


STREAM = ("data.streaming=true", "data.num_workers=2", "data.batch_size=6", "data.shuffle_window=12")
"""Settings of a run that streams them."""


def data_config(path: Path | str, **settings: Any) -> DataConfig:
    """Images of 8 pixels, decoded in this process."""
    return DataConfig(path=str(path), **{"image_size": 8, "num_workers": 0, **settings})


def stream_config(path: Path | str, **settings: Any) -> DataConfig:
    """The same for shards that are streamed: batches of six, shuffled over twelve rows."""
    return data_config(path, **{"num_workers": 1, "batch_size": 6, "shuffle_window": 12, "streaming": True, **settings})


def set_up(config: DataConfig, seed: int = 0, cache: Path | None = None) -> ImageDataModule:
    """A data module whose data set is open."""
    data = ImageDataModule(config, seed, cache)
    data.setup()
    return data


def red(image: Tensor) -> int:
    """The red of an image (C, H, W), which is its row."""
    return round((float(image[0, 0, 0]) + 1) * 127.5)


def reds(config: DataConfig, seed: int = 0) -> tuple[list[int], list[int]]:
    """The red of every training and every validation image."""
    data = set_up(config, seed)
    assert data.train is not None and data.validation is not None
    train, validation = ([red(part[i][0]) for i in range(len(part))] for part in (data.train, data.validation))
    return train, validation
