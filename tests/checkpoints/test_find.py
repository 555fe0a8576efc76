"""Which checkpoint a command takes."""

import os
from pathlib import Path

import pytest
import torch

from ilvr_lightning.checkpoints import find
from ilvr_lightning.checkpoints.__main__ import main
from ilvr_lightning.checkpoints.find import (
    bundled_models,
    find_checkpoint,
    named_checkpoint,
    newest_checkpoint,
    newest_first,
)
from ilvr_lightning.checkpoints.finetune import load_weights_into
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.unet import UNet
from tests.support.paths import ROOT


def make(path: Path, time: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (time, time))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two bundled models and no run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "BUNDLED", tmp_path / "data" / "pretrained")
    for name in ("toon64", "other"):
        make(tmp_path / "data" / "pretrained" / name / "model.safetensors", 1)
    return tmp_path


def test_the_newest_run_is_taken(here: Path) -> None:
    assert newest_checkpoint(Path("runs")) is None
    make(here / "runs/a/first/checkpoints/last.ckpt", 2)
    newest = make(here / "runs/b/second/checkpoints/last.ckpt", 3)
    make(here / "runs/b/third/checkpoints/best.ckpt", 4)
    assert find_checkpoint(None).resolve() == newest
    names = [path.parents[1].name for path in newest_first(Path("runs"), "checkpoints/*.ckpt")]
    assert names == ["third", "second", "first"]


def test_a_file_that_goes_away_meanwhile_is_passed_over(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = make(here / "runs/a/1/checkpoints/last.ckpt", 2)
    (here / "runs/a/2/checkpoints").mkdir(parents=True)
    (here / "runs/a/2/checkpoints/last.ckpt").symlink_to("removed")
    assert newest_first(here / "runs", "checkpoints/last.ckpt") == [kept]


def test_a_bundled_model_where_there_is_no_run(here: Path) -> None:
    assert find_checkpoint(None) == Path("data/pretrained/toon64")


def test_a_name_or_a_path(here: Path) -> None:
    make(here / "runs/a/first/checkpoints/last.ckpt", 2)
    assert bundled_models() == ["other", "toon64"]
    assert find_checkpoint("other") == Path("data/pretrained/other")
    make(here / "other", 1)  # a file here is not hidden by a name
    assert find_checkpoint("other") == Path("other")
    assert find_checkpoint("x/missing.pt") == Path("x/missing.pt")  # whoever opens it says so
    assert named_checkpoint(Path("toon64")) == Path("data/pretrained/toon64")


def test_every_way_takes_the_name_of_a_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "toon64"]) == 0
    inspected = capsys.readouterr().out
    denoiser = load_denoiser("toon64", say=None)
    assert f"parameters   {sum(p.numel() for p in denoiser.network.parameters()):,}" in inspected
    network = UNet(denoiser.network.config, (64, 64))
    said: list[str] = []
    load_weights_into(network, "toon64", denoiser.description.diffusion, say=said.append)
    assert said[0].startswith("init_from    toon64: ") and len(said) == 1
    assert all(map(torch.equal, network.state_dict().values(), denoiser.network.state_dict().values()))
    with pytest.raises(
        UserError, match="init_from: toon65: there is no such file or folder, and the bundled models are"
    ):
        load_weights_into(network, "toon65")


def test_the_short_way_is_taken_from_a_folder_above_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert find_checkpoint("toon64") == Path("data/pretrained/toon64")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("toon64") == ROOT / "data/pretrained/toon64"


def test_what_is_not_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--ckpt is empty"):
        find_checkpoint("")
    with pytest.raises(UserError, match="no such file or folder, and the bundled models are other, toon64"):
        find_checkpoint("tune64")
    monkeypatch.setattr(find, "BUNDLED", here / "nowhere")
    with pytest.raises(UserError, match="no models are bundled here"):
        find_checkpoint("toon64")
    with pytest.raises(UserError, match="--ckpt is missing, there is no run"):
        find_checkpoint(None)
