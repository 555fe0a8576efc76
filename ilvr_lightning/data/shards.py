"""The rows of Parquet shards, local or remote, read without keeping anything on the disk."""

import glob
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.sources import Rows, encoded, explain, held_out_rows, image_column, validation_name
from ilvr_lightning.errors import UserError

Encoded = bytes | Path


VALIDATION_ROWS = 1000
"""Rows at most that are validated on; they are read at the start of a run, and stay in memory."""


BUFFER = 2**20
"""Bytes that are read of a column at a time."""


RETRIES = 5
"""Attempts to go on with a remote shard that broke off."""


PAUSE = 1.0
"""Seconds before the first of them; each waits for twice as long."""


class InMemorySource:
    """A few rows in memory, encoded."""

    fingerprint: str | None = None

    def __init__(self, values: Sequence[Encoded], numbers: Sequence[int], name: str) -> None:
        self.values, self.numbers, self.name = values, numbers, name

    def __len__(self) -> int:
        return len(self.values)

    def number(self, row: int) -> int:
        """Of the row in its split."""
        return self.numbers[row]

    def image_bytes(self, row: int) -> Encoded:
        """The encoded image, or the file that holds it."""
        return self.values[row]

    def select(self, rows: Sequence[int]) -> "InMemorySource":
        """Some of the rows, in the order given."""
        return InMemorySource([self.values[row] for row in rows], [self.numbers[row] for row in rows], self.name)


class ParquetSource:
    """The image column of Parquet files, as one split whose rows are counted through them in the order given.

    Args:
        files: paths, or what fsspec opens (hf://...).
        groups: rows of each row group of each file.
        count: so many rows are used, from the first on.
        column: of the images.
        name: of the split.
    """

    fingerprint: str | None = None

    def __init__(self, files: Sequence[str], groups: Sequence[Sequence[int]], count: int, column: str, name: str):
        self.files, self.groups, self.column, self.name = files, groups, column, name
        sizes = np.array([sum(group) for group in groups], dtype=np.int64)
        self.starts = np.cumsum(sizes) - sizes
        self.counts: list[int] = np.clip(count - self.starts, 0, sizes).tolist()

    def __len__(self) -> int:
        return sum(self.counts)

    def number(self, row: int) -> int:
        """Of the row in its split: rows are held out at its end."""
        return row

    def image_bytes(self, row: int) -> Encoded:
        """The encoded image, or the file that holds it; its row group is read for it alone."""
        return next(self._read_range(row, row + 1))

    def select(self, rows: Sequence[int]) -> InMemorySource:
        """Some of the rows, in the order given, read into memory."""
        values: list[Encoded] = []
        chosen = np.asarray(rows, dtype=np.int64)
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            values += self._read_range(int(run[0]), int(run[-1]) + 1) if len(run) else ()
        return InMemorySource(values, chosen.tolist(), self.name)

    def head(self, count: int) -> "ParquetSource":
        """The first rows."""
        return ParquetSource(self.files, self.groups, count, self.column, self.name)

    def _read_range(self, first: int, last: int) -> Iterator[Encoded]:
        for shard, (start, count) in enumerate(zip(self.starts.tolist(), self.counts, strict=True)):
            if max(first, start) < min(last, start + count):
                yield from self.read(shard, max(first, start) - start, min(last, start + count) - start)

    def read(
        self, shard: int, first: int, last: int, pause: Callable[[float], object] | None = None
    ) -> Iterator[Encoded]:
        """Rows of a shard in order; a remote one that breaks off is opened again.

        Args:
            shard: which.
            first: the first row.
            last: the row after the last.
            pause: waits for so many seconds.

        Raises:
            UserError: it cannot be read.
        """
        file, attempt = self.files[shard], 0
        while first < last:
            try:
                for value in self._read_once(shard, first, last):
                    yield value
                    first, attempt = first + 1, 0
                if first < last:
                    raise UserError(f"{file} holds fewer rows than when the run began")
            except UserError:
                raise
            except Exception as error:  # of the network, the Hub, Arrow
                attempt += 1
                if "://" not in file or attempt > RETRIES:
                    raise UserError(f"{file} cannot be read: {_first_line(error)}") from error
                (pause or time.sleep)(PAUSE * 2 ** (attempt - 1))

    def _read_once(self, shard: int, first: int, last: int) -> Iterator[Encoded]:
        with _opened(self.files[shard]) as parquet:
            begin = 0
            for group, count in enumerate(self.groups[shard]):
                row, begin = begin, begin + count
                if begin <= first or row >= last:
                    continue
                for batch in parquet.iter_batches(16, row_groups=[group], columns=[self.column], use_threads=False):
                    start, stop = max(first - row, 0), min(last - row, len(batch))
                    if start < stop:
                        yield from map(encoded, batch.column(0)[start:stop].to_pylist())
                    row += len(batch)


