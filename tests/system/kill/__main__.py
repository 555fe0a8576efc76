"""python -m tests.system.kill [--kills 20] [--seed 0]: runs killed so often must end as runs that were left alone."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.system.kill.runs import difference, finish, kill_training, make_config
from tests.system.kill.sampling import command, differs, kill_sampling

SAMPLINGS = (("png", 1), ("npz", 2), ("png", 3))
"""Formats, and numbers of processes."""


def main() -> int:
    """Kill a training and runs of sample.py, print what happened; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = list(_trained(Path(folder), args.kills, args.seed))
        found += _sampled(Path(folder), args.kills, args.seed)
    return 1 if any(found) else 0


def _trained(folder: Path, kills: int, seed: int) -> Iterator[str | None]:
    killed, alone = (make_config(folder, name, epochs=12 * kills) for name in ("killed", "alone"))
    for line in kill_training(killed, kills, seed):
        print(line, flush=True)
    finish("train.py", alone)
    found = difference(*(folder / "runs" / name / "run" for name in ("killed", "alone")))
    print(f"training: {kills} kills, {found or 'nothing'} differs from a run never killed", flush=True)
    yield found


def _sampled(folder: Path, kills: int, seed: int) -> Iterator[str | None]:
    checkpoint = folder / "runs" / "alone" / "run" / "checkpoints" / "last.ckpt"
    total, alone = 100 * kills, folder / "alone"
    finish(*command(checkpoint, alone, "--unconditional", "--num-samples", total))
    for kind, devices in SAMPLINGS:
        out = folder / f"{kind}{devices}"
        for line in kill_sampling(checkpoint, out, kind, devices, kills, total, seed):
            print(line, flush=True)
        found = differs(out, alone, total)
        print(
            f"sampling {kind} on {devices}: {kills} kills, {found or 'nothing'} differs from a run never killed",
            flush=True,
        )
        yield found


if __name__ == "__main__":
    sys.exit(main())
