"""sample.py's command line: files, names, recipes, the seed contract, and bad input in one line."""

import functools
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample
from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.load import file_sha256, load_denoiser
from ilvr_lightning.data.references import find_images, find_references
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from tests.support import cli

Sample = Callable[..., Path]
TrainRun = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png, b.png and other/a.png, all different."""
    folder = tmp_path_factory.mktemp("references")
    (folder / "other").mkdir()
    random = np.random.default_rng(1)
    for name in ("a.png", "b.png", "other/a.png"):
        Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Sample:
    """Sample with four steps into tmp_path/out, or where --out says; gives the folder."""

    def run(*argv: object, out: str = "out") -> Path:
        arguments = ["--ckpt", checkpoint, "--steps", 4, "--device", "cpu", "--out", tmp_path / out, *argv]
        assert sample.main(list(map(str, arguments))) == 0
        return tmp_path / out

    return run


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.png"))


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int64)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def difference(a: Path, b: Path) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


# What is written


def test_files_and_manifest(run: Sample, references: Path, checkpoint: Path) -> None:
    paths = [references / "a.png", references / "b.png"]
    out = run("--ref", *paths, "--factor", 2, 4, "--num-samples", 2, "--seed", 7)
    stems = [f"{r}_N{n}_{k}" for r in "ab" for n in (2, 4) for k in (0, 1)]
    assert names(out) == sorted([*(f"{stem}.png" for stem in stems), "a_grid.png", "b_grid.png", "grid.png"])
    lines = manifest(out)
    assert [line["file"] for line in lines] == [f"{stem}.png" for stem in stems]
    fitted = {r.name: r for r in find_references([str(path) for path in paths], (3, 8, 8))}
    for line in lines:
        reference = fitted[line["file"][0]]
        expected = {
            "reference": reference.name, "reference_sha256": reference.sha256, "seed": 7,
            "checkpoint_sha256": file_sha256(checkpoint), "sample": int(line["file"][-5]),
            "batch_size": 8, "precision": "32", "device": "cpu",
        }  # fmt: skip
        assert {key: line[key] for key in expected} == expected
        assert line["plan"]["factor"] == int(line["file"][3])
        assert (line["plan"]["num_steps"], line["plan"]["condition_from"]) == (4, 25)
        assert (pixels(out / "references" / f"{reference.sha256}.png") == reference.pixels).all()
        assert pixels(out / line["file"]).shape == (8, 8, 3)
    assert len({(out / line["file"]).read_bytes() for line in lines}) == 8


def test_grids_show_the_samples(run: Sample, references: Path) -> None:
    out = run("--ref", references / "a.png", "--factor", 2, 4, "--num-samples", 2)
    grid = pixels(out / "a_grid.png")
    left = 12 + 96 + 12
    for column, name in [(98, "a_N2_0"), (196, "a_N2_1"), (292 + 12 + 98, "a_N4_0")]:
        tile = grid[44 : 44 + 96, left + column : left + column + 96]
        assert (tile[::12, ::12] == pixels(out / f"{name}.png")).all(), name


def test_sweep_of_ranges_in_one_grid(run: Sample, references: Path) -> None:
    """References down, settings across: the low-pass image of each factor, then its ranges; x_T is shared."""
    out = run("--ref", references / "a.png", references / "b.png", "--factor", 2, 4, "--range", "25:0", "25:12",
              "--num-samples", 1, "--sampler", "ddim")  # fmt: skip
    stems = [f"{r}_N{n}_t25-{b}_0" for r in "ab" for n in (2, 4) for b in (0, 12)]
    assert [line["file"] for line in manifest(out)] == [f"{stem}.png" for stem in stems]
    assert [line["plan"]["condition_to"] for line in manifest(out)] == [0, 12] * 4
    grid = pixels(out / "grid.png")
    left = 12 + 96 + 12
    for column, name in enumerate(("low", "a_N2_t25-0_0", "a_N2_t25-12_0", "low", "a_N4_t25-0_0", "a_N4_t25-12_0")):
        tile = grid[44 : 44 + 96, left + column * (96 + 12) : left + column * (96 + 12) + 96]
        if name != "low":
            assert (tile[::12, ::12] == pixels(out / f"{name}.png")).all(), name
    # Alone, each is the same picture: a batch may hold a whole sweep.
    flags = ("--factor", 4, "--range", "25:12", "--num-samples", 1, "--sampler", "ddim")
    alone = run("--ref", references / "a.png", *flags, out="alone")
    assert difference(out / "a_N4_t25-12_0.png", alone / "a_N4_0.png") <= 1


def test_sweep_fills_in_what_is_not_given(run: Sample, references: Path) -> None:
    out = run("--ref", references / "a.png", "--sweep", "--num-samples", 1)
    ranges = [(25, 0), (25, 6), (25, 12), (25, 19)]
    assert [(line["plan"]["factor"], line["plan"]["condition_from"], line["plan"]["condition_to"])
            for line in manifest(out)] == [(4, a, b) for a, b in ranges]  # fmt: skip
    out = run(
        "--ref", references / "a.png", "--sweep", "--factor", 2, 8, "--range", "20:3", "--num-samples", 1, out="b"
    )
    assert [(line["plan"]["factor"], line["plan"]["condition_from"]) for line in manifest(out)] == [(2, 20), (8, 20)]


def test_png_holds_its_recipe_and_no_place(run: Sample, references: Path, tmp_path: Path) -> None:
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    with Image.open(out / "a_N2_0.png") as image:
        recipe = json.loads(image.info["ilvr_lightning"])
    assert {**recipe, "file": "a_N2_0.png"} == manifest(out)[0]
    texts = [(out / "a_N2_0.png").read_bytes(), (out / "manifest.jsonl").read_bytes()]
    for text in texts:
        for secret in (str(tmp_path), str(references), "/tmp", "/root", socket.gethostname() + "."):
            assert secret.encode() not in text
    assert not {"host", "path", "user"} & set(recipe)


def test_folder_is_continued(run: Sample, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state(folder: Path) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in folder.glob("a_N*.png")}

    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    first = state(out)
    run("--ref", references / "a.png", "--factor", 2, "--num-samples", 2)
    assert "1 to make, 1 already there" in capsys.readouterr().out
    second = state(out)
    assert {name: second[name] for name in first} == first
    assert second.keys() == {"a_N2_0.png", "a_N2_1.png"}
    run("--ref", references / "a.png", "--factor", 2, "--num-samples", 2)
    assert state(out) == second
    assert len(manifest(out)) == 2
    run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1, "--overwrite")
    third = state(out)
    assert third["a_N2_0.png"] > second["a_N2_0.png"]
    assert third["a_N2_1.png"] == second["a_N2_1.png"]


@pytest.mark.parametrize("change", [["--seed", 1], ["--eta", 0.5], ["--weights", "raw"], ["--kernel", "box"]])
def test_another_recipe_gets_a_name_of_its_own(change: list[object], run: Sample, references: Path) -> None:
    command = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 1, "--sampler", "ddim"]
    out = run(*command)
    first = (out / "a_N2_0.png").read_bytes()
    run(*command, *change)
    assert (out / "a_N2_0.png").read_bytes() == first
    other = {name for name in names(out) if "grid" not in name} - {"a_N2_0.png"}
    assert len(other) == 1
    stem, _, digest = other.pop().removesuffix(".png").rpartition("_")
    assert stem == "a_N2_0"
    assert len(digest) == 8
    run(*command, *change)
    assert len(names(out)) == 4


def test_references_of_one_name(run: Sample, references: Path) -> None:
    out = run("--ref", references / "a.png", references / "other" / "a.png", "--factor", 2, "--num-samples", 1)
    lines = manifest(out)
    assert len({line["file"] for line in lines}) == len({line["reference_sha256"] for line in lines}) == 2
    assert all(line["file"].startswith("a_N2_0_") for line in lines)
    assert len([name for name in names(out) if name.endswith("_grid.png")]) == 2


# The seed contract


def test_batch_size_does_not_matter(run: Sample, references: Path) -> None:
    command = ["--ref", references / "a.png", references / "b.png", "--factor", 2, 4, "--num-samples", 2]
    one, four = run(*command, "--batch-size", 1, out="one"), run(*command, "--batch-size", 4, out="four")
    assert max(difference(one / name, four / name) for name in names(one)) <= 1
    assert {line["batch_size"] for line in manifest(four)} == {4}


def test_order_and_company_of_references_do_not_matter(run: Sample, references: Path) -> None:
    a, b = references / "a.png", references / "b.png"
    both = run("--ref", a, b, "--factor", 2, "--num-samples", 1, out="both")
    turned = run("--ref", b, a, "--factor", 2, "--num-samples", 1, out="turned")
    alone = run("--ref", b, "--factor", 2, "--num-samples", 3, out="alone")
    for name in ("a_N2_0.png", "b_N2_0.png"):
        assert difference(both / name, turned / name) <= 1
    assert difference(both / "b_N2_0.png", alone / "b_N2_0.png") <= 1


def test_low_band_follows_the_reference(run: Sample, references: Path) -> None:
    """The last step is conditioned with t=0, where the reference has no noise: phi(sample) is phi(reference)."""
    from ilvr_lightning.data.images import to_tensor
    from ilvr_lightning.diffusion.low_pass import LowPassFilter

    out = run("--ref", references / "a.png", "--factor", 4, "--num-samples", 1, "--orthogonal", "--kernel", "box")
    low_pass = LowPassFilter((8, 8), 4, "box", True)
    found, wanted = (
        low_pass(to_tensor(pixels(p).astype(np.uint8))[None])
        for p in (out / "a_N4_0.png", next((out / "references").iterdir()))
    )
    near, far = (found - wanted).abs().mean(), (found + wanted).abs().mean()
    assert near < 0.1 < far  # clipping to 8 bits moves it a little


# What can be asked for


def test_unconditional(run: Sample, tmp_path: Path) -> None:
    out = run("--unconditional", "--num-samples", 3)
    assert names(out) == ["unconditional_0.png", "unconditional_1.png", "unconditional_2.png", "unconditional_grid.png"]
    assert {(line["reference"], line["reference_sha256"]) for line in manifest(out)} == {(None, None)}
    assert len({pixels(out / f"unconditional_{k}.png").tobytes() for k in range(3)}) == 3


@pytest.mark.parametrize(("size", "shape"), [("16", (16, 16, 3)), ("8x16", (8, 16, 3))])
def test_image_size(size: str, shape: tuple[int, ...], run: Sample, references: Path) -> None:
    out = run("--ref", references / "a.png", "--image-size", size, "--factor", 4, "--num-samples", 1)
    assert pixels(out / "a_N4_0.png").shape == shape
    assert pixels(next((out / "references").iterdir())).shape == shape


def test_fit(run: Sample, references: Path) -> None:
    out = run("--ref", references / "a.png", "--fit", "pad", "--factor", 2, "--num-samples", 1)
    assert (pixels(next((out / "references").iterdir()))[0] == 255).all()


def test_folders_and_globs(run: Sample, references: Path) -> None:
    for number, pattern in enumerate((".", "**/*.png")):
        out = run("--ref", references / pattern, "--factor", 2, "--num-samples", 1, out=f"out{number}")
        assert len(manifest(out)) == 3


def test_rows_of_a_data_set(run: Sample, images: Path) -> None:
    out = run("--ref", "data/toon:test[2:4]", "--factor", 2, "--num-samples", 1)
    assert [line["file"] for line in manifest(out)] == ["test_2_N2_0.png", "test_3_N2_0.png"]


def test_greyscale_and_learned_variance(
    train_run: TrainRun, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_run("grey_learned", "data.channels=1", "model.learn_sigma=true")
    command = [
        "--ckpt", folder / "checkpoints" / "best.ckpt", "--ref", references / "a.png", "--factor", 2,
        "--num-samples", 1, "--steps", 4, "--device", "cpu", "--sampler", "ddpm", "--variance",
        "learned", "--out", tmp_path,
    ]  # fmt: skip
    assert sample.main(list(map(str, command))) == 0
    with Image.open(tmp_path / "a_N2_0.png") as image:
        assert image.mode == "L"


def test_newest_run_is_the_default(
    trained: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(trained.parents[1])
    command = ["--ref", references / "a.png", "--steps", 2, "--factor", 2, "--device", "cpu", "--num-samples", 1]
    assert sample.main(list(map(str, command))) == 0
    assert "checkpoint   runs/tiny/" in capsys.readouterr().out
    assert (tmp_path / "samples" / "a_N2_0.png").exists()


def test_shipped_model_where_there_is_no_run(
    checkpoint: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By itself, by its name, and behind a run; a picture of it is found again."""
    shipped = tmp_path / "data" / "pretrained"
    export(load_denoiser(checkpoint, say=None), "safetensors", shipped / "toon64")
    export(load_denoiser(checkpoint, "raw", say=None), "safetensors", shipped / "other")
    monkeypatch.chdir(tmp_path)
    for module in ("checkpoints.find", "sampling.reproduce"):
        monkeypatch.setattr(f"ilvr_lightning.{module}.BUNDLED", shipped)

    def said(*argv: object) -> str:
        asked = [] if "--reproduce" in argv else ["--steps", 2, "--num-samples", 1, "--unconditional", "--device=cpu"]
        assert sample.main(list(map(str, [*asked, *argv]))) == 0
        return capsys.readouterr().out

    assert "checkpoint   data/pretrained/toon64" in said("--out", "a")
    assert "checkpoint   data/pretrained/other" in said("--ckpt", "other", "--out", "b")
    assert "identical" in said("--reproduce", "b/unconditional_0.png", "--out", "again")
    Path("runs").symlink_to(checkpoint.parents[3])
    assert "checkpoint   runs/tiny/" in said("--out", "c")


