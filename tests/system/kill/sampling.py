"""A run of sample.py that is killed and started again, against one that is left alone."""

import functools
import io
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.system.kill.runs import finish, start

Made = dict[str, NDArray[np.int64]]
"""Pictures by name."""


def command(checkpoint: Path, out: Path, *argv: object) -> list[object]:
    """sample.py's, with four steps, on the CPU."""
    return ["sample.py", "--ckpt", checkpoint, "--steps", 4, "--device", "cpu", "--out", out, *argv]


def kill_sampling(checkpoint: Path, out: Path, kind: str, devices: int, kills: int, total: int, seed: int) -> list[str]:
    """Kill a run of `total` pictures so often (by SIGTERM first), each time with another batch size; then let it end.

    Returns:
        A line a kill: how many pictures were there.
    """
    generator, said = random.Random(seed), []
    asked = ("--unconditional", "--num-samples", total, "--format", kind, "--devices", devices)
    there = out if kind == "png" else out / ".pictures"

    def count() -> int:
        return sum(1 for _ in there.glob("unconditional_*"))

    for kill in range(kills):
        until = generator.randrange(total * kill // (kills + 1), total * (kill + 1) // (kills + 1)) + 1
        process = start(*command(checkpoint, out, *asked, "--batch-size", kill % 5 + 1))
        while process.poll() is None and count() < until:
            time.sleep(0.002)
        time.sleep(generator.random() / 20)
        asks = kill == 0  # as a scheduler does before it kills
        os.killpg(process.pid, signal.SIGTERM if asks else signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
        assert process.returncode in ((75,) if asks else (-signal.SIGKILL,)), text
        said.append(f"kill {kill + 1:2}: {count()} of {total} pictures are there")
    before = count()
    text = finish(*command(checkpoint, out, *asked, "--batch-size", 4))
    assert f"{total - before} to make, {before} already there" in text
    return said


def differs(a: Path, b: Path, total: int) -> str | None:
    """What two runs of so many unconditional pictures differ in, beyond 1 of 255; None for nothing."""
    for folder in (a, b):
        if [line["sample"] for line in manifest(folder)] != list(range(total)):
            return f"the manifest of {folder.name}"
        if left := [p.name for p in folder.rglob(".*")]:
            return f"left behind: {left}"
    one, two = made(a), made(b)
    if one.keys() != two.keys():
        return f"the names: {sorted(one.keys() ^ two.keys())[:5]}"
    apart = difference(one, two)
    return f"pictures by {apart} of 255" if apart > 1 else None


def difference(a: Made, b: Made) -> int:
    """The most that two runs are apart; they have the same pictures."""
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


def manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of manifest.jsonl."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def made(folder: Path) -> Made:
    """Every picture that the manifest tells of, from wherever it is; no two under one name."""
    found: Made = {}
    for line in manifest(folder):
        path = folder / line["file"]
        name = path.stem
        if path.suffix == ".npz":
            stem = "unconditional" if line["reference"] is None else f"{line['reference']}_N2"
            name, pixels = f"{stem}_{line['sample']}", _array(path)[line["row"]]
        elif path.suffix == ".parquet":
            row = rows(path)[line["row"]]
            name, pixels = row["name"], np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            assert json.loads(row["recipe"]).items() <= line.items()
        else:
            pixels = np.asarray(Image.open(path))
        assert name not in found
        found[name] = pixels.astype(np.int64)
    return found


def _array(path: Path) -> NDArray[np.uint8]:
    return _loaded(path, path.stat().st_mtime_ns)


@functools.lru_cache(1)
def _loaded(path: Path, changed: int) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = np.load(path)["arr_0"]
    return array


def rows(path: Path) -> Sequence[dict[str, Any]]:
    """Of a Parquet file."""
    return _rows(path, path.stat().st_mtime_ns)


@functools.lru_cache(4)
def _rows(path: Path, changed: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
