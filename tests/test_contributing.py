"""Each example of docs/contributing.md adds a thing through its registry alone; the commands then know it."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sample
from ilvr_lightning.checkpoints.families import FAMILIES
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.sources import SOURCES
from ilvr_lightning.diffusion.plan import SAMPLER_SETTINGS, SamplingPlan
from ilvr_lightning.diffusion.samplers import SAMPLERS
from ilvr_lightning.metrics.bands import METRICS, measure
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.sampling.formats import FORMATS
from tests.support.paths import ROOT
from tests.support.runs import TrainRun

TEXT = (ROOT / "docs" / "contributing.md").read_text()
REGISTRIES: tuple[dict[str, Any], ...] = (FAMILIES, SOURCES, SAMPLER_SETTINGS, SAMPLERS, METRICS, FORMATS)


@pytest.fixture(autouse=True)
def _registries_are_restored() -> Iterator[None]:
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def run_example(title: str) -> dict[str, Any]:
    """Execute the code under a heading; gives its names."""
    match = re.search(rf"^### {title}\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
    assert match is not None, title
    names: dict[str, Any] = {}
    exec(compile(match[1], title, "exec"), names)
    return names


def sampled(out: Path, *argv: object) -> Path:
    command = [*argv, "--num-samples", 2, "--device", "cpu", "--out", out]
    assert sample.main(list(map(str, command))) == 0
    return out


def test_sampler(trained: Path, tmp_path: Path, images: Path) -> None:
    run_example("A sampler")
    assert SamplingPlan(sampler="consistency").sampler == "consistency"
    checkpoint, reference = trained / "checkpoints" / "last.ckpt", images / "00.png"
    asked = ("--ckpt", checkpoint, "--ref", reference, "--factor", 2, "--sampler", "consistency", "--steps", 4)
    out = sampled(tmp_path, *asked)
    assert len(list(out.glob("00_N2_?.png"))) == 2


def test_source(train_run: TrainRun, tmp_path: Path) -> None:
    run_example("A source of training images")
    folder = train_run("squares", "data.path=squares:20", "data.channels=1", "trainer.max_steps=2")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    out = sampled(tmp_path, "--ckpt", checkpoint, "--ref", "squares:20:train[3:4]", "--steps", 2, "--factor", 2)
    assert len(list(out.glob("train_3_N2_?.png"))) == 2
    (kept,) = (out / "references").iterdir()
    assert Image.open(kept).getextrema() == (3, 3)


def test_format(trained: Path, tmp_path: Path) -> None:
    run_example("An output format of sample.py")
    checkpoint = trained / "checkpoints" / "last.ckpt"
    out = sampled(tmp_path, "--ckpt", checkpoint, "--unconditional", "--steps", 2, "--format", "zip")
    with zipfile.ZipFile(out / "samples.zip") as archive:
        assert archive.namelist() == ["unconditional_0.png", "unconditional_1.png"]


def test_family(tmp_path: Path) -> None:
    model = run_example("A family of checkpoints")["MODEL"]
    network = UNet(model, (16, 16), 3)
    torch.save({f"mine.{name}": value for name, value in network.state_dict().items()}, tmp_path / "mine.pt")
    loaded = load_denoiser(tmp_path / "mine.pt", say=None)
    assert loaded.description.kind == "my state dict"
    assert all(torch.equal(value, loaded.network.state_dict()[name]) for name, value in network.state_dict().items())
    out = sampled(tmp_path / "out", "--ckpt", tmp_path / "mine.pt", "--unconditional", "--steps", 2)
    assert (out / "unconditional_1.png").exists()


def test_metric() -> None:
    run_example("A metric")
    y = torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert measure(y + torch.tensor([3.0, 0.0, 4.0])[:, None, None], y, 4)["tint"] == pytest.approx(5)


def test_the_picture_of_the_packages_is_right() -> None:
    """The table in the document has the packages of tests/test_architecture.py on their layers."""
    from tests.test_architecture import LAYERS

    rows = re.findall(r"^\| (\d) \| (.*) \|$", TEXT, re.MULTILINE)
    named = {
        package.removesuffix(".py"): int(layer) for layer, text in rows for package in re.findall(r"`([\w.]+)`", text)
    }
    assert named == {package: layer for package, layer in LAYERS.items() if package != "pretrained"}