def test_compiled_run(
    run: Sample, references: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--compile true compiles for the first batch and changes nothing; auto leaves so short a run alone."""
    shapes: list[tuple[int, ...]] = []

    def compile_(function: Callable[..., torch.Tensor], **_: Any) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return function(x, t)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    asked = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 2]
    plain, compiled = run(*asked, out="plain"), run(*asked, "--compile", "true", out="compiled")
    assert shapes == [(2, 3, 8, 8)] * 5
    assert difference(plain / "a_N2_0.png", compiled / "a_N2_0.png") == 0
    assert [line["compiled"] for line in manifest(plain) + manifest(compiled)] == [False] * 2 + [True] * 2
    assert "--compile: got 'yes'; give auto, true or false" in refused(capsys, *asked, "--compile", "yes")


def test_bf16(run: Sample, references: Path) -> None:
    """The network alone is rounded: the low band is met as in float32, the rest a little off."""
    asked = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 1]
    full, half = run(*asked, out="full"), run(*asked, "--precision", "bf16", out="half")
    assert manifest(half)[0]["precision"] == "bf16"
    assert 0 < difference(full / "a_N2_0.png", half / "a_N2_0.png") < 64
    low_pass = LowPassFilter((8, 8), 2, orthogonal=True)
    a, b = (low_pass(torch.tensor(pixels(out / "a_N2_0.png")).permute(2, 0, 1)[None].double()) for out in (full, half))
    assert float((a - b).abs().max()) < 3


# Again


@pytest.mark.parametrize("asked", [["--ref", "a.png", "--factor", "2", "4"], ["--unconditional"]])
def test_reproduce(
    asked: list[str], run: Sample, references: Path, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = run(*(references / word if word == "a.png" else word for word in asked), "--num-samples", 3)
    made = out / manifest(out)[-2]["file"]
    capsys.readouterr()
    command = ["--reproduce", made, "--ckpt", checkpoint, "--out", tmp_path / "again"]
    assert sample.main(list(map(str, command))) == 0
    assert "identical" in capsys.readouterr().out
    assert (pixels(tmp_path / "again" / made.name) == pixels(made)).all()
    # Where a picture of that name is, it goes beside it.
    assert sample.main(list(map(str, command))) == 0
    beside = tmp_path / "again" / f"{made.stem}_reproduced.png"
    assert (pixels(beside) == pixels(made)).all()
    assert "is there already; give another folder" in refused(capsys, *command)


def test_reproduce_says_what_is_missing(
    run: Sample, references: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    made, again = out / "a_N2_0.png", ["--out", str(tmp_path / "again")]
    monkeypatch.chdir(tmp_path)
    assert "the checkpoint with SHA-256" in refused(capsys, "--reproduce", made, *again)
    for kept in (out / "references").iterdir():
        kept.unlink()
    known = ["--ckpt", checkpoint, *again]
    assert "the reference 'a' (SHA-256" in refused(capsys, "--reproduce", made, *known)
    assert "the reference 'a' (SHA-256" in refused(capsys, "--reproduce", made, *known, "--ref", references / "b.png")
    command = ["--reproduce", made, *known, "--ref", references / "a.png"]
    assert sample.main(list(map(str, command))) == 0
    assert "no recipe of ours" in refused(capsys, "--reproduce", references / "a.png", *known)
    assert "there is no file" in refused(capsys, "--reproduce", tmp_path / "none.png", *known)


# Bad input


refused = functools.partial(cli.refused, sample.main)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--ref is missing"),
        ("--ref a.png --unconditional", "give --ref or --unconditional, not both"),
        ("--ref a.png --refs", "--refs"),
        ("--ref a.png --preset best", "--preset: invalid choice: 'best'"),
        ("--ref a.png --sampler euler", "--sampler: invalid choice: 'euler'"),
        ("--ref a.png --steps 0", "--steps must be at least 1: got 0"),
        ("--ref a.png --steps many", "--steps"),
        ("--ref a.png --steps 26", "--steps must be at most T=25: got 26"),
        ("--ref a.png --factor 3", "factor must divide the image size: got factor=3 for 8 px; the nearest that do"),
        ("--ref a.png --factor 0", "factor must be at least 1: got 0"),
        ("--ref a.png --range 5:10", "the range is reversed"),
        ("--ref a.png --range 30:0", "--range must be in [0, 25]: got 30"),
        ("--ref a.png --range 10", "--range: got '10'; give two timesteps A:B"),
        ("--ref a.png --range 25:0 25:0", "--range must list ranges, each once"),
        ("--ref a.png --range 25:0 5:10", "the range is reversed"),
        ("--unconditional --sweep", "--sweep is for --ref"),
        ("--ref a.png --override num_heads", "--override: got 'num_heads'; give KEY=VALUE"),
        (
            "--ref a.png --override num_heads=2",
            "override num_heads: a checkpoint of ilvr_lightning has no such override",
        ),
        ("--ref a.png --start-from 30", "--start-from must be in [1, 25]: got 30"),
        ("--ref a.png --preset paper --eps-extrapolation 1", "--eps-extrapolation is of --reference-noise=matched"),
        ("--ref a.png --sampler ddim --eta -1", "--eta must be between 0 and 1: got -1"),
        ("--ref a.png --num-samples 0", "--num-samples must be at least 1: got 0"),
        ("--ref a.png --batch-size -2", "--batch-size must be at least 1: got -2"),
        ("--ref a.png --devices 0", "--devices must be at least 1: got 0"),
        ("--ref a.png --seed -1", "--seed must be from 0 to 4294967295: got -1"),
        ("--ref a.png --image-size big", "--image-size: got 'big'"),
        (
            "--ref a.png --sampler ddpm --variance learned",
            "--variance learned needs a network that learned its variance",
        ),
        ("--ref a.png --device cuda --devices 99", "--devices 99 --device cuda: this machine has"),
        ("--ref none.png", "--ref: there is no file or folder"),
        ("--ref empty", "--ref: no images in"),
        ("--ref text.png", "text.png cannot be read as an image"),
        ("--ref data/toon:dev", "'dev' is not in data/toon: it has train, test"),
        ("--ref data/toon:test[900:]", "it holds 500 images"),
        ("--ref a.png --out text.png/out", "--out: cannot write to"),
        ("--ref a.png --ckpt none.ckpt", "there is no checkpoint"),
        ("--ref a.png --ckpt toon32", "the bundled models are animals64 and toon64"),
        ("a.png --unconditional", "a.png; a picture is given by --ref"),
        ("--ref a.png --ckpt text.png", "text.png is no checkpoint"),
    ],
)
def test_bad_flags(
    flags: str, words: str, checkpoint: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    places = {"a.png": references / "a.png"}
    for name in ("text.png", "empty", "none.png", "none.ckpt", "text.png/out"):
        places[name] = tmp_path / name
    asked = [places.get(word, word) for word in flags.split()]
    common = ["--ckpt", checkpoint, "--device", "cpu", "--steps", 4, "--out", tmp_path / "out"]
    assert words in refused(capsys, *common, *asked)
    assert not list(tmp_path.glob("out/*.png"))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["truncated", "pickle", "torch_pickle", "list"])
def test_checkpoint_that_is_none(
    kind: str, checkpoint: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, harm = tmp_path / "x.ckpt", tmp_path / "harm"
    match kind:
        case "truncated":
            path.write_bytes(checkpoint.read_bytes()[:5000])
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(harm), protocol=2))
        case "torch_pickle":
            torch.save({"state_dict": {}, "hyper_parameters": Evil(harm)}, path)
        case "list":
            torch.save([1, 2], path)
    error = refused(capsys, "--ref", references / "a.png", "--ckpt", path, "--out", tmp_path / "out")
    assert f"{path} is no checkpoint" in error
    assert not harm.exists()


def test_no_checkpoint_at_all(
    references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ilvr_lightning.checkpoints.find.BUNDLED", tmp_path / "data" / "pretrained")
    assert "--ckpt is missing, there is no run" in refused(capsys, "--ref", references / "a.png")


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sample.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in [
        "--ref",
        "--ckpt",
        "--out",
        "--num-samples",
        "--unconditional",
        "--seed",
        "--weights",
        "--fit",
        "--image-size",
        "--batch-size",
        "--device",
        "--devices",
        "--precision",
        "--overwrite",
        "--reproduce",
        "--preset",
        "--factor",
        "--range",
        "--sampler",
        "--steps",
        "--spacing",
        "--eta",
        "--variance",
        "--clip",
        "--kernel",
        "--orthogonal",
        "--reference-noise",
        "--eps-extrapolation",
        "--start-from",
        "--respaced-range-t",
        "--override",
        "--sweep",
        "--timesteps",
    ]:
        assert f"  {flag}" in text or f", {flag}" in text, flag


def test_find_images_is_what_ref_uses(references: Path) -> None:
    assert len(find_images([str(references)])) == 3


# Interrupted, overwritten, hostile


def test_missing_and_truncated_files_are_made_again(run: Sample, references: Path) -> None:
    command = ["--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 1]
    out = run(*command)
    whole = {name: (out / name).read_bytes() for name in names(out)}
    (out / "a_grid.png").unlink()
    (out / "b_N2_0.png").write_bytes(whole["b_N2_0.png"][:-40])
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text(lines[0][:50])
    run(*command)
    assert names(out) == sorted(whole)
    assert all(difference(out / name, run(*command, out="again") / name) <= 1 for name in whole)
    assert [line["file"] for line in manifest(out)] == ["a_N2_0.png", "b_N2_0.png"]


def test_overwriting_leaves_one_file_and_one_line(run: Sample, references: Path) -> None:
    command = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 1, "--overwrite"]
    out = run(*command)
    run(*command, "--seed", 1)
    assert names(out) == ["a_N2_0.png", "a_grid.png"]
    assert [line["seed"] for line in manifest(out)] == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 10**9},
        {"threads": -1},
        {"weights": "foo"},
        {"device": "cuda:/etc"},
        {"checkpoint_sha256": "../../secret"},
        {"seed": "0"},
        {"plan": {}},
        {"plan": {"factor": 3}},
        {"plan": {"factor": 2, "sampler": "foo"}},
        {"plan": {"factor": 2, "num_steps": 2.0}},
    ],
)
def test_hostile_recipes_are_refused(
    change: dict[str, Any], run: Sample, references: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    error = _refused_with(out, checkpoint, lambda recipe: recipe | change, capsys)
    assert "recipe" in error or "--factor must divide" in error


@pytest.mark.parametrize(
    "change",
    [
        {"octave_gains": [[1.0], [1.0]]}, {"octave_gains": 1.0}, {"octave_gains": [True]}, {"condition_from": [25]},
        {"condition_from": 1.5}, {"condition_to": [0, 0]}, {"condition_to": 0.5}, {"start_from": "5"},
        {"start_from": 5.5}, {"timesteps": [True]}, {"timesteps": [[3]]}, {"factor": 2.0}, {"factor": [2]},
        {"factor": True}, {"respaced_range_t": 0.5}, {"respaced_range_t": True}, {"eta": True}, {"clip": 1},
        {"sampler": ["ddim"]}, {"exact_low_band": None},
    ],
)  # fmt: skip
def test_hostile_plans_are_refused(
    change: dict[str, Any], run: Sample, references: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    error = _refused_with(out, checkpoint, lambda recipe: recipe | {"plan": recipe["plan"] | change}, capsys)
    assert "the recipe's plan is not of this version" in error


def _refused_with(
    out: Path, checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> str:
    with Image.open(out / "a_N2_0.png") as image:
        info = PngInfo()
        info.add_text("ilvr_lightning", json.dumps(change(json.loads(image.info["ilvr_lightning"]))))
        image.save(out / "hostile.png", pnginfo=info)
    return refused(capsys, "--reproduce", out / "hostile.png", "--ckpt", checkpoint, "--out", out / "new")
