"""manifest.jsonl, one line a picture: a file a rank while a run goes on, one file in order at its end."""

import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_lightning.atomic import write_atomically

NAME = "manifest.jsonl"


Entry = dict[str, Any]
"""A recipe, with the file that holds its picture, and the row where that holds several."""


class RankManifest:
    """What a rank has written so far.

    Args:
        folder: of the run.
        rank: whose.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = rank_path(folder, rank)
        with open(self.path, "ab+", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line, of a run that was killed
                    file.write(b"\n")

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, all at once."""
        with open(self.path, "ab", buffering=0) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())


def rank_path(folder: Path, rank: int) -> Path:
    """A rank's file."""
    return folder / f".manifest-{rank}.jsonl"


def rank_paths(folder: Path) -> list[Path]:
    """What the ranks of this run, and of runs that were killed, have left."""
    return sorted(folder.glob(".manifest-*.jsonl"))


class Growth:
    """The lines that are added to files from now on, counted as they come, twice a second at most."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places = {path: path.stat().st_size if path.exists() else 0 for path in paths}
        self._lines, self._looked = 0, 0.0

    def lines(self) -> int:
        """How many there are by now."""
        if time.perf_counter() - self._looked < 0.5:
            return self._lines
        self._looked = time.perf_counter()
        for path, place in self._places.items():
            if path.exists() and path.stat().st_size > place:
                with open(path, "rb") as file:
                    file.seek(place)
                    new = file.read()
                self._places[path] += len(new)
                self._lines += new.count(b"\n")
        return self._lines


def merge(folder: Path, entries: Iterator[Entry]) -> int:
    """Write manifest.jsonl anew: a run's entries in their order, then what other runs in this folder made and kept.

    Half lines, and lines of pictures that are not there, are left out; the ranks' own files are removed.

    Returns:
        How many entries the run has.
    """
    path, parts = folder / NAME, rank_paths(folder)
    keys = array("q")

    def is_kept(file: str) -> bool:
        return not file.startswith(".") and os.path.exists(folder / file)

    def write(partial: Path) -> None:
        with open(partial, "w") as out:
            for entry in entries:
                keys.append(_key(entry))
                out.write(json.dumps(entry) + "\n")
            known = np.sort(np.frombuffer(keys, np.int64))
            told: set[int] = set()
            for line, entry in _lines([path, *parts]):
                key = _key(entry)
                place = int(np.searchsorted(known, key))
                ours = place < len(known) and known[place] == key
                if not ours and key not in told and is_kept(entry["file"]):
                    told.add(key)
                    out.write(line)

    write_atomically(path, write, durable=True)
    for part in parts:
        part.unlink(missing_ok=True)
    return len(keys)


def entries_of(folder: Path, file: str) -> Iterator[Entry]:
    """The lines of manifest.jsonl about one file."""
    return (entry for _, entry in _lines([folder / NAME]) if entry["file"] == file)


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, Entry]]:
    """Every whole line, and what it says."""
    for path in paths:
        if not path.is_file():
            continue
        with open(path, errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    if line.endswith("\n") and isinstance(entry["file"], str):
                        yield line, entry
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue


def _key(entry: Entry) -> int:
    """Equal for lines about one picture."""
    return hash((entry["file"], entry.get("row")))