def open_shards(config: DataConfig) -> tuple[ParquetSource, Rows]:
    """The training and the validation rows: the first of a validation split, or the last of the only one, in memory.

    Raises:
        UserError: the data set cannot be had, is no Parquet, has no such split or column, or too few images.
    """
    try:
        splits = _files(config)
        name = validation_name(splits, config)
        train = _shards(splits[config.split], config, config.split)
        if name is not None:
            validation = _shards(splits[name], config, name)
            return train, validation.select(range(min(VALIDATION_ROWS, len(validation))))
        kept = len(train) - min(VALIDATION_ROWS, held_out_rows(len(train), config))
        return train.head(kept), train.select(range(kept, len(train)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(config.path, error)) from error


def _files(config: DataConfig) -> dict[str, list[str]]:
    """The shards of every split, sorted."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said in one line
    path = Path(config.path).expanduser()
    if "://" in config.path:
        found: Any = datasets.load_dataset_builder("parquet", data_files=config.path).config.data_files
    elif glob.has_magic(config.path) or path.is_file():
        found = {"train": glob.glob(str(path), recursive=True)}
    elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        found = {}
    elif path.is_dir():
        found = datasets.load_dataset_builder(str(path), config.name).config.data_files
    elif config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or path.suffix == ".parquet":
        raise UserError(f"data.path={config.path}: there is no such folder or file")
    else:
        found = datasets.load_dataset_builder(config.path, config.name).config.data_files
    splits = {str(split): sorted(map(str, files)) for split, files in (found or {}).items() if files}
    if splits and all(file.endswith(".parquet") for files in splits.values() for file in files):
        return splits
    if path.exists() or glob.has_magic(config.path):
        advice = "leave out data.streaming: what is on this disk is read from where it lies"
    else:
        conversion = (
            f"hf://datasets/{config.path}@refs/convert/parquet/{config.name or 'default'}/{config.split}/*.parquet"
        )
        advice = f"the Hub converts most data sets, of large ones the beginning: try 'data.path={conversion}'"
    raise UserError(f"data.path={config.path} is no Parquet, which data.streaming=true reads; {advice}")


def _shards(files: Sequence[str], config: DataConfig, split: str) -> ParquetSource:
    """The files with their numbers of rows, of which their footers tell."""
    import datasets

    with ThreadPoolExecutor(min(32, max(1, len(files)))) as pool:
        footers = list(pool.map(_footer, files))
    columns = []
    for file, (_, schema) in zip(files, footers, strict=True):
        features = {
            name: datasets.Image() if isinstance(feature, dict) and "bytes" in feature else feature
            for name, feature in datasets.Features.from_arrow_schema(schema).items()
        }
        columns.append(image_column(features, config))
        if columns[-1] != columns[0]:
            raise UserError(
                f"data.image_column must be given: it is {columns[0]} in {files[0]}, {columns[-1]} in {file}"
            )
    groups = [groups for groups, _ in footers]
    return ParquetSource(files, groups, sum(map(sum, groups)), columns[0], f"{Path(config.path).name}/{split}")


def _footer(file: str) -> tuple[list[int], Any]:
    """Rows of each row group, and the schema."""
    import pyarrow as pa

    try:
        with _opened(file) as parquet:
            metadata = parquet.metadata
            return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], parquet.schema_arrow
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is no readable Parquet file: {_first_line(error)}") from error


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A ParquetFile; pages are read as they are needed, rather than whole row groups."""
    import fsspec  # type: ignore[import-untyped]
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        source = stack.enter_context(fsspec.open(file, "rb")) if "://" in file else file
        yield stack.enter_context(pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
