"""Many pictures: lazy jobs, formats, subfolders, references of a whole data set, runs that are killed and go on."""

import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample
from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import to_image
from ilvr_lightning.data.references import References
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling import outputs, pictures
from ilvr_lightning.sampling.manifest import Growth, merge, rank_path
from ilvr_lightning.sampling.pictures import Pictures
from ilvr_lightning.sampling.recipe import read_recipe
from ilvr_lightning.sampling.requests import MOST_PICTURES, Jobs, make_jobs
from tests.support import cli
from tests.system.kill.runs import finish
from tests.system.kill.sampling import Made, command, difference, differs, kill_sampling, made, manifest

Sample = Callable[..., Path]
FORMATS = ("png", "parquet", "npz")


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Sample:
    """Sample with four steps into tmp_path/out, or where out says; gives the folder."""

    def run(*argv: object, out: str = "out", status: int = 0) -> Path:
        assert sample.main(flags(checkpoint, tmp_path / out, *argv)) == status
        return tmp_path / out

    return run


def flags(checkpoint: Path, out: Path, *argv: object) -> list[str]:
    return [str(word) for word in ("--ckpt", checkpoint, "--steps", 4, "--device", "cpu", "--out", out, *argv)]


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob(".*")]


# What is made, without a list of it


def lazy(num_samples: int) -> Jobs:
    return make_jobs(
        References(), [], num_samples, SamplingPlan.preset("fast"), seed=3, weights="ema", checkpoint_sha256="0" * 64
    )


def test_jobs_are_made_up_when_asked_for() -> None:
    jobs = lazy(MOST_PICTURES)
    assert len(jobs) == MOST_PICTURES
    assert (jobs[9_999_999].recipe.sample, jobs[9_999_999].file) == (9_999_999, "unconditional_9999999.png")
    assert [job.sample for job in jobs[5:8]] == [5, 6, 7]
    with pytest.raises(UserError, match="a run makes at most 10000000"):
        lazy(MOST_PICTURES + 1)


