"""What a run of sample.py leaves: PNGs, a data set in Parquet, or one array for ADM's evaluator.

Every picture is a PNG with its recipe first, written whole: whatever stops a run, what it made is found again. Parquet
and npz are packed from them at the end.
"""

import functools
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import read_image, to_pixels
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.manifest import Entry, entries_of
from ilvr_lightning.sampling.pictures import STAGED, Indices, Made, Pictures
from ilvr_lightning.sampling.recipe import Recipe, read_recipe
from ilvr_lightning.sampling.requests import Jobs

Format = Literal["png", "parquet", "npz"]


SHARD, ROW_GROUP = 500, 100
"""Pictures of a Parquet file, and how many of them are in memory at a time."""


DIGEST_KEY = b"ilvr_lightning"
"""Of a Parquet file's metadata: which pictures it holds."""


class Output(Protocol):
    """Where the pictures of a run go."""

    pictures: Pictures

    @property
    def where(self) -> str:
        """For the last line on the terminal."""

    def todo(self) -> Indices:
        """The pictures that are not there yet, in order.

        Raises:
            UserError: what is there is of another run, and does not go together with this one.
        """

    def pack(self, rank: int, world: int) -> None:
        """Once all are written: this rank's part of what they are packed into."""

    def entries(self) -> Iterator[Entry | None]:
        """The manifest's lines, in order; None for a picture that is missing, nothing for one that cannot be made."""

    def finish(self, whole: bool) -> None:
        """Once the manifest is written, on one rank; whole: no picture is missing."""


def make_output(
    format: Format, jobs: Jobs, folder: Path, shape: tuple[int, int, int], overwrite: bool, trajectory: bool = False
) -> Output:
    """The output of a format.

    Args:
        format: its name.
        jobs: the pictures.
        folder: where they go.
        shape: (C, H, W) of one.
        overwrite: what is there is made again.
        trajectory: a picture is there once its steps are drawn, too.
    """
    if not overwrite:
        _check_alone(folder, format)
    if format == "png":
        return Pictures(jobs, folder, overwrite, trajectory)
    return Parquet(jobs, folder, overwrite) if format == "parquet" else Npz(jobs, folder, shape, overwrite)


def _check_alone(folder: Path, format: Format) -> None:
    """Raise a UserError where a folder holds pictures in another format: readers would find some of them."""
    pngs = islice(chain(folder.glob("*.png"), folder.glob("[0-9a-f][0-9a-f]*/*.png")), 100)
    others: dict[Format, Iterator[Path]] = {
        "png": (path for path in pngs if read_recipe(path) is not None),
        "parquet": folder.glob("data/train-*-of-*.parquet"),
        "npz": folder.glob("samples_*x3.npz"),
    }
    for other, found in others.items():
        if other != format and (path := next(found, None)) is not None:
            raise UserError(f"--out: {folder} holds {path.name}; give --format {other}, another --out, or --overwrite")


class Parquet:
    """A Hugging Face data set: data/train-00000-of-00100.parquet and so on, SHARD pictures each, in order."""

    def __init__(self, jobs: Jobs, folder: Path, overwrite: bool = False) -> None:
        self.jobs, self.folder, self.overwrite = jobs, folder, overwrite
        self.pictures = Pictures(jobs, folder / STAGED, overwrite)
        self.count = -(-len(jobs) // SHARD)
        self.where = f"{folder / 'data'}, {self.count} Parquet files: datasets.load_dataset({str(folder)!r})"
        self._unpacked: list[int] = []

    def todo(self) -> Indices:
        there = set() if self.overwrite else {p.name for p in (self.folder / "data").glob("*.parquet")}
        if strange := there - {self._path(shard).name for shard in range(self.count)}:
            raise _of_another_run(self.folder / "data" / min(strange))
        for shard in range(self.count):
            path = self._path(shard)
            if path.name not in there or (found := _shard_digest(path)) is None:
                self._unpacked.append(shard)
            elif found != _digest(self.jobs[i].recipe for i in self._indices(shard) if self.jobs.is_usable(i)):
                raise _of_another_run(path)
        indices = [np.asarray(self._indices(shard)) for shard in self._unpacked]
        return _staged(self.pictures, np.concatenate(indices)) if indices else np.arange(0)

    def pack(self, rank: int, world: int) -> None:
        if rank == 0:  # what --overwrite takes the place of
            ours = {self._path(shard) for shard in range(self.count)}
            for path in set((self.folder / "data").glob("*.parquet")) - ours:
                path.unlink()
        for shard in self._unpacked[rank::world]:
            made = list(self.pictures.made(self._indices(shard)))
            whole = [each for each in made if each is not None]
            if len(whole) == len(made):
                (self.folder / "data").mkdir(exist_ok=True)
                write_atomically(self._path(shard), functools.partial(_write_shard, made=whole), durable=True)

    def entries(self) -> Iterator[Entry | None]:
        import pyarrow.parquet as pq

        for shard in range(self.count):
            path = self._path(shard)
            if not path.exists():
                yield from (made and self._entry(made) for made in self.pictures.made(self._indices(shard)))
                continue
            file = path.relative_to(self.folder).as_posix()
            for row, recipe in enumerate(pq.read_table(path, columns=["recipe"])["recipe"].to_pylist()):
                yield {"file": file, "row": row, **json.loads(recipe)}

    def finish(self, whole: bool) -> None:
        if whole:
            shutil.rmtree(self.pictures.folder, ignore_errors=True)

    def _entry(self, made: Made) -> Entry:
        return {**self.pictures.entry(made), "file": made.path.relative_to(self.folder).as_posix()}

    def _indices(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self.jobs)))

    def _path(self, shard: int) -> Path:
        return self.folder / "data" / f"train-{shard:05d}-of-{self.count:05d}.parquet"


