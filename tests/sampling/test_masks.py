"""sample.py --mask and --exact-low-band, and references that bring a mask of their own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ilvr_lightning.data.images import read_image, to_pixels, to_tensor
from ilvr_lightning.diffusion.low_pass import low_pass_factors
from tests.support import cli
from tests.support.samples import index, listed, pixels

Run = Callable[..., Path]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """a.png and b.png of noise, cut.png transparent on the right, left.png and right.png as masks."""
    random = np.random.default_rng(1)
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    Image.fromarray(half).save(tmp_path / "left.png")
    Image.fromarray(half[:, ::-1].copy()).save(tmp_path / "right.png")
    cut = random.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    cut[..., 3] = half
    Image.fromarray(cut).save(tmp_path / "cut.png")
    return tmp_path


@pytest.fixture
def sampled(run: Run) -> Run:
    """Sample one image per reference at N=2; returns the folder."""
    return lambda *argv, **named: run("--factor", 2, "--num-samples", 1, *argv, **named)


def coarse(path: Path) -> torch.Tensor:
    """(C, 4, 4): the image downsampled by 2, in 255ths."""
    x = (to_tensor(to_pixels(read_image(path))).double() + 1) * 127.5
    _, down = low_pass_factors(x.shape[-1], 2)
    return down @ x @ down.mT


def reference_of(folder: Path, name: str) -> Path:
    (sha256,) = {line["recipe"]["reference_sha256"] for line in index(folder) if line["reference"] == name}
    return folder / "references" / f"{sha256}.png"


def test_a_mask_is_where_the_reference_is_followed(sampled: Run, drawn: Path) -> None:
    out = sampled("--ref", drawn / "a.png", "--mask", drawn / "left.png", "--exact-low-band")
    off = (coarse(out / "a_N2_0.png") - coarse(reference_of(out, "a"))).abs()
    assert float(off[..., :1].max()) <= 1  # the cell beside the edge is part grey
    assert float(off[..., 2:].mean()) > 5
    free = sampled("--ref", drawn / "a.png", "--mask", drawn / "right.png", out="right")
    assert (out / "a_N2_0.png").read_bytes() != (free / "a_N2_0.png").read_bytes()


def test_a_transparent_reference_brings_its_mask(sampled: Run, drawn: Path) -> None:
    out = sampled("--ref", drawn / "cut.png", "--exact-low-band")
    (line,) = index(out)
    mask = to_pixels(read_image(out / "references" / f"{line['recipe']['mask_sha256']}.png", 1))
    assert mask[:, :3].min() == 255
    assert mask[:, 5:].max() == 0
    off = (coarse(out / "cut_N2_0.png") - coarse(reference_of(out, "cut"))).abs()
    assert float(off[..., :1].max()) <= 1
    assert float(off[..., 3:].mean()) > 5


def test_a_mask_for_each_reference(sampled: Run, drawn: Path) -> None:
    references = ("--ref", drawn / "a.png", drawn / "b.png")
    out = sampled(*references, "--mask", drawn / "left.png", drawn / "right.png")
    hashes = {line["reference"]: line["recipe"]["mask_sha256"] for line in index(out)}
    assert hashes["a"] != hashes["b"]
    # In one batch or alone, the image is the same.
    alone = sampled("--ref", drawn / "b.png", "--mask", drawn / "right.png", out="alone")
    assert np.abs(pixels(out / "b_N2_0.png") - pixels(alone / "b_N2_0.png")).max() <= 1


def test_masks_for_one_reference_given_twice(sampled: Run, drawn: Path) -> None:
    out = sampled("--ref", drawn / "a.png", drawn / "a.png", "--mask", drawn / "left.png", drawn / "right.png")
    assert len({line["recipe"]["mask_sha256"] for line in index(out)}) == len(set(listed(out))) == 2
    three = [drawn / name for name in ("a.png", "b.png", "cut.png")]
    masks = [drawn / name for name in ("left.png", "left.png", "right.png")]
    assert len(listed(sampled("--ref", *three, "--mask", *masks, out="three"))) == 3


def test_references_of_one_name_and_one_mask(sampled: Run, drawn: Path) -> None:
    for folder in ("x", "y", "z"):
        (drawn / folder).mkdir()
        noise = np.random.default_rng(ord(folder)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(drawn / folder / "s.png")
    three = [drawn / folder / "s.png" for folder in ("x", "y", "z")]
    out = sampled("--ref", *three, "--mask", drawn / "left.png")
    assert len(set(listed(out))) == len(list(out.glob("s*_grid.png"))) == 3


def test_a_masked_image_is_reproduced(
    sampled: Run, drawn: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = ("--ref", drawn / "a.png", "--mask", drawn / "left.png")
    out = sampled(*masked)
    (line,) = index(out)
    command = ["--reproduce", out / "a_N2_0.png", "--ckpt", checkpoint, "--out"]
    capsys.readouterr()
    assert sample.main([*map(str, command), str(drawn / "again")]) == 0
    assert "identical" in capsys.readouterr().out
    (out / "references" / f"{line['recipe']['mask_sha256']}.png").unlink()
    error = cli.refused(sample.main, capsys, *command, drawn / "more")
    assert "--reproduce: the mask of the reference (SHA-256" in error
    assert sample.main([*map(str, command), str(drawn / "more"), *map(str, masked)]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--unconditional", "--mask", "left.png"], "--mask needs --ref"),
        (["--ref", "a.png", "--mask", "none.png"], "--mask: there is no file or folder"),
        (["--ref", "a.png", "--mask", "left.png", "right.png"], "--mask: got 2 masks for 1 references"),
        (["--ref", "a.png", "--mask", "wide.png"], "--mask: wide.png is 32x16 px, its reference a 16x16"),
        (["--ref", "a.png", "--mask", "black.png"], "--mask: black.png is black all over"),
        (["--ref", "a.png", "--exact-low-band", "--range", "25:5"], "--exact-low-band keeps the reference to the end"),
        (["--ref", "a.png", "--mask", "left.png", "--start-from", "9"], "--start-from cannot be combined with --mask"),
        (["--ref", "cut.png", "--start-from", "9", "--steps", "4"], "--start-from cannot be combined with a mask"),
        (["--ref", "a.png", "--mask", ""], "--mask: a name is empty"),
        (["--unconditional", "--exact-low-band"], "--exact-low-band needs --ref"),
        (["--ref", "a.png", "--exact-low-band", "--kernel", "ideal"], "--exact-low-band needs a kernel that downsamp"),
    ],
)
def test_bad_masks(
    argv: list[str], message: str, checkpoint: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (32, 16), 255).save(drawn / "wide.png")
    Image.new("L", (16, 16)).save(drawn / "black.png")
    words = [drawn / word if word.endswith(".png") else word for word in argv]
    error = cli.refused(sample.main, capsys, *words, "--ckpt", checkpoint, "--out", drawn / "bad")
    assert message in error
