"""translation, bpd and memorised: what they sample and measure, and what they refuse."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ilvr_lightning.evaluation.__main__ import main
from ilvr_lightning.evaluation.table import Table, bias_note, cell
from ilvr_lightning.metrics.intervals import Figure
from tests.support.cli import refused
from tests.support.paths import ROOT

TOON = ROOT / "data" / "toon"


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


def figures(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture
def domains(tmp_path: Path, images: Path) -> Path:
    """The layout of AFHQ: val/cat and val/dog with images of one size."""
    for domain, files in (("cat", range(6)), ("dog", range(6, 21))):
        (tmp_path / "afhq" / "val" / domain).mkdir(parents=True)
        for number in files:
            shutil.copy(images / f"{number:02}.png", tmp_path / "afhq" / "val" / domain / f"flickr_{number:06}.png")
    return tmp_path / "afhq" / "val"


def translation(checkpoint: Path, domains: Path, out: Path, *argv: object) -> list[str]:
    asked = ("translation", "--ckpt", checkpoint, "--sources", domains / "cat", "--targets", domains / "dog",
             "--features", "pixels", "--device", "cpu", "--preset", "draft", "--steps", 4, "--out", out,
             *argv)  # fmt: skip
    return list(map(str, asked))


def test_translation_of_a_folder_in_the_layout_of_afhq(
    checkpoint: Path, domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = translation(checkpoint, domains, tmp_path / "out", "--factor", 2, 4, "--range", "10:0", "10:5", "--repeats",
                        2, "--json", tmp_path / "found.json")  # fmt: skip
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "| FD-pixels | L2 | PSNR | SSIM |" in out
    assert "over 2 repeats" in out
    found = figures(tmp_path / "found.json")
    assert list(found["columns"]) == ["N=2, 10:0", "N=2, 10:5", "N=4, 10:0", "N=4, 10:5"]
    assert (found["of_sources"], found["of_targets"], found["repeats"]) == (6, 15, 2)
    l2 = {label: row["L2"]["value"] for label, row in found["columns"].items()}
    assert l2["N=2, 10:0"] < l2["N=4, 10:0"] < l2["N=4, 10:5"]
    assert len(list((tmp_path / "out").glob("flickr_*.png"))) == 6 * 4 * 2
    plot = tmp_path / "out" / "translation.png"
    assert plot.exists() == (importlib.util.find_spec("matplotlib") is not None)
    if not plot.exists():
        assert "no plot, because matplotlib is not installed" in out
    assert main(asked) == 0  # a second start samples nothing and finds the same
    assert "samples      0 to make, 48 already there" in capsys.readouterr().out
    assert figures(tmp_path / "found.json") == found


def test_translation_measures_as_compare_does(checkpoint: Path, domains: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*translation(checkpoint, domains, out, "--factor", 2), "--json", str(tmp_path / "a.json")]) == 0
    argv = ["compare", out, domains / "dog", "--features", "pixels", "--image-size", 8, "--json", tmp_path / "b.json"]
    assert main(list(map(str, argv))) == 0
    (row,), (column,) = (figures(tmp_path / name)["columns"].values() for name in ("a.json", "b.json"))
    assert set(row) == {"FD-pixels", "L2", "PSNR", "SSIM"}
    for name, figure in row.items():
        assert column[name] == figure


def test_translation_refuses(
    checkpoint: Path, domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, said in {
        ("--factor", "auto"): "--factor auto: the table compares values of N; give one or several, such as --factor 4",
        ("--ref", "a.png"): "translation takes no --ref; --sources, --targets and --repeats say what is sampled",
        ("--repeats", 0): "--repeats must be at least 1: got 0",
        ("--factor", 3): "--factor",
        ("--factr", 3): "did you mean --factor?",
        ("--targets", tmp_path / "none"): "--targets: there is no file or folder",
        ("--sources", tmp_path / "none"): "--sources: there is no file or folder",
    }.items():
        assert said in refused(main, capsys, *translation(checkpoint, domains, tmp_path / "out", *argv)), argv
    assert not (tmp_path / "out").exists()


def test_bits_per_dimension(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    argv = ["bpd", "--ckpt", checkpoint, "--data", images, "--levels", 5, "--device", "cpu", "--json", tmp_path / "a"]
    assert main(list(map(str, argv))) == 0
    found = figures(tmp_path / "a")
    bits = found["columns"]["bits per dimension"]
    assert found["images"] == 21
    assert bits["bound"]["low"] < bits["bound"]["value"] < bits["bound"]["high"]
    assert bits["bound"]["value"] == pytest.approx(sum(bits[n]["value"] for n in ("prior", "diffusion", "decoder")))


def test_bits_refuse(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "--data: no images in" in refused(main, capsys, "bpd", "--ckpt", checkpoint, "--data", tmp_path / "empty")
    asked = ("bpd", "--ckpt", checkpoint, "--data", f"{TOON}:test", "--levels", 1)
    assert "--levels must be from 2 to 1000: got 1" in refused(main, capsys, *asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing(checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("bpd", "--ckpt", checkpoint, "--data", images), ("compare", images, images, "--features", "efflite")):
        said = refused(main, capsys, *argv, "--device", "cuda")
        assert "--device cuda: this machine has none; give --device cpu" in said


def test_planted_copies_are_found(tmp_path: Path) -> None:
    """Ten of forty samples are training images, two of them mirrored; the others are held-out images."""
    from ilvr_lightning.evaluation.images import open_images

    train, held_out = open_images(f"{TOON}:train[0:300]"), open_images(f"{TOON}:test[0:400]")
    planted = [train.load(row) for row in range(8)] + [train.load(row)[:, ::-1] for row in (8, 9)]
    np.savez(tmp_path / "samples.npz", np.stack([*planted, *(held_out.load(row) for row in range(30))]))
    argv = ["memorised", tmp_path / "samples.npz", f"{TOON}:train[0:300]", f"{TOON}:test[30:400]", "--features",
            "pixels", "--sheet", tmp_path / "sheet.png", "--json", tmp_path / "found.json"]  # fmt: skip
    assert main(list(map(str, argv))) == 0
    found = figures(tmp_path / "found.json")["columns"]["pixels"]["copies, share of the samples"]
    assert 10 / 40 <= found["value"] <= 12 / 40
    assert found["low"] < found["value"] < found["high"]
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 8 * 96
    assert sheet.height > 8 * 96


def test_training_images_among_those_held_out_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["memorised", f"{TOON}:train[0:20]", f"{TOON}:train[0:100]", f"{TOON}:train[0:100]", "--features", "pixels"]
    assert main(argv) == 0
    assert "1% of HELD_OUT or more are training images, so that no copy is found" in capsys.readouterr().out


def test_few_held_out_images_make_chance_coarser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [f"{TOON}:train[0:20]", f"{TOON}:train[0:100]", f"{TOON}:test[0:25]"]
    assert main(["memorised", *sets, "--features", "pixels", "--json", str(tmp_path / "found.json")]) == 0
    assert "nearer to a training image than 96% of HELD_OUT are; 0.04 is chance" in capsys.readouterr().out
    assert figures(tmp_path / "found.json")["columns"]["pixels"]["copies, share of the samples"]["value"] == 1


def test_memorised_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [f"{TOON}:train[0:20]", f"{TOON}:train[0:20]", f"{TOON}:test[0:10]"]
    assert "HELD_OUT holds 10 images; at least 20" in refused(main, capsys, "memorised", *sets, "--features", "pixels")
    assert "--features: give at least one" in refused(main, capsys, "memorised", *sets, "--features")


def test_cells_have_the_digits_that_their_intervals_give_sense_to() -> None:
    assert cell(Figure(value=12.3456, error=0.5)) == "12.35 ± 0.98"
    assert cell(Figure(value=1234.5, error=20)) == "1234 ± 39"
    assert cell(Figure(value=3.2e-9, error=1e-10)) == "3.2e-09 ± 2e-10"
    assert cell(Figure(value=12.3456)) == "12.35"
    assert cell(None) == cell(Figure(value=float("nan"))) == ""


def test_table_lies_or_stands() -> None:
    columns = {"a": {"x": Figure(value=1), "y": Figure(value=2)}, "b": {"x": Figure(value=3)}}
    upright, lying = (Table(columns=columns, about={}, upright=upright).lines() for upright in (True, False))
    assert upright[:4] == ["|  | a | b |", "|---|---|---|", "| x | 1 | 3 |", "| y | 2 |  |"]
    assert lying[:4] == ["|  | x | y |", "|---|---|---|", "| a | 1 | 2 |", "| b | 3 |  |"]


def test_bias_is_said_of_few_images_alone() -> None:
    assert "FID of 500 images" in bias_note(["FID"], 500, 5000)[0]
    assert bias_note(["FID"], 2000, 5000) == bias_note([], 10, 10) == []
