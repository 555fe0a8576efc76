"""python -m ilvr_lightning.evaluation compare: sets of every kind, figures that are known, and every refusal."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ilvr_lightning.evaluation import compare as module
from ilvr_lightning.evaluation.__main__ import main
from ilvr_lightning.evaluation.features import load_features
from ilvr_lightning.evaluation.images import open_images
from tests.support.cli import refused
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.samples import sample_into

TOON = ROOT / "data" / "toon"
Compare = Callable[..., dict[str, Any]]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Run the command on the pixels' features; gives what it writes into --json."""

    def run(*argv: object) -> dict[str, Any]:
        given = ["compare", *argv, "--json", tmp_path / "figures.json", "--device", "cpu"]
        if "--features" not in argv:
            given += ["--features", "pixels"]
        assert main(list(map(str, given))) == 0
        found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
        return found

    return run


def write_images(folder: Path, count: int = 20, side: int = 16, seed: int = 0, grey: bool = False) -> Path:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for number in range(count):
        pixels = random.integers(0, 256, (side, side) if grey else (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def npz_of(folder: Path, path: Path) -> Path:
    np.savez(path, np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]))
    return path


def test_a_set_is_like_itself_whatever_holds_it(compare: Compare, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a")
    for other in (folder, npz_of(folder, tmp_path / "a.npz")):
        found = compare(folder, other)["columns"]["a"]
        assert found["FD-pixels"]["value"] == pytest.approx(0, abs=1e-6)
        assert found["precision, pixels"]["value"] == found["recall, pixels"]["value"] == 1
        assert [found[f"power, octave {k} of 3"]["value"] for k in (1, 2, 3)] == pytest.approx([1, 1, 1])
        assert found["power, checkerboard"]["value"] == pytest.approx(1)


def test_data_set_against_its_npz(compare: Compare, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = compare(f"{TOON}:test[0:20]", f"{TOON}:train[10:40]")
    assert found["images"] == {"toon:test[0:20]": 20}
    assert found["of_references"] == 30
    out = capsys.readouterr().out
    assert "| FD-pixels | " in out
    assert " ± " in out
    assert "training again with another seed is not in the intervals" in out
    assert "FD-pixels of 20 images: below 2,000 the bias" in out


def test_figures_of_pairs(compare: Compare, tmp_path: Path) -> None:
    """Sources that are 10 grey values darker: L2 and PSNR are known, and samples are paired by order."""
    sources = write_images(tmp_path / "sources", 8)
    (tmp_path / "samples").mkdir()
    for file in sorted(sources.glob("*.png")):
        pixels = np.asarray(Image.open(file)) // 2
        Image.fromarray(pixels).save(file)
        Image.fromarray(pixels + 10).save(tmp_path / "samples" / file.name)
    found = compare(tmp_path / "samples", sources, "--sources", sources)["columns"]["samples"]
    assert found["L2"]["value"] == pytest.approx(10 / 255 * math.sqrt(3 * 256), rel=1e-5)
    assert found["L2"]["low"] == pytest.approx(found["L2"]["value"])
    assert found["PSNR"]["value"] == pytest.approx(20 * math.log10(25.5), rel=1e-5)
    assert "diversity, RMS" not in found  # one sample per source


def test_folder_of_sample_py(trained: Path, images: Path, tmp_path: Path, compare: Compare) -> None:
    """A column per factor; the references that the folder keeps are the sources, as those of the same names are."""
    checkpoint, out = trained / "checkpoints" / "last.ckpt", tmp_path / "out"
    given = [images / f"{number:02}.png" for number in range(5)]
    sample_into(checkpoint, out, "--ref", *given, "--factor", 4, 2, "--num-samples", 3)
    columns = compare(out, images, "--image-size", 8)["columns"]
    assert list(columns) == ["N=4", "N=2"]
    followed = columns["N=2"]
    assert 0 < followed["low-band error"]["value"] < 0.05  # what rounding and clipping to 8 bits leave
    assert followed["L2"]["value"] < columns["N=4"]["L2"]["value"]
    assert followed["SSIM"]["value"] is None  # the window is larger than 8 px
    for name in ("diversity, RMS", "diversity, pixels"):
        assert 0 < followed[name]["low"] < followed[name]["value"] < columns["N=4"][name]["value"]
    named = compare(out, images, "--image-size", 8, "--sources", images)["columns"]
    assert named == columns
    sample_into(checkpoint, tmp_path / "free", "--unconditional", "--num-samples", 6)
    (column,) = compare(tmp_path / "free", images, "--image-size", 8)["columns"].values()
    assert "L2" not in column


def test_diversity_is_that_of_each_source(compare: Compare, tmp_path: Path, trained: Path, images: Path) -> None:
    out = tmp_path / "out"
    sample_into(trained / "checkpoints" / "last.ckpt", out, "--ref", images / "00.png", images / "01.png",
                "--factor", 2, "--num-samples", 2)  # fmt: skip
    by_hand = []
    for name in ("00", "01"):
        a, b = (np.asarray(Image.open(out / f"{name}_N2_{k}.png")) / 255.0 for k in (0, 1))
        by_hand.append(math.sqrt(((a - b) ** 2).mean()))
    found = compare(out, images, "--image-size", 8, "--replicates", 0)["columns"]["N=2"]["diversity, RMS"]
    assert found["value"] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert found["low"] is None


@pytest.mark.parametrize("batch", [1, 64])
def test_figures_do_not_depend_on_the_batch(
    batch: int, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write_images(tmp_path / "a", 9), write_images(tmp_path / "b", 9, seed=1)
    whole = compare(a, b, "--sources", b)["columns"]["a"]
    monkeypatch.setattr("ilvr_lightning.evaluation.ranks.Ranks.over_batches.__defaults__", (batch,))
    parts = compare(a, b, "--sources", b)["columns"]["a"]
    for name, figure in whole.items():
        assert parts[name]["value"] == pytest.approx(figure["value"], rel=1e-6), name


def test_two_processes_give_what_one_gives(compare: Compare, tmp_path: Path) -> None:
    asked = (f"{TOON}:test[0:70]", f"{TOON}:train[0:70]", "--sources", f"{TOON}:train[0:70]", "--replicates", 5)
    one = compare(*asked)
    ended = run_ranks("ilvr_lightning.evaluation.__main__", 2, "compare", *asked, "--features", "pixels",
                      "--device", "cpu", "--json", tmp_path / "two.json")  # fmt: skip
    assert [each.status for each in ended] == [0, 0], ended
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert ended[1].out == ""


def test_greyscale_against_colour_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey, colour = write_images(tmp_path / "grey", grey=True), write_images(tmp_path / "colour")
    asked = ("compare", grey, colour, "--features", "pixels")
    assert "SAMPLES are greyscale and REFERENCES in colour" in refused(main, capsys, *asked)
    assert "SAMPLES are greyscale and --sources in colour" in refused(
        main, capsys, "compare", grey, grey, "--sources", colour, "--features", "pixels"
    )


def test_greyscale_pairs_have_one_channel(tmp_path: Path, compare: Compare) -> None:
    black, white = tmp_path / "black", tmp_path / "white"
    for folder, value in ((black, 0), (white, 255)):
        folder.mkdir()
        for number in range(4):
            Image.new("L", (16, 16), value).save(folder / f"{number}.png")
    found = compare(white, black, "--sources", black, "--features")["columns"]["white"]
    assert found["L2"]["value"] == pytest.approx(16)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, small, empty = write_images(tmp_path / "a"), write_images(tmp_path / "small", side=12), tmp_path / "empty"
    empty.mkdir()
    one, tiny = write_images(tmp_path / "one", 1), write_images(tmp_path / "tiny", side=4)
    mixed = write_images(tmp_path / "mixed", 3)
    Image.new("RGB", (20, 16)).save(mixed / "09.png")
    np.savez(tmp_path / "nan.npz", np.full((4, 16, 16, 3), np.nan, np.float32))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4))
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4nothing")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.png").write_text("no image")
    for references, said in {
        small: "SAMPLES have 16x16 pixels and REFERENCES 12x12; give --image-size 16x16",
        empty: "REFERENCES: no images in",
        one: "REFERENCES holds one image",
        tiny: "images have 4x4 pixels; a side has at least 8",
        mixed: "mixed: 09 has 20x16 pixels and the first image 16x16; give images of one size, or --image-size",
        tmp_path / "nan.npz": "arr_0 is float32 of the shape (4, 16, 16, 3); images are uint8",
        tmp_path / "other.npz": "holds no arr_0",
        tmp_path / "broken.npz": "cannot be read as an npz file",
        tmp_path / "text": "cannot be read as an image",
        tmp_path / "none": "REFERENCES: there is no file or folder",
        f"{TOON}:test[900:]": "the range asked for is empty",
    }.items():
        assert said in refused(main, capsys, "compare", a, references, "--features", "pixels"), references
    assert "mixed has 4 images and a 20" in refused(
        main, capsys, "compare", a, a, "--sources", mixed, "--features", "pixels"
    )
    assert "the known names are efflite" in refused(main, capsys, "compare", a, a, "--features", "vgg")
    assert "there is no file" in refused(main, capsys, "compare", a, a, "--features", "clip=/nowhere")
    assert "did you mean --features" in refused(main, capsys, "compare", a, a, "--feature", "vgg")
    assert "unknown argument more" in refused(main, capsys, "compare", a, a, "--lpips", "more")


