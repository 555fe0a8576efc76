"""The range of values that training images were read with goes with the model."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

import sample
from ilvr_lightning.checkpoints.__main__ import main as checkpoints
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.references import find_references
from tests.support.runs import TrainRun


def write(folder: Path, high: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(12):
        values = np.random.default_rng(i).integers(0, high, (8, 8), dtype=np.uint16)
        tifffile.imwrite(folder / f"{i}.tif", values)
    return folder


def test_range_is_kept(train_run: TrainRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write(tmp_path / "images", 4000)
    checkpoint = train_run("twelve_bits", f"data.path={images}") / "checkpoints" / "last.ckpt"
    assert "values       0 to 4095, 12-bit: " in capsys.readouterr().out
    assert checkpoints(["export", str(checkpoint), "--to", "safetensors", str(tmp_path / "x.safetensors")]) == 0
    for path in (checkpoint, tmp_path / "x.safetensors"):
        loaded = load_denoiser(path, say=None)
        assert loaded.value_range == (0, 4095)
        (reference,) = find_references([str(images / "0.tif")], loaded.image_shape, value_range=loaded.value_range)
        assert reference.pixels.max() > 240

    words = ["--factor", "2", "--num-samples", "1", "--steps", "2", "--out", str(tmp_path / "out")]
    assert sample.main(["--ckpt", str(checkpoint), "--ref", str(images / "0.tif"), *words]) == 0
    (kept,) = (tmp_path / "out" / "references").iterdir()
    assert kept.stem == reference.sha256
    data = ImageDataModule(path=str(images), image_size=8)
    assert data.references([str(images / "0.tif")])[0].sha256 == reference.sha256

    write(images, 60_000)
    capsys.readouterr()
    train_run("twelve_bits", f"data.path={images}", "trainer.max_epochs=2", "resume=auto")
    assert "values " not in capsys.readouterr().out
    assert load_denoiser(checkpoint, say=None).value_range == (0, 4095)
    train_run("twelve_bits", f"data.path={images}", "trainer.max_epochs=3", "resume=auto", "data.value_range=[0,65535]")
    assert load_denoiser(checkpoint, say=None).value_range == (0, 65535)


def test_models_of_8_bit_images_have_none(trained: Path) -> None:
    assert load_denoiser(trained / "checkpoints" / "last.ckpt", say=None).value_range is None
