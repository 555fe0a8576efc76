"""What several tests of this room read: a folder of classes, a set with a broken image, a data set on the Hub."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem  # type: ignore[import-untyped]

from tests.support.image_sets import Hub, png, table, write_shards


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Make every data set on the Hub have these files by split; to download one is a failure."""

    def make(files: dict[str, list[str]]) -> None:
        builder = SimpleNamespace(config=SimpleNamespace(data_files=files))  # which has no download_and_prepare
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)

    return make


@pytest.fixture
def on_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of a data set of five shards, which the Hub lists in another order."""
    write_shards("memory://set")

    def opened(self: MemoryFileSystem, path: str, *_: object, **__: object) -> MemoryFile:
        return MemoryFile(self, path, self.store[path].getvalue())  # with a position of its own

    monkeypatch.setattr(MemoryFileSystem, "_open", opened)
    files = [f"memory://{path}" for path in fsspec.filesystem("memory").glob("/set/*.parquet")]
    hub({"train": files[::-1]})
    return files


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """An ImageFolder: cats are 0 to 4, dogs 100 to 104."""
    for i, name in itertools.product(range(5), ("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name / f"{i}.png").write_bytes(png(i + 100 * (name == "dog")))
    return tmp_path / "pets"


@pytest.fixture
def one_broken(tmp_path: Path) -> Path:
    """Five training rows, of which row 2 is cut short, and two for validation."""
    rows = [{"bytes": png(i)[: 20 if i == 2 else None], "path": None} for i in range(5)]
    broken = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    broken.to_parquet(tmp_path / "train.parquet")
    table(2, first=50).to_parquet(tmp_path / "test.parquet")
    return tmp_path