def test_sources_are_found_by_name_or_refused(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sample_into(trained / "checkpoints" / "last.ckpt", out, "--ref", images / "20.png", "--factor", 2)
    asked = ["compare", out, images, "--image-size", 8, "--features", "pixels", "--sources"]
    others = write_images(tmp_path / "others", 3)
    assert "there is no '20' in others, which a sample followed" in refused(main, capsys, *asked, others)
    (others / "more").mkdir()
    for folder in (others, others / "more"):
        Image.new("RGB", (8, 8)).save(folder / "20.png")
    assert "others has two images called '20'" in refused(main, capsys, *asked, others)


def test_features_that_are_not_finite_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "a")
    (extract,) = load_features(["pixels"], "cpu")
    object.__setattr__(extract, "compute", lambda x: torch.full((len(x), 2), torch.nan))
    monkeypatch.setattr(module, "load_features", lambda given, device: [extract])
    assert "the features pixels of an image are not finite" in refused(main, capsys, "compare", folder, folder)


def test_images_are_fitted_as_training_images_are(tmp_path: Path) -> None:
    Image.new("RGBA", (30, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    images = open_images(str(tmp_path), (16, 16))
    assert images.pixels([0]).shape == (1, 16, 16, 3)
    assert (images.pixels([0]) == 255).all()  # over white


def test_lpips_of_pairs_and_of_samples_of_one_source(
    trained: Path, images: Path, tmp_path: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network is not at hand: the mean difference of the 8-bit values that it would be given stands in."""

    def stand_in(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.uint8
        assert a.shape[1:] == b.shape[1:] == (3, 8, 8)
        return (a.double() - b.double()).abs().mean((1, 2, 3))

    monkeypatch.setattr(module, "load_lpips", lambda device: stand_in)
    out = tmp_path / "out"
    sample_into(trained / "checkpoints" / "last.ckpt", out, "--ref", images / "00.png", "--factor", 2)
    found = compare(out, images, "--image-size", 8, "--lpips")["columns"]["N=2"]
    samples = [np.asarray(Image.open(out / f"00_N2_{k}.png")).astype(float) for k in range(4)]
    pairs = [np.abs(a - b).mean() for k, a in enumerate(samples) for b in samples[:k]]
    assert found["diversity, LPIPS"]["value"] == pytest.approx(np.mean(pairs))
    (kept,) = (out / "references").iterdir()
    source = np.asarray(Image.open(kept)).astype(float)
    assert found["LPIPS"]["value"] == pytest.approx(np.mean([np.abs(a - source).mean() for a in samples]))
