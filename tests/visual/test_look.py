"""train.py --look: the sheet shows what the network would be trained on."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train
from ilvr_lightning.config.load import load_config
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.images import from_tensor
from ilvr_lightning.diffusion.loss import training_losses
from ilvr_lightning.visual.look import IMAGES, _read
from tests.support.image_sets import STREAM, write_noise_shards
from tests.support.runs import TrainRun


@pytest.mark.parametrize("streaming", [False, True])
def test_it_shows_what_the_network_is_trained_on(
    streaming: bool, tiny_config: Path, train_run: TrainRun, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Decoded, fitted, mirrored and in this order."""
    write_noise_shards(tmp_path, images)
    changes = [f"data.path={tmp_path}", *STREAM] if streaming else []
    seen: list[Tensor] = []

    def record(denoise: Any, x0: Tensor, *others: Any) -> Tensor:
        seen.append(x0)
        return training_losses(denoise, x0, *others)

    monkeypatch.setattr("ilvr_lightning.training.module.training_losses", record)
    train_run("looked_at", *changes, "trainer.limit_val_batches=0", "trainer.max_steps=3")
    config = load_config([str(tiny_config), *changes])
    data = ImageDataModule(replace(config.data, cache_mb=0, num_workers=0, epoch_images=10**9), config.seed)
    data.setup()
    shown, histogram, broken = _read(data)
    assert len(shown) == IMAGES and not broken
    trained = from_tensor(torch.cat(seen))
    assert np.array_equal(np.stack(shown[: len(trained)]), trained)
    assert histogram.sum() % (3 * 8 * 8) == 0 and histogram.shape == (3, 256)


def test_the_sheet_and_what_is_left_out(
    tiny_config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for name in ("broken.png", "notes.txt", "LICENSE"):
        (folder / name).write_text("no picture")
    settings = [str(tiny_config), f"data.path={folder}", f"trainer.default_root_dir={tmp_path / 'runs'}"]
    assert train.main([*settings, "--look"]) == 0
    out = capsys.readouterr().out
    sheet = tmp_path / "runs" / "tiny" / "look.png"
    assert f"data         {folder}: 19 images to train on, 3 to validate on\n" in out
    assert "images were read: values from 0 to 255, 12" in out
    assert f"{folder / 'broken.png'} cannot be read as an image" in out
    assert "left out: files that are no images by their endings: 1 without an ending, 1 .txt\n" in out
    assert out.endswith(f"look         {sheet}: {IMAGES} images\n")
    drawn = Image.open(sheet)
    assert drawn.width >= 8 * 98 and drawn.height > 6 * 98 + 100
    assert np.asarray(drawn)[24:, 12:].std() > 20
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["look.png"]


def test_fewer_images_than_a_batch_are_shown(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their training is refused."""
    assert train.main([str(tiny_config), "data.batch_size=19", "--look"]) == 0
    assert train.main([str(tiny_config), "data.batch_size=19"]) == 2
    assert "data.batch_size must be at most the number of training images" in capsys.readouterr().err
