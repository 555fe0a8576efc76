"""The images of Parquet shards, local or remote, read without keeping anything on the disk."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.sources import (
    count_to_hold_out,
    explain_errors,
    image_bytes_of,
    image_column,
    locate,
    validation_split,
)
from ilvr_lightning.errors import UserError, first_line

MAX_VALIDATION_ROWS = 1000
"""Up to so many rows are validated on; they are read at the start of a run and stay in memory."""

BUFFER_BYTES = 2**20
"""So many bytes of a column are read at a time."""

FOOTER_THREADS = 32
"""Up to so many threads read the footers of shards when a data set is opened."""


class ParquetSource(ImageSource):
    """The image column of Parquet files, as one split whose rows are counted through the files in the order given.

    Args:
        files: paths, or URLs that fsspec opens (hf://...).
        sizes: the rows of each file.
        groups: the row groups of all files together.
        count: the first so many rows are used.
        column: the column of the images.
        name: what messages call the split.
    """

    def __init__(
        self, files: Sequence[str], sizes: Sequence[int], groups: int, count: int, column: str, name: str
    ) -> None:
        self.files, self.sizes, self.groups, self.column = files, sizes, groups, column
        self.starts = np.cumsum(sizes) - sizes
        self.counts: list[int] = np.clip(count - self.starts, 0, sizes).tolist()
        """The rows of each file that are used."""
        super().__init__(name, lambda row: next(self._read_range(row, row + 1)), range(count))

    def load(self, rows: range) -> ImageSource:
        """Some consecutive rows, read into memory."""
        images = dict(zip(rows, self._read_range(rows.start, rows.stop), strict=True))
        return ImageSource(self.name, images.__getitem__, rows)

    def take(self, count: int) -> "ParquetSource":
        """The first so many rows."""
        return ParquetSource(self.files, self.sizes, self.groups, count, self.column, self.name)

    def _read_range(self, first: int, end: int) -> Iterator[bytes | Path]:
        for shard, (start, count) in enumerate(zip(self.starts.tolist(), self.counts, strict=True)):
            if max(first, start) < min(end, start + count):
                yield from self.read_shard(shard, max(first, start) - start, min(end, start + count) - start)

    def read_shard(self, shard: int, first: int, end: int) -> Iterator[bytes | Path]:
        """Rows of a shard in order.

        Args:
            shard: the number of the file.
            first: the first row.
            end: the row after the last.

        Raises:
            UserError: the shard cannot be read.
        """
        file = self.files[shard]
        try:
            with _open_parquet(file) as parquet:
                metadata = parquet.metadata
                group_ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
                group = bisect_right(group_ends, first)
                row, groups = (group_ends[group - 1] if group else 0), range(group, len(group_ends))
                for batch in parquet.iter_batches(16, row_groups=groups, columns=[self.column], use_threads=False):
                    yield from map(image_bytes_of, batch.column(0)[max(first - row, 0) : end - row].to_pylist())
                    row += len(batch)
                    if row >= end:
                        return
                raise EOFError("it holds fewer rows than when the run began")
        except Exception as error:  # of the network, the Hub, Arrow
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def open_shards(config: DataConfig) -> tuple[ParquetSource, ImageSource]:
    """The images to train on, and those to validate on in memory: the first of another split, or the last of the only.

    Raises:
        UserError: the data set cannot be opened, is not Parquet, has no such split or column, or too few images.
    """
    with explain_errors(config):
        opened = locate(config).open(config)
        found = {} if isinstance(opened, Mapping) else opened.config.data_files or {}
        files = {str(split): sorted(map(str, names)) for split, names in found.items() if names}
        if not files or not all(name.endswith(".parquet") for names in files.values() for name in names):
            raise UserError(
                f"data.streaming=true needs Parquet files, and data.path={config.path} has none; leave out "
                "data.streaming, or give the Hub's conversion of the data set (docs/streaming.md)"
            )
        name = validation_split(files, config)
        train = _parquet_source(files, config.split, config)
        if name is not None:
            validation = _parquet_source(files, name, config)
            return train, validation.load(range(min(MAX_VALIDATION_ROWS, len(validation))))
        kept = len(train) - min(MAX_VALIDATION_ROWS, count_to_hold_out(len(train), config))
        return train.take(kept), train.load(range(kept, len(train)))


def _parquet_source(files: Mapping[str, Sequence[str]], split: str, config: DataConfig) -> ParquetSource:
    """The shards of a split with their numbers of rows, which stand in their footers."""
    shards = files[split]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(_read_footer, shards))
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    features = {
        name: datasets.Image() if isinstance(feature, dict) and "bytes" in feature else feature
        for name, feature in datasets.Features.from_arrow_schema(schemas[0]).items()
    }
    column = image_column(features, config)
    for shard, schema in zip(shards, schemas, strict=True):
        if column not in schema.names:
            raise UserError(f"data.image_column={column} is in {shards[0]}, but not in {shard}")
    sizes = [footer.num_rows for footer in footers]
    groups = sum(footer.num_row_groups for footer in footers)
    return ParquetSource(shards, sizes, groups, sum(sizes), column, f"{Path(config.path).name}/{split}")


def _read_footer(file: str) -> Any:
    """The metadata of a Parquet file."""
    try:
        with _open_parquet(file) as parquet:
            return parquet.metadata
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} cannot be read as a Parquet file: {first_line(error)}") from error


@contextmanager
def _open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose pages are read as they are needed; `datasets` tries again where a connection breaks off."""
    opened = xopen(file, "rb") if "://" in file else nullcontext(file)
    with opened as source, pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
        yield parquet
