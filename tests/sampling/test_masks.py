"""sample.py --mask, --exact-low-band and --trajectory, as a user gives them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ilvr_lightning.data.images import read_image, to_pixels, to_tensor
from ilvr_lightning.diffusion.low_pass import low_pass_factors
from ilvr_lightning.sampling.trajectory import Frame, spread
from tests.support import cli

Sample = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
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
def run(trained: Path, tmp_path: Path) -> Sample:
    """Sample one picture a reference with four steps at N=2; gives the folder."""

    def run(*argv: object, out: str = "out") -> Path:
        arguments = ["--ckpt", trained / "checkpoints" / "last.ckpt", "--steps", 4, "--device", "cpu", "--factor", 2,
                     "--num-samples", 1, "--out", tmp_path / out, *argv]  # fmt: skip
        assert sample.main(list(map(str, arguments))) == 0
        return tmp_path / out

    return run


def coarse(path: Path) -> torch.Tensor:
    """(C, 4, 4): the picture downsampled by 2, in 255ths."""
    x = (to_tensor(to_pixels(read_image(path))).double() + 1) * 127.5
    _, down = low_pass_factors(x.shape[-1], 2)
    return down @ x @ down.mT


def reference_of(folder: Path, name: str) -> Path:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    (sha256,) = {line["reference_sha256"] for line in lines if line["reference"] == name}
    return folder / "references" / f"{sha256}.png"


def test_mask_is_where_the_reference_is_followed(run: Sample, pictures: Path) -> None:
    out = run("--ref", pictures / "a.png", "--mask", pictures / "left.png", "--exact-low-band")
    off = (coarse(out / "a_N2_0.png") - coarse(reference_of(out, "a"))).abs()
    assert float(off[..., :1].max()) <= 1  # the cell beside the edge is part grey
    assert float(off[..., 2:].mean()) > 5
    free = run("--ref", pictures / "a.png", "--mask", pictures / "right.png", out="right")
    assert (out / "a_N2_0.png").read_bytes() != (free / "a_N2_0.png").read_bytes()


def test_transparent_reference_brings_its_mask(run: Sample, pictures: Path) -> None:
    out = run("--ref", pictures / "cut.png", "--exact-low-band")
    line = json.loads((out / "manifest.jsonl").read_text())
    mask = to_pixels(read_image(out / "references" / f"{line['mask_sha256']}.png", 1))
    assert mask[:, :3].min() == 255
    assert mask[:, 5:].max() == 0
    off = (coarse(out / "cut_N2_0.png") - coarse(reference_of(out, "cut"))).abs()
    assert float(off[..., :1].max()) <= 1
    assert float(off[..., 3:].mean()) > 5


def test_a_mask_for_each_reference(run: Sample, pictures: Path) -> None:
    references = ("--ref", pictures / "a.png", pictures / "b.png")
    out = run(*references, "--mask", pictures / "left.png", pictures / "right.png")
    hashes = {
        line["reference"]: line["mask_sha256"]
        for line in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    }
    assert hashes["a"] != hashes["b"]
    # In one batch or alone, the picture is the same.
    alone = run("--ref", pictures / "b.png", "--mask", pictures / "right.png", out="alone")
    pair = [np.asarray(read_image(folder / "b_N2_0.png")).astype(int) for folder in (out, alone)]
    assert np.abs(pair[0] - pair[1]).max() <= 1


def test_masked_picture_is_reproduced(
    run: Sample, pictures: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = ("--ref", pictures / "a.png", "--mask", pictures / "left.png")
    out = run(*masked)
    line = json.loads((out / "manifest.jsonl").read_text())
    command = ["--reproduce", out / "a_N2_0.png", "--ckpt", trained / "checkpoints" / "last.ckpt", "--out"]
    capsys.readouterr()
    assert sample.main([*map(str, command), str(pictures / "again")]) == 0
    assert "identical" in capsys.readouterr().out
    (out / "references" / f"{line['mask_sha256']}.png").unlink()
    error = cli.refused(sample.main, capsys, *command, pictures / "more")
    assert "--reproduce: the mask of the reference (SHA-256" in error
    assert sample.main([*map(str, command), str(pictures / "more"), *map(str, masked)]) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--unconditional", "--mask", "left.png"], "--mask is for --ref"),
        (["--ref", "a.png", "--mask", "none.png"], "--mask: there is no file or folder"),
        (["--ref", "a.png", "--mask", "left.png", "right.png"], "--mask: got 2 masks for 1 references"),
        (["--ref", "a.png", "--mask", "wide.png"], "--mask: wide.png is 32x16 px, its reference a 16x16"),
        (["--ref", "a.png", "--mask", "black.png"], "--mask: black.png is black all over"),
        (["--ref", "a.png", "--exact-low-band", "--range", "25:5"], "give ranges that end at 0"),
        (["--ref", "a.png", "--mask", "left.png", "--start-from", "9"], "--start-from begins from the whole reference"),
        (["--ref", "cut.png", "--start-from", "9", "--steps", "4"], "--start-from begins from the whole reference"),
        (["--ref", "a.png", "--mask", ""], "--mask: a name is empty"),
        (["--unconditional", "--exact-low-band"], "--exact-low-band is for --ref"),
        (["--ref", "a.png", "--exact-low-band", "--kernel", "ideal"], "--exact-low-band is of a kernel that downsamp"),
    ],
)
def test_bad_masks(
    argv: list[str], message: str, trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (32, 16), 255).save(pictures / "wide.png")
    Image.new("L", (16, 16)).save(pictures / "black.png")
    words = [pictures / word if word.endswith(".png") else word for word in argv]
    checkpoint = trained / "checkpoints" / "last.ckpt"
    error = cli.refused(sample.main, capsys, *words, "--ckpt", checkpoint, "--out", pictures / "bad")
    assert message in error


def test_trajectory(run: Sample, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--ref", pictures / "a.png", pictures / "b.png", "--batch-size", 1)
    run(*flags)
    out = run(*flags, "--trajectory")  # the pictures are there, their steps are not
    assert "2 to make" in capsys.readouterr().out
    for name in "ab":
        with Image.open(out / f"{name}_N2_0_steps.webp") as animation:
            assert (getattr(animation, "n_frames", 0), animation.size) == (4, (256, 256))
            animation.seek(3)
            last = np.asarray(animation.convert("RGB"))[16::32, 16::32]
        assert (last == np.asarray(read_image(out / f"{name}_N2_0.png"))).all()
        strip = np.asarray(read_image(out / f"{name}_N2_0_steps.png"))
        tile = strip[44 : 44 + 96, 12 + 4 * (96 + 12) : 12 + 4 * (96 + 12) + 96]
        assert (tile[::12, ::12] == last).all()
    run(*flags, "--trajectory")
    assert "0 to make, 2 already there" in capsys.readouterr().out
    run(*flags, "--overwrite", "--seed", 1)
    assert not list(out.glob("*_steps.*"))  # they were of other pictures


def test_references_of_one_name_keep_their_grids(run: Sample, pictures: Path) -> None:
    for folder in ("x", "y", "z"):
        (pictures / folder).mkdir()
        noise = np.random.default_rng(ord(folder)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / folder / "s.png")
    three = [pictures / folder / "s.png" for folder in ("x", "y", "z")]
    out = run("--ref", *three, "--mask", pictures / "left.png")
    assert len(list(out.glob("s*_grid.png"))) == 3


def test_trajectory_of_many_steps_keeps_some(run: Sample, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilvr_lightning.sampling.writer.IN_ANIMATION", 5)
    out = run("--ref", pictures / "a.png", "--trajectory", "--steps", 12, "--num-samples", 3, "--batch-size", 2)
    for sample_number in range(3):
        with Image.open(out / f"a_N2_{sample_number}_steps.webp") as animation:
            assert getattr(animation, "n_frames", 0) == 5


def test_masks_for_one_reference_given_twice(run: Sample, pictures: Path) -> None:
    out = run("--ref", pictures / "a.png", pictures / "a.png", "--mask", pictures / "left.png", pictures / "right.png")
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({line["mask_sha256"] for line in lines}) == len({line["file"] for line in lines}) == 2
    three = [pictures / name for name in ("a.png", "b.png", "cut.png")]
    masks = [pictures / name for name in ("left.png", "left.png", "right.png")]
    out = run("--ref", *three, "--mask", *masks, out="three")
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 3


def test_frames_are_spread_with_both_ends() -> None:
    frames = [Frame(t, np.zeros((1, 1, 1, 3), np.uint8)) for t in range(100, 0, -1)]
    assert [f.t for f in spread(frames, 4)] == [100, 67, 34, 1]
    assert spread(frames[:3], 4) == frames[:3]
