"""Atomic writes: a reader finds the old file or the new one."""

from pathlib import Path

import pytest

from ilvr_lightning.atomic import check_writable, remove_partials, write_atomically
from ilvr_lightning.errors import UserError


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, lambda partial: partial.write_text("new"), durable=durable)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


def test_partial_files_of_a_killed_writer(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    kept = [tmp_path / "a.png", tmp_path / "b.partial"]
    for path in (*kept, tmp_path / ".a.png.7.partial", tmp_path / "sub" / ".a.png.7.partial"):
        path.touch()
    remove_partials(tmp_path, recursive=False)
    assert sorted(tmp_path.glob("*")) == [*kept, tmp_path / "sub"]
    assert len(list(tmp_path.glob("sub/.*"))) == 1
    remove_partials(tmp_path)
    assert not list(tmp_path.glob("sub/.*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "--out")
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out: cannot write to .*file.* give another folder"):
        check_writable(tmp_path / "file" / "folder", "--out")