def _staged(pictures: Pictures, indices: Indices) -> Indices:
    """What is to be made before it is packed, where no other run is under way."""
    todo = pictures.todo_of(indices)
    if pictures.meets_others():
        raise UserError(
            f"--out: {pictures.folder} holds pictures of a run with other settings that did not end; run its command "
            "again, or give another --out, or --overwrite"
        )
    return todo


def _of_another_run(path: Path) -> UserError:
    return UserError(
        f"--out: {path} is of a run with other settings or another number of pictures; give another --out, or "
        "--overwrite"
    )


def _digest(recipes: Iterable[Recipe]) -> str:
    """Equal for equal pictures in equal order, each counted once."""
    return hashlib.sha256("".join(dict.fromkeys(recipe.digest for recipe in recipes)).encode()).hexdigest()


def _shard_digest(path: Path) -> str | None:
    """What a Parquet file says of its pictures, or None where it is none of ours, or damaged."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pyarrow.ArrowException):
        return None
    return str(metadata.get(DIGEST_KEY, b"").decode())


def _write_shard(path: Path, made: list[Made]) -> None:
    """A Parquet file of pictures as they are, a row group in memory at a time."""
    import datasets
    import pyarrow
    import pyarrow.parquet as pq

    words = {name: datasets.Value("string") for name in ("name", "reference", "reference_sha256", "recipe")}
    numbers = {name: datasets.Value("int64") for name in ("seed", "sample")}
    schema = datasets.Features({"image": datasets.Image(), **words, **numbers}).arrow_schema
    schema = schema.with_metadata({**schema.metadata, DIGEST_KEY: _digest(each.recipe for each in made)})
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for start in range(0, len(made), ROW_GROUP):
            rows = [
                {
                    "image": {"bytes": picture.read_bytes(), "path": picture.name},
                    "name": picture.stem,
                    "reference": recipe.reference,
                    "reference_sha256": recipe.reference_sha256,
                    "recipe": json.dumps(vars(recipe)),
                    "seed": recipe.seed,
                    "sample": recipe.sample,
                }
                for _, picture, recipe in made[start : start + ROW_GROUP]
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


class Npz:
    """One array for ADM's evaluator: arr_0 (N, H, W, 3) in samples_NxHxWx3.npz, grey repeated; recipes by digest."""

    def __init__(self, jobs: Jobs, folder: Path, shape: tuple[int, int, int], overwrite: bool = False) -> None:
        self.jobs, self.folder, self.overwrite = jobs, folder, overwrite
        self.pictures = Pictures(jobs, folder / STAGED, overwrite)
        self._size = shape[1:]
        self._made = np.arange(0)
        self._done: Path | None = None

    @property
    def where(self) -> str:
        return str(self._done or self._path(len(self._made)))

    def todo(self) -> Indices:
        height, width = self._size
        there = [] if self.overwrite else list(self.folder.glob(f"samples_*x{height}x{width}x3.npz"))
        if there:
            usable = (i for i in range(len(self.jobs)) if self.jobs.is_usable(i))
            wanted = np.fromiter((_short(self.jobs[i].recipe) for i in usable), np.uint64)
            for path in there:
                found = _digests_in(path)
                if found is not None and np.array_equal(found, wanted):
                    self._done = path
                    return np.arange(0)
                if found is not None and path == self._path(len(wanted)):
                    raise _of_another_run(path)
        return _staged(self.pictures, np.arange(len(self.jobs)))

    def pack(self, rank: int, world: int) -> None:
        if rank == 0 and self._done is None:
            made = self.pictures.made(range(len(self.jobs)))
            self._made = np.fromiter((-1 if each is None else each.number for each in made), np.int64)

    def entries(self) -> Iterator[Entry | None]:
        if self._done is not None:
            yield from entries_of(self.folder, self._done.name)
            return
        file = self._path(len(self._made)).name
        for row, made in enumerate(self._read()):
            yield made and {"file": file, "row": row, **vars(made.recipe)}

    def finish(self, whole: bool) -> None:
        if not whole:
            return
        if self._done is None:  # the manifest is there before the file that makes the run done
            path = self._path(len(self._made))
            write_atomically(path, self._write, durable=True)
            self._done = path
        shutil.rmtree(self.pictures.folder, ignore_errors=True)

    def _path(self, count: int) -> Path:
        height, width = self._size
        return self.folder / f"samples_{count}x{height}x{width}x3.npz"

    def _read(self) -> Iterator[Made | None]:
        return (None if index < 0 else self.pictures.read(index) for index in self._made.tolist())

    def _write(self, partial: Path) -> None:
        digests = np.zeros(len(self._made), np.uint64)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self._made), *self._size, 3)}
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for row, made in enumerate(self._read()):
                    if made is None:
                        raise UserError(
                            f"a picture has vanished from {self.pictures.folder}; run the same command again"
                        )
                    file.write(to_pixels(read_image(made.path)).tobytes())
                    digests[row] = _short(made.recipe)
            with archive.open("digests.npy", "w") as file:
                np.lib.format.write_array(file, digests)


def _short(recipe: Recipe) -> int:
    return int(recipe.digest[:16], 16)


def _digests_in(path: Path) -> NDArray[np.uint64] | None:
    """Which pictures an npz of ours holds; none if it does not say, None where it is damaged."""
    try:
        with np.load(path) as archive:
            return np.asarray(archive["digests"], np.uint64)
    except KeyError:
        return np.zeros(0, np.uint64)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
