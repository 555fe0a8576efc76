"""metadata.jsonl, the index of a folder of samples: its columns, and how it is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "metadata.jsonl"
"""The index's name, which the imagefolder of Hugging Face's datasets looks for."""
COLUMNS = {
    "file_name": str, "reference": str, "seed": int, "sample": int, "factor": int, "condition_from": int,
    "condition_to": int, "recipe": str,
}  # fmt: skip
"""The columns of the index, each of one type. An unconditional image has an empty reference, factor 0 and range 0:0."""


def count_lines(folder: Path) -> int:
    """The number of lines of a folder's index, which is that of its images where sample.py wrote it."""
    with open(folder / INDEX, "rb") as lines:
        return sum(1 for _ in lines)


def listed_images(folder: Path) -> Iterator[dict[str, Any]]:
    """The line of each image that a folder's index lists, once; not what lies outside the folder or lacks a column."""
    index = folder / INDEX
    if not index.is_file():
        return
    listed: set[int] = set()  # hashes: an index may have millions of lines
    with open(index, errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in COLUMNS.items()):
                name = entry["file_name"]
                if hash(name) not in listed and not {"", ".", ".."} & set(name.split("/")):
                    listed.add(hash(name))
                    yield entry
