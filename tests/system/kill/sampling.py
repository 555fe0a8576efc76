"""A run of sample.py that is killed and started again, against one that is left alone."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np

from tests.support.samples import difference, flags, images, index, leftovers, listed, pixels
from tests.system.kill.runs import finish, start


def command(checkpoint: Path, out: Path, *argv: object) -> list[object]:
    """sample.py's, with four steps, on the CPU."""
    return ["sample.py", *flags(checkpoint, out, *argv)]


def kill_sampling(checkpoint: Path, out: Path, kind: str, devices: int, kills: int, total: int, seed: int) -> list[str]:
    """Kill a run of `total` images so often (by SIGTERM first), each time with another batch size; then let it end.

    Returns:
        A line per kill: how many images were there.
    """
    generator, said = random.Random(seed), []
    asked = ("--unconditional", "--num-samples", total, "--format", kind, "--devices", devices)

    def count() -> int:
        return sum(1 for _ in out.rglob("unconditional_*.png"))

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
        said.append(f"kill {kill + 1:2}: {count()} of {total} images are there")
    before = count()
    text = finish(*command(checkpoint, out, *asked, "--batch-size", 4))
    assert f"{total - before} to make, {before} already there" in text
    return said


def differs(a: Path, b: Path, total: int) -> str | None:
    """What two runs of so many unconditional images differ in, beyond 1 of 255; None for nothing."""
    for folder in (a, b):
        if [line["sample"] for line in index(folder)] != list(range(total)):
            return f"the index of {folder.name}"
        if left := leftovers(folder):
            return f"left behind: {left}"
        for path in folder.glob("*.npz"):
            with np.load(path) as archive:
                packed = archive["arr_0"]
            if not (packed == np.stack([pixels(folder / name) for name in listed(folder)])).all():
                return f"{path.name} and the images of {folder.name}"
    if listed(a) != listed(b):
        return f"the names: {sorted(set(listed(a)) ^ set(listed(b)))[:5]}"
    apart = difference(images(a), images(b))
    return f"images by {apart} of 255" if apart > 1 else None