def test_nothing_is_read_in_an_empty_folder(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert len(Pictures(lazy(MOST_PICTURES), tmp_path).todo()) == MOST_PICTURES
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--num-samples 1000000000", "--num-samples must be at most 10000000: got 1000000000"),
        ("--format jpg", "--format: invalid choice: 'jpg'"),
        ("--format npz --trajectory", "--trajectory draws beside PNGs; leave --format npz out"),
        ("--devices 1000", "--devices 1000 --device cpu: this machine has"),
    ],
)
def test_bad_flags(argv: str, words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = flags(checkpoint, tmp_path / "out", "--unconditional", *argv.split())
    assert words in cli.refused(sample.main, capsys, *asked)


# Formats


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_every_format_holds_the_same_pictures(
    kind: str, run: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(outputs, "SHARD", 3)
    monkeypatch.setattr(outputs, "ROW_GROUP", 2)
    asked = ("--unconditional", "--num-samples", 7)
    png, out = run(*asked, out="png"), run(*asked, "--format", kind, "--batch-size", 2)
    assert difference(made(png), made(out)) <= 1
    assert [line["sample"] for line in manifest(out)] == list(range(7))
    assert not leftovers(out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".npz", ".parquet")}
    assert len(before) == (3 if kind == "parquet" else 1)
    capsys.readouterr()
    run(*asked, "--format", kind)
    assert "0 to make, 7 already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert difference(made(png), made(out)) <= 1
    other = flags(checkpoint, out, *asked, "--format", kind, "--seed", 1)
    assert "is of a run with other settings" in cli.refused(sample.main, capsys, *other)
    run("--unconditional", "--num-samples", 2, "--seed", 1, "--format", kind, "--overwrite")
    assert {line["seed"] for line in manifest(out) if "samples_7" not in line["file"]} == {1}


def test_parquet_is_a_data_set(run: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.setattr(outputs, "SHARD", 4)
    out = run("--ref", images / "00.png", images / "01.png", "--factor", 2, "--num-samples", 3, "--format", "parquet")
    data = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(data.features["image"], datasets.Image)
    assert [(row["reference"], row["sample"]) for row in data] == [(r, k) for r in ("00", "01") for k in range(3)]
    assert np.asarray(data[0]["image"]).shape == (8, 8, 3)
    assert len(list((out / "references").iterdir())) == 2
    again = run("--ref", f"{out}:train", "--factor", 2, "--num-samples", 1, out="again")  # and a set of references
    assert len(made(again)) == 6


def test_grey_pictures_have_three_channels_in_npz(train_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = train_run("grey_bulk", "data.channels=1")
    asked = flags(folder / "checkpoints" / "last.ckpt", tmp_path, "--unconditional", "--num-samples", 2)
    assert sample.main([*asked, "--format", "npz"]) == 0
    pixels = np.load(tmp_path / "samples_2x8x8x3.npz")["arr_0"]
    assert (pixels.shape, pixels.dtype) == ((2, 8, 8, 3), np.uint8)
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("unconditional", [True, False])
def test_large_runs_use_subfolders(
    unconditional: bool, run: Sample, images: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], checkpoint: Path,
) -> None:  # fmt: skip
    references = [images / f"{n:02}.png" for n in range(3)]
    asked = ["--unconditional"] if unconditional else ["--factor", 2, "--ref", *references]
    small = run(*asked, "--num-samples", 2)
    kept = len(made(small))
    monkeypatch.setattr(pictures, "FLAT", 7)
    capsys.readouterr()
    large = run(*asked, "--num-samples", 8)  # what the small run made counts, and stays
    assert f"{kept} already there" in capsys.readouterr().out
    depths = [line["file"].count("/") for line in manifest(large)]
    assert depths.count(0) == kept
    assert max(depths) == 1
    if unconditional:
        assert (large / "00000" / "unconditional_7.png").is_file()
    else:
        run("--factor", 2, "--ref", *reversed(references), "--num-samples", 8)
        assert "0 to make, 24 already there" in capsys.readouterr().out
        made_one = next(large.glob("??/01_N2_*.png"))
        again = ("--reproduce", made_one, "--ckpt", checkpoint, "--out", large / "again")
        assert sample.main([*map(str, again)]) == 0
        assert "identical" in capsys.readouterr().out


# References of a whole data set


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_reference_found_late_is_left_out(
    kind: str, run: Sample, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("ilvr_lightning.data.references.EAGER_LIMIT", 2)
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("00", "01", "02"):
        (folder / f"{name}.png").write_bytes((images / f"{name}.png").read_bytes())
    (folder / "01.png").write_bytes(b"no picture")
    asked = ("--ref", folder, "--factor", 2, "--num-samples", 2, "--format", kind)
    out = run(*asked)
    said = capsys.readouterr().err
    assert said.count("01.png cannot be read as an image") == 1
    assert "2 pictures of 1 references that cannot be used" in said
    whole = made(out)
    assert whole.keys() == {f"{name}_N2_{k}" for name in ("00", "02") for k in (0, 1)}
    run(*asked)
    assert difference(whole, made(out)) == 0
    assert not leftovers(out)


def test_equal_names_of_many_references(
    run: Sample, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """References of one name have a hash in the names of their files, whether they are read at the start or later."""
    for folder, source in (("a", "00"), ("b", "00"), ("c", "01"), ("d", "02")):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "x.png").write_bytes((images / f"{source}.png").read_bytes())
    few = run("--ref", tmp_path / "set", "--factor", 2, "--num-samples", 1, out="few")
    monkeypatch.setattr("ilvr_lightning.data.references.EAGER_LIMIT", 2)
    many = run("--ref", tmp_path / "set", "--factor", 2, "--num-samples", 1, out="many")
    assert len(made(many)) == 3
    assert difference(made(few), made(many)) <= 1
    capsys.readouterr()
    run("--ref", tmp_path / "set", "--factor", 2, "--num-samples", 1, out="many")
    assert "0 to make, 4 already there" in capsys.readouterr().out  # two equal ones share a file


# Nothing lost


@pytest.mark.parametrize("kind", FORMATS)
def test_gap_is_told_and_filled(
    kind: str, run: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--unconditional", "--num-samples", 5, "--format", kind)
    write = Pictures.write

    def losing(self: Pictures, job: Any, *rest: Any) -> Path:
        path = write(self, job, *rest)
        if job.sample == 3:
            path.unlink()
        return path

    monkeypatch.setattr(Pictures, "write", losing)
    out = run(*asked, status=1)
    assert "1 pictures are missing; run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(Pictures, "write", write)
    run(*asked)
    assert "1 to make, 4 already there" in capsys.readouterr().out
    assert len(made(out)) == 5
    assert not leftovers(out)


@pytest.mark.parametrize("kind", FORMATS)
def test_full_disk(
    kind: str, run: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--unconditional", "--num-samples", 5, "--batch-size", 2, "--format", kind)
    saved = 0

    class Full:
        def save(self, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nearly_full(pixels: Any) -> Any:
        nonlocal saved
        saved += 1
        return Full() if saved == 4 else to_image(pixels)

    monkeypatch.setattr(pictures, "to_image", nearly_full)
    out = run(*asked, status=1)
    assert "the disk is full" in capsys.readouterr().err
    assert not list(out.rglob("*.partial"))
    run(*asked)
    assert difference(made(out), made(run(*asked[:-2], out="png"))) <= 1
    assert not leftovers(out)


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_unfinished_run_of_other_settings(
    kind: str, run: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    asked = ("--unconditional", "--num-samples", 3, "--format", kind)
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_atomically", None)
        with pytest.raises(TypeError):
            run(*asked)
    other = flags(checkpoint, tmp_path / "out", *asked, "--seed", 1)
    assert "a run with other settings that did not end" in cli.refused(sample.main, capsys, *other)
    assert {line["seed"] for line in manifest(run(*asked, "--seed", 1, "--overwrite"))} == {1}


@pytest.mark.parametrize("kind", ["parquet", "npz"])
@pytest.mark.parametrize("stage", ["before the first file", "before the last", "before the pictures go"])
def test_stopped_while_packing(kind: str, stage: str, run: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SHARD", 3)
    asked = ("--unconditional", "--num-samples", 5, "--format", kind)
    count = 0

    def stops(*argv: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        if (stage == "before the first file") or (stage == "before the last" and count == 2):
            raise RuntimeError("stopped")
        write_atomically(*argv, **named)

    def stops_late(*_: Any, **__: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_atomically", stops)
        patch.setattr("shutil.rmtree", stops_late)
        with pytest.raises(RuntimeError, match="stopped"):
            run(*asked)
    out = run(*asked)
    assert [line["sample"] for line in manifest(out)] == list(range(5))
    assert len(made(out)) == 5
    assert not leftovers(out)


def test_pictures_are_read_without_being_decoded(run: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("--unconditional", "--num-samples", 1)
    path = out / "unconditional_0.png"
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        recipe = read_recipe(path)
    assert recipe is not None
    for damaged in (whole[:-1], whole[:-13], whole[: len(whole) // 2], b"", whole[:8], b"\0" * len(whole)):
        path.write_bytes(damaged)
        assert read_recipe(path) is None
    path.write_bytes(whole)
    with Image.open(path) as image:
        info = PngInfo()
        info.add_text("ilvr_lightning", image.info["ilvr_lightning"], zip=True)  # as another program may save it
        image.save(path, pnginfo=info)
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(("kind", "other"), itertools.permutations(["png", "parquet", "npz"], 2))
def test_formats_do_not_mix(
    kind: str, other: str, run: Sample, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--unconditional", "--num-samples", 2, "--format", kind)
    asked = flags(checkpoint, tmp_path / "out", "--unconditional", "--num-samples", 3, "--format", other)
    assert f"give --format {kind}, another --out, or --overwrite" in cli.refused(sample.main, capsys, *asked)


def test_manifest_keeps_other_runs(run: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--unconditional", "--num-samples", 2)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text(lines[0])
    rank_path(out, 5).write_text(lines[1] + lines[0][:70])  # a run that was killed amid a line
    run("--unconditional", "--num-samples", 2, "--seed", 1)
    found = manifest(out)
    assert [line["seed"] for line in found] == [1, 1, 0, 0]
    assert len({line["file"] for line in found}) == 4
    assert not leftovers(out)
    (out / "unconditional_0.png").unlink()
    assert merge(out, iter(())) == 0
    assert len(manifest(out)) == 3


def test_growth_counts_what_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rank_path(tmp_path, 1)
    path.write_text("old\n")
    growth = Growth([path, rank_path(tmp_path, 2)])
    clock = iter(range(10, 100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert growth.lines() == 0
    with path.open("a") as file:
        file.write("a\nb\nhalf")
    assert growth.lines() == 2
    rank_path(tmp_path, 2).write_text("c\n")
    assert growth.lines() == 3


# Processes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), [("png", 1), ("npz", 3)])
def test_killed_and_started_again(kind: str, devices: int, checkpoint: Path, tmp_path: Path, run: Sample) -> None:
    """The short form of `python -m tests.system.kill`."""
    total, out = 300, tmp_path / "killed"
    kill_sampling(checkpoint, out, kind, devices, kills=2, total=total, seed=0)
    alone = run("--unconditional", "--num-samples", total, "--batch-size", 16)
    assert differs(out, alone, total) is None
    (alone / "unconditional_7.png").unlink()
    with pytest.raises(FileNotFoundError):
        differs(out, alone, total)


@pytest.mark.slow
def test_processes_batches_and_order_change_nothing(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    references = [images / f"{n:02}.png" for n in range(4)]
    found: list[Made] = []
    for devices, batch, order, kind in ((1, 16, 1, "png"), (2, 3, -1, "parquet"), (3, 1, -1, "npz")):
        out = tmp_path / f"{devices}{kind}"
        asked = ("--factor", 2, "--num-samples", 2, "--devices", devices, "--batch-size", batch, "--format", kind)
        finish(*command(checkpoint, out, "--ref", *references[::order], *asked))
        found.append(made(out))
        assert len(found[-1]) == 8
        assert not leftovers(out)
    assert all(difference(found[0], other) <= 1 for other in found[1:])
