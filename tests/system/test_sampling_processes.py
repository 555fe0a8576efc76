"""sample.py in processes of its own: killed and started again, on several devices, stopped by signals."""

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support import samples
from tests.support.samples import Images, difference, leftovers, listed, sample_into
from tests.system.kill.runs import finish, start
from tests.system.kill.sampling import command, differs, kill_sampling


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("kind", "devices"), [("png", 1), ("npz", 3)])
def test_killed_and_started_again(kind: str, devices: int, checkpoint: Path, tmp_path: Path) -> None:
    """The short form of `python -m tests.system.kill`."""
    total, out = 300, tmp_path / "killed"
    kill_sampling(checkpoint, out, kind, devices, kills=2, total=total, seed=0)
    alone = sample_into(checkpoint, tmp_path / "alone", "--unconditional", "--num-samples", total)
    assert differs(out, alone, total) is None
    (alone / "unconditional_7.png").unlink()
    with pytest.raises(FileNotFoundError):
        differs(out, alone, total)


def test_processes_batches_and_order_change_nothing(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    references = [images / f"{n:02}.png" for n in range(4)]
    found: list[Images] = []
    for devices, batch, order in ((1, 16, 1), (2, 3, -1), (3, 1, -1)):
        out = tmp_path / f"{devices}"
        asked = ("--factor", 2, "--num-samples", 2, "--devices", devices, "--batch-size", batch)
        finish(*command(checkpoint, out, "--ref", *references[::order], *asked))
        found.append(samples.images(out))
        assert len(found[-1]) == 8
        assert len(list(out.glob("*grid.png"))) == 5  # the ranks share them
        assert not leftovers(out)
    assert all(difference(found[0], other) <= 1 for other in found[1:])


def test_a_broken_reference_among_many_on_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    """Each rank skips what it cannot read, and the first counts them all."""
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(1001):
        Image.new("RGB", (8, 8), (n % 256, n // 256, 0)).save(folder / f"{n:04}.png")
    for n in (10, 11):
        (folder / f"{n:04}.png").write_bytes(b"no image")
    said = finish(*command(checkpoint, tmp_path / "out", "--ref", folder, "--factor", 2, "--num-samples", 1,
                           "--devices", 2, "--batch-size", 64))  # fmt: skip
    assert "skipped      2 images of 2 unusable references" in said
    assert said.count("cannot be read as an image") == 2
    assert len(listed(tmp_path / "out")) == 999


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_first_process_ends_all(number: int, status: int, checkpoint: Path, tmp_path: Path) -> None:
    """No rank continues by itself, and the same command continues."""
    asked = ("--unconditional", "--num-samples", 2000, "--devices", 2, "--batch-size", 1)
    process = start(*command(checkpoint, tmp_path, *asked))
    while process.poll() is None and not list(tmp_path.glob("*.png")):
        time.sleep(0.01)
    os.kill(process.pid, number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == status, text
    assert "stopped; run the same command again to continue" in text
    there = len(list(tmp_path.rglob("*.png")))
    time.sleep(1)
    assert len(list(tmp_path.rglob("*.png"))) == there < 2000
