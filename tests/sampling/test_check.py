"""sample.py --check and --factor auto."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sample
from ilvr_lightning.checkpoints.__main__ import main as checkpoints
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.metrics.fit import Fit
from ilvr_lightning.sampling import fit
from tests.support import cli
from tests.support.samples import index, listed, pixels, sample_into

Said = Callable[..., str]


@pytest.fixture(scope="module")
def scored(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained network with the scores of 24 pictures."""
    folder = tmp_path_factory.mktemp("scored")
    random = np.random.default_rng(3)
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    out = folder / "model.safetensors"
    argv = ["export", checkpoint, "--to", "safetensors", out, "--check-images", folder]
    assert checkpoints(list(map(str, argv))) == 0
    return out


@pytest.fixture
def said(scored: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    def said(*argv: object) -> str:
        capsys.readouterr()
        command = ["--ckpt", scored, "--ref", references / "a.png", references / "b.png", "--out", tmp_path / "out"]
        assert sample.main(list(map(str, [*command, "--device", "cpu", *argv]))) == 0
        return capsys.readouterr().out

    return said


@pytest.fixture
def fits_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference fits from N=8 on if it is bright, else from N=4 on."""

    def check_reference(denoise: object, y: Tensor, factors: object) -> list[Fit]:
        least = 8 if float(y.mean()) > 0 else 4
        return [
            Fit(
                factor=n, p=0.5 if n >= least else 0.01, fits=n >= least, reason="" if n >= least else "its mean colour"
            )
            for n in (4, 8)
        ]

    monkeypatch.setattr(fit, "check_reference", check_reference)
    monkeypatch.setattr("ilvr_lightning.metrics.fit.KEPT", 1)  # the images have 8 px


@pytest.fixture
def bright_and_dark(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "bright.png", tmp_path / "dark.png"]
    for path, value in zip(paths, (200, 50), strict=True):
        Image.new("RGB", (8, 8), (value, value, value)).save(path)
    return paths


def test_export_adds_scores_and_changes_nothing_else(checkpoint: Path, scored: Path) -> None:
    before, after = load_denoiser(checkpoint, say=None), load_denoiser(scored, say=None)
    assert not before.fit_scores
    assert {n: (len(of), len(of[0])) for n, of in after.fit_scores.items()} == {2: (24, 3), 4: (24, 2)}
    assert after.fastest().fit_scores == after.fit_scores
    for name, weight in before.network.state_dict().items():
        assert torch.equal(weight, after.network.state_dict()[name])
    assert before.description.octave_gains == after.description.octave_gains
    assert not load_denoiser(scored, "raw", say=None).fit_scores


def test_a_line_per_reference_and_factor_and_a_sheet(said: Said, tmp_path: Path) -> None:
    out = said("--check")
    lines = [line for line in out.splitlines() if line[:2] in ("a ", "b ")]
    assert [line.split()[:2] for line in lines if "N=" in line.split()[1]] == [
        [name, f"N={n}"] for name in "ab" for n in (2, 4)
    ]
    assert sum(" take N=" in line or "fits at no N" in line for line in lines) == 2
    assert listed_files(tmp_path / "out") == ["check.png"]
    with Image.open(tmp_path / "out" / "check.png") as sheet:
        assert sheet.size[1] > 2 * 96
    assert next(line.split()[1] for line in said("--check", "--factor", 4).splitlines() if line[:2] == "a ") == "N=4"


def listed_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("fits_from")
def test_what_is_said(said: Said, bright_and_dark: list[Path], tmp_path: Path) -> None:
    out = said("--check", "--ref", *bright_and_dark)
    assert "bright       N=4   does not fit (p = 0.01: its mean colour)\n" in out
    assert "bright       take N=8, which fits (p = 0.5); at N=4 it does not fit (p = 0.01: its mean colour)\n" in out
    assert "dark         take N=4, which fits (p = 0.5)\n" in out
    sheet = pixels(tmp_path / "out" / "check.png")
    assert all((sheet == colour).all(2).any() for colour in ((0, 160, 60), (210, 30, 30)))


@pytest.mark.usefixtures("fits_from")
def test_each_reference_is_sampled_at_its_own_factor(scored: Path, bright_and_dark: list[Path], tmp_path: Path) -> None:
    argv = ("--ref", *bright_and_dark, "--factor", "auto", "--num-samples", 2)
    out = sample_into(scored, tmp_path / "auto", *argv)
    assert listed(out) == ["bright_N8_0.png", "bright_N8_1.png", "dark_N4_0.png", "dark_N4_1.png"]
    assert [line["recipe"]["plan"]["factor"] for line in index(out)] == [8, 8, 4, 4]
    assert len(listed_files(out / "low_pass")) == 2
    alone = sample_into(scored, tmp_path / "alone", "--ref", bright_and_dark[0], "--factor", 8, "--num-samples", 2)
    for name in ("bright_N8_0", "bright_N8_1"):
        assert (pixels(out / f"{name}.png") == pixels(alone / f"{name}.png")).all()
    grid = pixels(out / "grid.png")
    for row, name in enumerate(("bright_N8_0", "dark_N4_0")):
        top, left = 44 + row * 98, 12 + 96 + 12 + 98
        assert (grid[top : top + 96, left : left + 96][::12, ::12] == pixels(out / f"{name}.png")).all()


@pytest.mark.usefixtures("fits_from")
def test_auto_keeps_something_of_a_reference(
    said: Said, bright_and_dark: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilvr_lightning.metrics.fit.KEPT", 2)
    out = said("--ref", *bright_and_dark, "--num-samples", 1)
    assert (
        "factor       bright: take N=4; it does not fit (p = 0.01: its mean colour), but N=8 would keep only 1x1 pixels"
        in out
    )
    assert "factor       dark: take N=4, which fits (p = 0.5)\n" in out


@pytest.mark.usefixtures("fits_from")
def test_the_default_is_auto_where_it_can_be(
    checkpoint: Path, scored: Path, bright_and_dark: list[Path], tmp_path: Path
) -> None:
    argv = ("--ref", *bright_and_dark, "--num-samples", 1)
    assert listed(sample_into(scored, tmp_path / "scored", *argv)) == ["bright_N8_0.png", "dark_N4_0.png"]
    assert listed(sample_into(checkpoint, tmp_path / "old", *argv)) == ["bright_N8_0.png", "dark_N8_0.png"]
    assert listed(sample_into(scored, tmp_path / "two", *argv, "--factor", 2)) == ["bright_N2_0.png", "dark_N2_0.png"]
    other_size = sample_into(scored, tmp_path / "size", *argv, "--image-size", 16)
    assert listed(other_size) == ["bright_N8_0.png", "dark_N8_0.png"]


@pytest.mark.usefixtures("fits_from")
def test_a_second_start_finds_what_is_there(
    scored: Path, bright_and_dark: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--ref", *bright_and_dark, "--factor", "auto", "--num-samples", 1)
    sample_into(scored, tmp_path / "out", *argv)
    sample_into(scored, tmp_path / "out", *argv)
    assert "0 to make, 2 already there" in capsys.readouterr().out


def test_what_is_refused(
    checkpoint: Path, scored: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(ckpt: Path, *argv: object) -> str:
        asked = ("--ref", references / "a.png", "--out", tmp_path / "out", "--device", "cpu", *argv)
        return cli.refused(sample.main, capsys, "--ckpt", ckpt, *asked)

    for flag in (("--check",), ("--factor", "auto")):
        assert "export CKPT --to safetensors OUT --check-images HELD_OUT_IMAGES adds them" in refused(checkpoint, *flag)
        assert "images of another size were scored: got 16x16" in refused(scored, *flag, "--image-size", 16)
    assert "--factor must divide the image size: got factor=3" in refused(scored, "--check", "--factor", 3)
    assert "held-out images were scored at N=2, 4 alone: got N=8" in refused(scored, "--check", "--factor", 8)
    assert "--factor auto chooses one N for each reference; give it alone" in refused(scored, "--factor", "auto", 4)
    assert "got 'small'; give an integer, or auto" in refused(scored, "--factor", "small")


def test_what_is_followed_in_parts_is_not_checked(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = np.full((8, 8, 4), 200, np.uint8)
    cut[:4, :, 3] = 0
    Image.fromarray(cut).save(tmp_path / "cut.png")
    out = sample_into(scored, tmp_path / "out", "--ref", tmp_path / "cut.png", "--factor", "auto", "--num-samples", 1)
    assert listed(out) == ["cut_N8_0.png"]
    assert "cut: N=8; it has a mask, and only whole references are checked" in capsys.readouterr().out
