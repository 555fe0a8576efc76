"""What a run of sample.py leaves: PNGs, a data set in Parquet, or one array for ADM's evaluator.

Every picture is a PNG with its recipe first, written whole: whatever stops a run, what it made is found again. Parquet
and npz are packed from them at the end.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ilvr_lightning.errors import UserError
from ilvr_lightning.images import BrokenImageError, Pixels, read_image, to_image, to_pixels
from ilvr_lightning.jobs import Job, Jobs, trajectory_files
from ilvr_lightning.manifest import Entry, entries_of
from ilvr_lightning.recipe import Recipe, read_recipe, recipe_info
from ilvr_lightning.whole import write_safely, write_whole

Format = Literal["png", "parquet", "npz"]
Indices = NDArray[np.int64]
FLAT = 5000
"""A run of more pictures than these puts them into subfolders."""
SHARD, ROW_GROUP = 500, 100
"""Pictures of a Parquet file, and how many of them are in memory at a time."""
STAGED = ".pictures"
"""Where pictures wait to be packed."""
HASHED, ELSEWHERE = 1, 2
"""A picture's name, with a hash of its recipe; where a run of another size would have put it."""
DIGEST_KEY = b"ilvr_lightning"
"""Of a Parquet file's metadata: which pictures it holds."""
PARTIAL = re.compile(r"\.(.+\.(png|webp)\.(?P<writer>\d+)|manifest\.jsonl|samples_.+\.npz|train-.+\.parquet)\.partial")
SUBFOLDER = re.compile(r"\d{5}|[0-9a-f]{2}")


class Made(NamedTuple):
    """A picture that is there."""

    number: int
    path: Path
    recipe: Recipe


class Output(Protocol):
    """Where the pictures of a run go."""

    pictures: "Pictures"

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
    if format == "png":
        return Pictures(jobs, folder, overwrite, trajectory)
    return Parquet(jobs, folder, overwrite) if format == "parquet" else Npz(jobs, folder, shape, overwrite)


class Pictures:
    """A PNG a picture, with its recipe.

    A name that a picture of another recipe has taken gets a short hash of the new recipe. Large runs put the
    unconditional pictures into folders of a thousand, others into 256 folders by a hash of their name: what a picture
    is called does not depend on the order of the references.
    """

    def __init__(self, jobs: Jobs, folder: Path, overwrite: bool = False, trajectory: bool = False) -> None:
        self.pictures = self
        self.jobs, self.folder, self.overwrite, self.trajectory = jobs, folder, overwrite, trajectory
        self.where = str(folder)
        self._large = len(jobs) > FLAT
        self._chosen = bytearray(len(jobs))  # which of its possible names each picture has
        self._folders: set[str] = set()

    def todo(self) -> Indices:
        return self.todo_of(np.arange(len(self.jobs)))

    def todo_of(self, indices: Indices) -> Indices:
        """Those of some pictures that are not there yet."""
        self._folders = _subfolders(self.folder)
        if self.overwrite or not self._folders:
            return indices
        return np.fromiter((i for i in indices.tolist() if not self._find(i)), np.int64)

    def meets_others(self) -> bool:
        """Whether pictures of other recipes have names that these would have."""
        return any(choice & HASHED for choice in set(self._chosen))

    def job(self, index: int) -> Job:
        """A picture to make, with the file that it goes to.

        Raises:
            UserError: its reference cannot be used.
        """
        job = self.jobs[index]
        return replace(job, file=self._file(index, self._chosen[index], job))

    def write(self, job: Job, pixels: Pixels, recipe: Recipe) -> Path:
        """Write a picture (H, W, C); returns its file."""
        path = self.folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, functools.partial(to_image(pixels).save, format="PNG", pnginfo=recipe_info(recipe)))
        return path

    def read(self, index: int) -> Made | None:
        """A picture, or None where it is missing."""
        try:
            path = self.folder / self._file(index, self._chosen[index])
        except UserError:
            return None
        recipe = read_recipe(path)
        return None if recipe is None or not self.jobs.fits(index, recipe) else Made(index, path, recipe)

    def made(self, indices: Iterable[int]) -> Iterator[Made | None]:
        """Every picture of some, once; None for one that is missing, nothing for one that cannot be made."""
        told: set[Path] = set()
        for index in indices:
            made = self.read(index)
            if made is None:
                if self.jobs.is_usable(index):
                    yield None
            elif not self.jobs.shares_stem(index):
                yield made
            elif made.path not in told:  # equal pictures of one name share their file
                told.add(made.path)
                yield made

    def entry(self, made: Made) -> Entry:
        """Its line in the manifest."""
        return {"file": made.path.relative_to(self.folder).as_posix(), **vars(made.recipe)}

    def pack(self, rank: int, world: int) -> None:
        """Nothing: they are where they belong."""

    def entries(self) -> Iterator[Entry | None]:
        return (made and self.entry(made) for made in self.made(range(len(self.jobs))))

    def finish(self, whole: bool) -> None:
        """Nothing."""

    def _find(self, index: int) -> bool:
        """Choose a picture's name; whether it is there."""
        taken = False
        for elsewhere in (0, ELSEWHERE):
            if self._subfolder(index, elsewhere) not in self._folders:
                continue
            for hashed in (0, HASHED):
                try:
                    path = self.folder / self._file(index, elsewhere | hashed)
                except UserError:
                    break
                if not path.exists():
                    break
                recipe = read_recipe(path)
                if recipe is not None and self.jobs.is_of(index, recipe):
                    self._chosen[index] = elsewhere | hashed
                    drawn = all(p.is_file() and p.stat().st_size for p in trajectory_files(path))
                    return drawn or not self.trajectory
                if hashed or (recipe is None and _is_broken(path)):
                    break
                taken = taken or not elsewhere
        self._chosen[index] = HASHED if taken else 0
        return False

    def _file(self, index: int, choice: int, job: Job | None = None) -> str:
        stem, folder = self.jobs.stem(index), self._subfolder(index, choice)
        if choice & HASHED or self.jobs.shares_stem(index):
            stem += f"_{(job or self.jobs[index]).recipe.digest[:8]}"
        return f"{folder}/{stem}.png" if folder else f"{stem}.png"

    def _subfolder(self, index: int, choice: int) -> str:
        if self._large == bool(choice & ELSEWHERE):
            return ""
        if len(self.jobs.references):
            return f"{zlib.crc32(self.jobs.stem(index).encode()) % 256:02x}"
        return f"{index // 1000:05d}"


def _subfolders(folder: Path) -> set[str]:
    """Those that may hold pictures, "" for the folder itself."""
    found: set[str] = set()
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if SUBFOLDER.fullmatch(entry.name):
            found.add(entry.name)
        elif entry.name.endswith(".png"):
            found.add("")
    return found


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed have left half-written."""
    places = [folder, folder / "references", folder / "data", folder / STAGED]
    places += [top / name for top in (folder, folder / STAGED) for name in _subfolders(top)]
    for path in {p for place in places for p in place.glob(".*.partial")}:
        name = PARTIAL.fullmatch(path.name)
        if name and not _is_running(int(name["writer"] or 0)):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether another process has this number."""
    if process in (0, os.getpid()):
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _is_broken(path: Path) -> bool:
    try:
        read_image(path)
    except BrokenImageError:
        return True
    return False


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
                write_safely(self._path(shard), functools.partial(_write_shard, made=whole))

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
            write_safely(path, self._write)
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
