"""The templates for one's own images: every setting that their comments offer makes a network that trains."""

from pathlib import Path

import pytest
import torch

import train
from ilvr_lightning.config.load import load_config
from ilvr_lightning.models.unet import UNet
from tests.support.paths import ROOT
from tests.support.runs import last

CPU, GPU = (str(ROOT / "configs" / f"{name}.yaml") for name in ("own_images", "own_images_gpu"))
TINY = (
    "model.channels=8", "data.batch_size=2", "data.epoch_images=4", "trainer.accelerator=cpu", "trainer.max_steps=1",
    "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "calibration.images=0",
    "grid.samples=1", "sampling.num_steps=1", "run.name=run",
)  # fmt: skip
OFFERED = [
    (CPU, []),
    (CPU, ["data.image_size=32"]),
    (CPU, ["data.image_size=[64,48]"]),
    (CPU, ["data.channels=1", "data.flip=false", "ema.decay=0.995"]),
    (GPU, []),
    (GPU, ["data.image_size=128", "grid.factors=[8,16,32]"]),
    (GPU, ["data.image_size=256", "grid.factors=[16,32,64]"]),
    (GPU, ["data.image_size=[64,80]", "data.channels=1", "ema.decay=0.9995"]),
    (GPU, ["model.num_res_blocks=1", "trainer.accumulate_grad_batches=2"]),
    (GPU, ["model.num_res_blocks=1", "data.image_size=256"]),
]


@pytest.mark.parametrize(("template", "changes"), OFFERED)
def test_what_a_template_offers_builds_a_network(template: str, changes: list[str]) -> None:
    config = load_config([template, *changes])
    with torch.device("meta"):  # in its full size, without memory
        network = UNet(config.model, config.data.size, config.data.channels)
        x = torch.empty(2, config.data.channels, *config.data.size)
        assert network(x, torch.ones(2)).shape == x.shape
    assert config.optim.decay_steps == "auto" and config.trainer.arguments()["max_epochs"] == -1


@pytest.mark.parametrize(("template", "changes"), OFFERED[:-1])
def test_what_a_template_offers_trains(template: str, changes: list[str], images: Path, tmp_path: Path) -> None:
    """One step of a thin network, and a grid."""
    assert train.main([template, f"data.path={images}", f"trainer.default_root_dir={tmp_path}", *TINY, *changes]) == 0
    folder = tmp_path / Path(template).stem / "run"
    assert last(folder)["global_step"] == 1
    assert [path.name for path in (folder / "grids").glob("*.png")] == ["step_0000001.png"]


def test_the_fine_tuning_that_the_template_offers(images: Path, tmp_path: Path) -> None:
    comment = next(line for line in Path(CPU).read_text().splitlines() if "init_from=" in line)
    config = load_config([CPU, *(changes := comment.removeprefix("#").split())])
    assert config.init_from == "toon64" and config.trainer.max_steps == 1000
    tiny = [change for change in TINY if not change.startswith("model.")]
    assert train.main([CPU, f"data.path={images}", f"trainer.default_root_dir={tmp_path}", *changes, *tiny]) == 0
