"""What leaves the machine names it nowhere: checkpoints, exports, PNG recipes, TensorBoard's text."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sample
from ilvr_lightning.checkpoints.__main__ import main as pretrained
from ilvr_lightning.config.schema import public_dataset_name

TrainRun = Callable[..., Path]
WORDS = ("hf_" + "k" * 34, "the-user-of-it", "the-host-it-is")


@pytest.fixture(scope="module")
def run(train_run: TrainRun, images: Path) -> Iterator[Path]:
    """A run whose every setting that may hold a path holds one, by a user, on a host, with a token."""
    with pytest.MonkeyPatch.context() as patch:
        for name, word in zip(("HF_TOKEN", "USER", "HOSTNAME"), WORDS, strict=True):
            patch.setenv(name, word)
        patch.setattr(socket, "gethostname", lambda: WORDS[2])
        first = train_run("tells_nothing_before")
        yield train_run(
            "tells_nothing", f"init_from={first / 'checkpoints' / 'last.ckpt'}", "grid.every_n_epochs=1",
            f"grid.references=[{images / '00.png'}]",
        )  # fmt: skip


def tells(content: bytes, *paths: Path) -> list[str]:
    """What of this machine stands in a file's bytes."""
    words = {str(path) for path in paths} | {str(Path.home()), *WORDS}
    text = content.decode("latin-1")
    return sorted({word for word in words if word in text} | set(re.findall(r"/(?:home|tmp|root|Users)/[\w.-]+", text)))


def test_training(run: Path, images: Path) -> None:
    files = [*run.glob("checkpoints/*.ckpt"), *run.glob("events.*"), *run.glob("grids/*")]
    assert len(files) == 5
    for file in files:
        assert tells(file.read_bytes(), images, run) == [], file.name
    assert tells((run / "config.yaml").read_bytes(), images) != []  # which stays, and must find its images


def test_samples(run: Path, images: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    argv = ["--ref", str(images / "00.png"), "--ckpt", str(checkpoint), "--steps", "4", "--factor", "2"]
    assert sample.main([*argv, "--num-samples", "1", "--device", "cpu", "--trajectory", "--out", str(tmp_path)]) == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".png", ".webp", ".jsonl", ".html"}
    for file in files:
        assert tells(file.read_bytes(), images, run, tmp_path) == [], file.name
    (line,) = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert json.loads(line)["reference"] == "00"


@pytest.mark.parametrize("target", ["model.safetensors", "folder"])
def test_exports(target: str, run: Path, images: Path, tmp_path: Path) -> None:
    argv = ["export", str(run / "checkpoints" / "last.ckpt"), "--to", "safetensors", str(tmp_path / target)]
    assert pretrained(argv) == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"model.safetensors"} == {p.name for p in files}
    for file in files:
        assert tells(file.read_bytes(), images, run, tmp_path) == [], file.name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/toon", "data/toon"),
        ("huggan/AFHQ", "huggan/AFHQ"),
        ("/home/someone/cats", "cats"),
        ("/home/someone/cats/", "cats"),
        ("~/cats", "cats"),
        ("../someone/cats", "cats"),
        ("C:\\Users\\someone\\cats", "cats"),
        ("/data/someone/*.parquet", "*.parquet"),
        ("file:///home/someone/x/*.parquet", "*.parquet"),
    ],
)
def test_name_of_a_data_set(path: str, name: str) -> None:
    assert public_dataset_name(path) == name
