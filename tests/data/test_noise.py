"""The noise that a reference is estimated to have."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.data.fitting import fit_reference
from ilvr_lightning.data.images import open_image
from ilvr_lightning.data.noise import estimate_noise
from tests.support.paths import ROOT

RNG = np.random.default_rng(0)


def noisy(sigma: float, side: int = 128) -> Image.Image:
    """Blocks of colour with white noise of this deviation in [-1, 1]."""
    clean = np.kron(RNG.integers(60, 200, (side // 16, side // 16, 3)), np.ones((16, 16, 1)))
    return Image.fromarray(
        np.clip(np.rint(clean + 127.5 * sigma * RNG.standard_normal(clean.shape)), 0, 255).astype("uint8")
    )


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_white_noise_is_found(sigma: float) -> None:
    assert estimate_noise(noisy(sigma)) == pytest.approx(sigma, rel=0.1)
    assert estimate_noise(noisy(sigma).convert("L")) < sigma  # the channels' noise is averaged


def test_clean_images_have_none() -> None:
    assert fit_reference("x", noisy(0.0), (64, 64), 3).noise == 0
    for path in sorted((ROOT / "data" / "references").glob("*.png")):
        with open_image(path) as image:
            assert fit_reference(path.stem, image, (64, 64), 3).noise == 0, path


def test_noise_shrinks_with_the_image() -> None:
    image = noisy(0.2, 256)
    assert fit_reference("x", image, (64, 64), 3).noise == pytest.approx(0.05, rel=0.1)
    assert fit_reference("x", image, (64, 128), 3).noise == pytest.approx(0.1, rel=0.1)
    assert fit_reference("x", image, (64, 128), 3, fit="pad").noise == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(("quality", "subsampling"), [(10, 2), (10, 0), (30, 2), (75, 2)])
def test_compression_is_read_from_the_tables(quality: int, subsampling: int) -> None:
    """Within a factor of 1.5 of what the means of its blocks are off, over many drawings."""
    errors, estimates = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        smooth = Image.fromarray(rng.integers(80, 176, (8, 8, 3)).astype("uint8")).resize(
            (128, 128), Image.Resampling.BICUBIC
        )
        content = io.BytesIO()
        smooth.save(content, "JPEG", quality=quality, subsampling=subsampling)
        with open_image(content.getvalue()) as image:
            off = (np.array(image, dtype=float) - np.array(smooth, dtype=float)) / 127.5
            means = off.reshape(16, 8, 16, 8, 3).mean((1, 3)) * 8  # an orthonormal coefficient of each block
            errors.append(float(np.square(means).mean()))
            estimates.append(estimate_noise(image) ** 2)
    ratio = np.sqrt(np.mean(estimates) / np.mean(errors))
    assert 1 / 1.5 < ratio < 1.5


@pytest.mark.parametrize("mode", ["RGB", "L", "F", "I;16", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8)])
def test_images_of_any_kind(mode: str, size: tuple[int, int]) -> None:
    assert estimate_noise(Image.new(mode, size)) == 0


def test_large_images_are_judged_by_their_middle() -> None:
    image = np.zeros((1200, 2000, 3), dtype="uint8")
    image[:, 480:1520] = np.clip(RNG.normal(128, 12.75, (1200, 1040, 3)), 0, 255)
    assert estimate_noise(Image.fromarray(image)) == pytest.approx(0.1, rel=0.3)


def test_damaged_tables_are_survived(tmp_path: Path) -> None:
    content = io.BytesIO()
    noisy(0.0).save(content, "JPEG", quality=50)
    with open_image(content.getvalue()) as image:
        image.quantization = {}  # type: ignore[attr-defined]
        assert estimate_noise(image) >= 0
