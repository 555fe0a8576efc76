"""Data in processes of their own: two ranks of any Trainer, and what decoders say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.image_sets import ROWS, write_shards
from tests.support.paths import ROOT

FOREIGN = """
import json, os, sys
import lightning.pytorch as pl
import torch
from ilvr_lightning.data.datamodule import ImageDataModule

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)
        self.trained, self.validated = [], []
    def training_step(self, batch, batch_idx):
        self.trained.append(((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
        return self.layer(batch["image"]).square().mean()
    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

if __name__ == "__main__":
    path, streaming, out = sys.argv[1], sys.argv[2] == "streaming", sys.argv[3]
    data = ImageDataModule(path=path, image_size=8, batch_size=6, num_workers=0, streaming=streaming)
    module = Module()
    trainer = pl.Trainer(
        devices=2, strategy="ddp", accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    found = {"trained": module.trained, "validated": module.validated, "rows": [data.rows_of(s) for s in range(16)]}
    with open(f"{out}/{trainer.global_rank}.json", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.parametrize("kind", ["map-style", "streaming"])
def test_two_ranks_of_any_trainer_share_each_batch(kind: str, tmp_path: Path) -> None:
    """With Lightning's defaults, which would divide a sampler's shares among the ranks again."""
    write_shards(tmp_path / "set", [7, 1, ROWS - 8])
    (tmp_path / "foreign.py").write_text(FOREIGN)
    command = [sys.executable, str(tmp_path / "foreign.py"), str(tmp_path / "set"), kind, str(tmp_path)]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [a + b for a, b in zip(first["trained"], second["trained"], strict=True)] == first["rows"]
    assert sorted(first["validated"] + second["validated"]) == [0, 0, 1, 1]  # two images, in two epochs


def test_decoders_say_nothing_from_the_import_on() -> None:
    """Neither Pillow about odd EXIF, nor libtiff about damaged data."""
    code = """
import io, sys
from PIL import Image
from ilvr_lightning.data.images import BrokenImageError, read_image
file = io.BytesIO()
exif = Image.Exif()
exif[0x010E] = "a description longer than an offset, which is elsewhere"
Image.new("RGB", (8, 8)).save(file, "PNG", exif=exif.tobytes()[:20])
read_image(file.getvalue())
file = io.BytesIO()
Image.effect_noise((64, 64), 99).save(file, "TIFF", compression="tiff_lzw")
data = bytearray(file.getvalue())
data[8:48] = bytes(40)
try:
    read_image(bytes(data))
except BrokenImageError as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.stderr == ""
    assert ended.stdout == "an image cannot be read as an image: decoder error -2\n"
