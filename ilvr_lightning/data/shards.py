"""The images of Parquet shards, local or remote, read without keeping anything on the disk."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.image_source import Encoded, ImageSource, image_bytes_of, image_column
from ilvr_lightning.data.sources import SOURCES, count_to_hold_out, explain_errors, locate, validation_split
from ilvr_lightning.errors import UserError, first_line

MAX_VALIDATION_ROWS = 1000
"""Up to so many rows are validated on; they are read at the start of a run and stay in memory."""

BUFFER_BYTES = 2**20
"""So many bytes of a column are read at a time."""

MAX_RETRIES = 5
"""A remote shard whose connection breaks off is opened again up to so many times in a row."""

RETRY_SECONDS = 1.0
"""The wait before the first retry; each further one waits for twice as long."""

FOOTER_THREADS = 32
"""Up to so many threads read the footers of shards when a data set is opened."""


class ParquetSource(ImageSource):
    """The image column of Parquet files, as one split whose rows are counted through the files in the order given.

    Args:
        files: paths, or URLs that fsspec opens (hf://...).
        group_sizes: the rows of each row group of each file.
        count: the first so many rows are used.
        column: the column of the images.
        name: what messages call the split.
    """

    def __init__(
        self, files: Sequence[str], group_sizes: Sequence[Sequence[int]], count: int, column: str, name: str
    ) -> None:
        self.files, self.group_sizes, self.column = files, group_sizes, column
        sizes = np.array([sum(group) for group in group_sizes], dtype=np.int64)
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
        return ParquetSource(self.files, self.group_sizes, count, self.column, self.name)

    def _read_range(self, first: int, end: int) -> Iterator[Encoded]:
        for shard, (start, count) in enumerate(zip(self.starts.tolist(), self.counts, strict=True)):
            if max(first, start) < min(end, start + count):
                yield from self.read_shard(shard, max(first, start) - start, min(end, start + count) - start)

    def read_shard(
        self, shard: int, first: int, end: int, wait: Callable[[float], object] = time.sleep
    ) -> Iterator[Encoded]:
        """Rows of a shard in order; a remote shard whose connection breaks off is opened again.

        Args:
            shard: the number of the file.
            first: the first row.
            end: the row after the last.
            wait: waits for so many seconds before a retry.

        Raises:
            UserError: the shard cannot be read.
        """
        file, attempt = self.files[shard], 0
        while first < end:
            try:
                for image in self._read_once(shard, first, end):
                    yield image
                    first, attempt = first + 1, 0
                if first < end:
                    raise UserError(f"{file} holds fewer rows than when the run began")
            except UserError:
                raise
            except Exception as error:  # of the network, the Hub, Arrow
                attempt += 1
                if "://" not in file or attempt > MAX_RETRIES:
                    raise UserError(f"{file} cannot be read: {first_line(error)}") from error
                wait(RETRY_SECONDS * 2 ** (attempt - 1))

    def _read_once(self, shard: int, first: int, end: int) -> Iterator[Encoded]:
        with _open_parquet(self.files[shard]) as parquet:
            group_end = 0
            for group, size in enumerate(self.group_sizes[shard]):
                row, group_end = group_end, group_end + size
                if group_end <= first or row >= end:
                    continue
                for batch in parquet.iter_batches(16, row_groups=[group], columns=[self.column], use_threads=False):
                    start, stop = max(first - row, 0), min(end - row, len(batch))
                    if start < stop:
                        yield from map(image_bytes_of, batch.column(0)[start:stop].to_pylist())
                    row += len(batch)


def open_shards(config: DataConfig) -> tuple[ParquetSource, ImageSource]:
    """The images to train on, and those to validate on in memory: the first of another split, or the last of the only.

    Raises:
        UserError: the data set cannot be opened, is not Parquet, has no such split or column, or too few images.
    """
    with explain_errors(config):
        found = locate(config).files(config)
        files = {str(split): sorted(map(str, names)) for split, names in found.items() if names}
        if not files or not all(name.endswith(".parquet") for names in files.values() for name in names):
            raise UserError(_no_parquet_message(config))
        name = validation_split(files, config)
        train = _parquet_source(files, config.split, config)
        if name is not None:
            validation = _parquet_source(files, name, config)
            return train, validation.load(range(min(MAX_VALIDATION_ROWS, len(validation))))
        kept = len(train) - min(MAX_VALIDATION_ROWS, count_to_hold_out(len(train), config))
        return train.take(kept), train.load(range(kept, len(train)))


def _no_parquet_message(config: DataConfig) -> str:
    advice = "leave out data.streaming: what is on this disk is read from where it lies"
    if locate(config) is SOURCES["Hub"]:
        converted = (
            f"hf://datasets/{config.path}@refs/convert/parquet/{config.name or 'default'}/{config.split}/*.parquet"
        )
        advice = f"the Hub converts most data sets, and of large ones the beginning: try 'data.path={converted}'"
    return f"data.streaming=true needs Parquet files, and data.path={config.path} has none; {advice}"


def _parquet_source(files: Mapping[str, Sequence[str]], split: str, config: DataConfig) -> ParquetSource:
    """The shards of a split with their numbers of rows, which stand in their footers."""
    import datasets

    shards = files[split]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(_read_footer, shards))
    columns = []
    for shard, (_, schema) in zip(shards, footers, strict=True):
        features = {
            name: datasets.Image() if isinstance(feature, dict) and "bytes" in feature else feature
            for name, feature in datasets.Features.from_arrow_schema(schema).items()
        }
        columns.append(image_column(features, config))
        if columns[-1] != columns[0]:
            raise UserError(
                f"data.image_column must be given: it is {columns[0]} in {shards[0]}, {columns[-1]} in {shard}"
            )
    sizes = [sizes for sizes, _ in footers]
    return ParquetSource(shards, sizes, sum(map(sum, sizes)), columns[0], f"{Path(config.path).name}/{split}")


def _read_footer(file: str) -> tuple[list[int], Any]:
    """The rows of each row group, and the schema."""
    import pyarrow as pa

    try:
        with _open_parquet(file) as parquet:
            metadata = parquet.metadata
            return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], parquet.schema_arrow
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is no readable Parquet file: {first_line(error)}") from error


@contextmanager
def _open_parquet(file: str) -> Iterator[Any]:
    """A ParquetFile; pages are read as they are needed, rather than row groups at once."""
    import fsspec  # type: ignore[import-untyped]
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        source = stack.enter_context(fsspec.open(file, "rb")) if "://" in file else file
        yield stack.enter_context(pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False))
