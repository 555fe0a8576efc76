"""The bundled models: complete, licensed, calibrated, and neither blurred nor grainy."""

import importlib.util
import json
import struct
from types import ModuleType

import pytest
import torch

from ilvr_lightning.checkpoints.find import BUNDLED, DEFAULT_MODEL, bundled_models
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.metrics.bands import measure, octave_ratios
from tests.support.paths import ROOT

HELD_OUT = {
    "toon64": f"{ROOT}/data/toon:test[100:116]",
    "animals64": f"{ROOT}/data/animals:test[100:116]",
    "relief64": f"{ROOT}/configs/relief64.yaml:validation[0:16]",
}
LICENCES = {"toon64": "CC BY 4.0", "animals64": "MIT", "relief64": "public domain"}


@pytest.fixture(scope="module", params=sorted(HELD_OUT))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make_card() -> ModuleType:
    """The script that writes the cards."""
    spec = importlib.util.spec_from_file_location("make_card", BUNDLED / "make_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(name: str) -> LoadedDenoiser:
    return load_denoiser(BUNDLED / name, say=None)


def test_which_models_there_are() -> None:
    assert bundled_models() == sorted(HELD_OUT)
    assert DEFAULT_MODEL in HELD_OUT


def test_small_and_in_half_precision(name: str) -> None:
    path = BUNDLED / name / "model.safetensors"
    assert path.stat().st_size < 20e6
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"F16"}


def test_card(name: str) -> None:
    card = (BUNDLED / name / "README.md").read_text()
    for words in (LICENCES[name], "images seen", "hours of training", "val/loss", "modified", "octave_gains", "cannot"):
        assert words in card
    pictures = [line.partition("](")[2].rstrip(")") for line in card.splitlines() if line.startswith("![")]
    assert pictures
    assert all((BUNDLED / name / picture).is_file() for picture in pictures)


def test_card_says_what_the_weights_say(name: str, make_card: ModuleType) -> None:
    assert make_card.model_card(BUNDLED / name) == (BUNDLED / name / "README.md").read_text()


def test_calibrated(loaded: LoadedDenoiser) -> None:
    for preset in ("fast", "draft"):
        for factor in (2, 4, 8, 16):
            gains = loaded.preset(preset, factor).octave_gains
            assert isinstance(gains, tuple)
            assert all(0.7 < gain < 1.4 for gain in gains)


def test_follows_held_out_pictures_without_blur_or_grain(name: str, loaded: LoadedDenoiser) -> None:
    """ILVR at N=8 after 16 held-out images: the low band met, the energy above it that of real images."""
    references = find_references([HELD_OUT[name]], loaded.image_shape, "crop")
    y = torch.stack([r.tensor for r in references])
    plan = loaded.preset("draft", 8)
    with torch.no_grad():
        x = generate(loaded, loaded.schedule, plan, seeds=range(16), shape=loaded.image_shape, reference=y)
    figures = measure(x.clamp(-1, 1), y, 8)
    assert figures["low"] < 0.01
    assert 0.7 < figures["energy"] < 1.4
    assert 0.6 < octave_ratios(x, y)[-1] < 1.6
    across = (x[:, None] - x).square().mean((2, 3, 4)).sqrt()
    assert float(across[~torch.eye(16, dtype=torch.bool)].min()) > 0.1
