"""SampleFolder: where images lie, what counts as there, what is kept beside them, and the index."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.checkpoints.load import file_sha256
from ilvr_lightning.data.images import Pixels, to_image
from ilvr_lightning.data.references import References, find_references
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.sampling import folder as module
from ilvr_lightning.sampling.folder import SampleFolder
from ilvr_lightning.sampling.index import COLUMNS
from ilvr_lightning.sampling.recipe import read_recipe
from ilvr_lightning.sampling.requests import MAX_SAMPLES, SampleRequests
from tests.support.samples import (
    difference,
    images,
    index,
    leftovers,
    listed,
    pixels,
    recipe_text,
    sample_into,
    with_recipe,
)

Run = Callable[..., Path]


def unconditional(path: Path, num_samples: int, seed: int = 0) -> SampleFolder:
    """A folder for unconditional images."""
    plan = SamplingPlan().resolved(25)
    requests = SampleRequests(
        References(), [plan], num_samples, seed=seed, weights="ema", checkpoint_sha256="0" * 64, overrides={}
    )
    return SampleFolder(path, requests)


def fill(path: Path, num_samples: int, seed: int = 0) -> Path:
    """Write what is missing of so many unconditional images, and the index."""
    folder = unconditional(path, num_samples, seed)
    for i in folder.missing().tolist():
        folder.write(folder.requests[i], np.full((8, 8, 3), seed + i, np.uint8), {"batch_size": 2})
    assert folder.write_index() == 0
    return path


def pngs(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.png"))


# Where images lie


def test_files(run: Run, references: Path, checkpoint: Path) -> None:
    paths = [references / "a.png", references / "b.png"]
    out = run("--ref", *paths, "--factor", 2, 4, "--num-samples", 2, "--seed", 7)
    stems = [f"{r}_N{n}_{k}" for r in "ab" for n in (2, 4) for k in (0, 1)]
    assert pngs(out) == sorted([*(f"{stem}.png" for stem in stems), "a_grid.png", "b_grid.png", "grid.png"])
    assert listed(out) == [f"{stem}.png" for stem in stems]
    for fitted in find_references([str(path) for path in paths], (3, 8, 8)):
        assert (pixels(out / "references" / f"{fitted.sha256}.png") == fitted.pixels).all()
    for stem in stems:
        recipe = recipe_text(out / f"{stem}.png")
        assert (recipe["reference"], recipe["seed"], recipe["sample"]) == (stem[0], 7, int(stem[-1]))
        assert (recipe["plan"]["factor"], recipe["plan"]["num_steps"]) == (int(stem[3]), 4)
        assert (recipe["checkpoint_sha256"], recipe["batch_size"]) == (file_sha256(checkpoint), 8)
        assert pixels(out / f"{stem}.png").shape == (8, 8, 3)
    assert len({image.tobytes() for image in images(out).values()}) == 8


def test_each_image_holds_the_evidence_of_its_run(checkpoint: Path, references: Path, tmp_path: Path) -> None:
    def evidence(name: str, *flags: object) -> list[Any]:
        folder = sample_into(checkpoint, tmp_path / name, "--num-samples", 3, *flags)
        return [line["recipe"]["evidence"] for line in index(folder)]

    alone = evidence("alone", "--ref", references / "a.png")
    of_three = evidence("three", "--ref", references / "a.png", "--candidates", 3)
    assert len(set(alone)) == 3
    assert sum(alone) < sum(of_three) < 0
    assert evidence("none", "--unconditional") == [None] * 3


@pytest.mark.parametrize("num_samples", [10, 100_000])
def test_one_layout_whatever_the_size_of_the_run(num_samples: int, tmp_path: Path) -> None:
    folder = unconditional(tmp_path, num_samples)
    places = {0: "", 999: "", 1000: "00001/", 1999: "00001/", 2000: "00002/", 99_999: "00099/"}
    for sample, place in places.items():
        if sample < num_samples:
            assert folder.file(sample) == tmp_path / f"{place}unconditional_{sample}.png"


def test_many_references_stay_flat_and_many_samples_do_not(
    run: Run, references: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PER_SUBFOLDER", 2)
    asked = ("--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples")
    out = run(*asked, 2)
    assert {Path(name).parent.name for name in listed(out)} == {""}
    run(*asked, 5)  # what the smaller run made counts
    assert "6 to make, 4 already there" in capsys.readouterr().out
    assert listed(out) == [
        f"{place}{r}_N2_{k}.png" for r in "ab" for k, place in enumerate(("", "", "00001/", "00001/", "00002/"))
    ]
    run(*asked, 5)
    assert "0 to make, 10 already there" in capsys.readouterr().out


def test_references_of_one_name(run: Run, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--ref", references / "a.png", references / "other" / "a.png", "--factor", 2, "--num-samples", 1)
    out = run(*asked)
    lines = index(out)
    assert len(set(listed(out))) == len({line["recipe"]["reference_sha256"] for line in lines}) == 2
    assert [line["reference"] for line in lines] == ["a", "a"]
    assert len(list(out.glob("a_*_grid.png")) + list(out.glob("a_grid.png"))) == 2
    capsys.readouterr()
    run(*asked)
    assert "0 to make, 2 already there" in capsys.readouterr().out


def test_equal_names_of_many_references(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal files share their image; others of the name have one each, whether they are read at the start or later."""
    for folder, source in (("a", "00"), ("b", "00"), ("c", "01"), ("d", "02")):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "x.png").write_bytes((images / f"{source}.png").read_bytes())
    asked = ("--ref", tmp_path / "set", "--factor", 2, "--num-samples", 1)
    few = run(*asked, out="few")
    monkeypatch.setattr("ilvr_lightning.data.references.EAGER_LIMIT", 2)
    many = run(*asked, out="many")
    assert len(set(listed(many))) == len(listed(many)) == 3
    hashes = [{line["recipe"]["reference_sha256"] for line in index(out)} for out in (few, many)]
    assert hashes[0] == hashes[1]
    capsys.readouterr()
    run(*asked, out="many")
    assert "0 to make" in capsys.readouterr().out


def test_nothing_names_the_machine(run: Run, references: Path, tmp_path: Path) -> None:
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    assert index(out)[0]["recipe"] == recipe_text(out / "a_N2_0.png")
    for file in (out / "a_N2_0.png", out / "metadata.jsonl"):
        for secret in (str(tmp_path), str(references), "/tmp", "/root"):
            assert secret.encode() not in file.read_bytes()


# What counts as there


def test_nothing_is_read_in_an_empty_folder(tmp_path: Path) -> None:
    folder = unconditional(tmp_path, MAX_SAMPLES)
    began = time.perf_counter()
    assert len(folder.missing()) == MAX_SAMPLES
    assert time.perf_counter() - began < 2


def test_a_folder_is_continued(run: Run, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state(folder: Path) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in folder.glob("a_N*.png")}

    asked = ("--ref", references / "a.png", "--factor", 2, "--num-samples")
    out = run(*asked, 1)
    first = state(out)
    run(*asked, 2)
    assert "1 to make, 1 already there" in capsys.readouterr().out
    second = state(out)
    assert {name: second[name] for name in first} == first
    assert second.keys() == {"a_N2_0.png", "a_N2_1.png"}
    run(*asked, 2)
    assert state(out) == second
    assert len(listed(out)) == 2
    run(*asked, 1, "--overwrite")
    third = state(out)
    assert third["a_N2_0.png"] > second["a_N2_0.png"]
    assert third["a_N2_1.png"] == second["a_N2_1.png"]


def test_an_image_of_an_earlier_version_is_not_made_again(
    run: Run, references: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its recipe lacks the fields that came later."""
    asked = ("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    out = run(*asked)
    recipe = recipe_text(out / "a_N2_0.png")
    for name in ("mask_sha256", "overrides", "compiled"):
        del recipe[name]
    for name in ("octave_gains", "eps_extrapolation", "start_from", "respaced_range_t", "exact_low_band"):
        del recipe["plan"][name]
    with_recipe(out / "a_N2_0.png", out / "a_N2_0.png", json.dumps(recipe))
    before = (out / "a_N2_0.png").read_bytes()
    (out / "manifest.jsonl").write_text("of an earlier version\n")
    capsys.readouterr()
    run(*asked)
    assert "0 to make, 1 already there" in capsys.readouterr().out
    assert (out / "a_N2_0.png").read_bytes() == before
    assert (index(out)[0]["recipe"], listed(out)) == (recipe, ["a_N2_0.png"])


@pytest.mark.parametrize("change", [["--seed", 1], ["--eta", 0.5], ["--weights", "raw"], ["--kernel", "box"]])
def test_another_recipe_gets_a_name_of_its_own(change: list[object], run: Run, references: Path) -> None:
    asked = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 1, "--sampler", "ddim"]
    out = run(*asked)
    first = (out / "a_N2_0.png").read_bytes()
    run(*asked, *change)
    assert (out / "a_N2_0.png").read_bytes() == first
    (other,) = {name for name in pngs(out) if "grid" not in name} - {"a_N2_0.png"}
    stem, _, digest = other.removesuffix(".png").rpartition("_")
    assert (stem, len(digest)) == ("a_N2_0", 8)
    run(*asked, *change)
    assert len(pngs(out)) == 4


def test_missing_and_truncated_files_are_made_again(run: Run, references: Path) -> None:
    asked = ["--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 1]
    out = run(*asked)
    complete = {name: (out / name).read_bytes() for name in pngs(out)}
    (out / "a_grid.png").unlink()
    (out / "b_N2_0.png").write_bytes(complete["b_N2_0.png"][:-40])
    (out / "metadata.jsonl").write_text((out / "metadata.jsonl").read_text()[:50])
    run(*asked)
    assert pngs(out) == sorted(complete)
    assert difference(images(out), images(run(*asked, out="again"))) <= 1
    assert listed(out) == ["a_N2_0.png", "b_N2_0.png"]


def test_an_image_of_the_users_own_is_not_overwritten(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "unconditional_0.png")
    own = (tmp_path / "unconditional_0.png").read_bytes()
    fill(tmp_path, 1)
    assert (tmp_path / "unconditional_0.png").read_bytes() == own
    assert [name.startswith("unconditional_0_") for name in listed(tmp_path)] == [True]


def test_overwriting_leaves_one_file_and_one_line(run: Run, references: Path) -> None:
    asked = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 1, "--overwrite"]
    out = run(*asked)
    run(*asked, "--seed", 1)
    assert pngs(out) == ["a_N2_0.png", "a_grid.png"]
    assert [line["seed"] for line in index(out)] == [1]


# Nothing is lost


def test_a_gap_is_reported_and_filled(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--unconditional", "--num-samples", 5)
    write = SampleFolder.write

    def losing(self: SampleFolder, request: Any, *rest: Any) -> Path:
        path = write(self, request, *rest)
        if request.recipe.sample == 3:
            path.unlink()
        return path

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", losing)
        out = run(*asked, "--format", "npz", status=1)
    assert "1 images are missing; run the same command again" in capsys.readouterr().err
    assert not list(out.glob("*.npz"))
    assert len(listed(out)) == 4
    run(*asked)
    assert "1 to make, 4 already there" in capsys.readouterr().out
    assert len(listed(out)) == 5


def test_a_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--unconditional", "--num-samples", 5, "--batch-size", 2)
    saved = 0

    class Full:
        def save(self, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nearly_full(values: Pixels) -> Any:
        nonlocal saved
        saved += 1
        return Full() if saved == 4 else to_image(values)

    with monkeypatch.context() as patch:
        patch.setattr(module, "to_image", nearly_full)
        out = run(*asked, status=1)
    assert "the disk is full" in capsys.readouterr().err
    assert len(pngs(out)) == 3
    run(*asked)
    assert "2 to make, 3 already there" in capsys.readouterr().out
    assert difference(images(out), images(run(*asked, out="other"))) <= 1
    assert not leftovers(out)


def test_partial_files_of_killed_writers_are_removed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_SUBFOLDER", 2)
    asked = ("--unconditional", "--num-samples", 3)
    out = run(*asked)
    places = [out, out / "00001", out / "references", out / "another"]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / ".x.png.1.partial").write_bytes(b"half")
    run(*asked)
    # A folder below that is no part of this run may be another run's, which writes just now.
    assert leftovers(out) == [str(out / "another" / ".x.png.1.partial")]


def test_a_broken_reference_among_many_is_skipped(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ilvr_lightning.data.references.EAGER_LIMIT", 2)
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("00", "01", "02"):
        (folder / f"{name}.png").write_bytes((images / f"{name}.png").read_bytes())
    (folder / "01.png").write_bytes(b"no image")
    asked = ("--ref", folder, "--factor", 2, "--num-samples", 2)
    out = run(*asked)
    said = capsys.readouterr().err
    assert said.count("01.png cannot be read as an image") == 1
    assert "skipped      2 images of 1 unusable references" in said
    wanted = [f"{name}_N2_{k}.png" for name in ("00", "02") for k in (0, 1)]
    assert listed(out) == wanted
    assert not (out / "references").exists()  # of many, no copies are kept
    run(*asked)
    assert "4 already there" in capsys.readouterr().out
    assert listed(out) == wanted


# The index


def test_the_index_is_a_data_set(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with "test" or "train" in them, and subfolders, included: with data_dir= datasets takes them for splits."""
    monkeypatch.setattr(module, "PER_SUBFOLDER", 2)
    out = run("--ref", "data/toon:test[0:1]", "data/toon:train[3:4]", "--factor", 2, "--range", "25:5",
              "--num-samples", 3, "--seed", 4, out="train-test")  # fmt: skip
    run("--unconditional", "--num-samples", 1, out="train-test")
    data = datasets.load_dataset(
        "imagefolder", data_files={"train": f"{out}/metadata.jsonl"}, cache_dir=str(tmp_path / "cache")
    )["train"]
    assert isinstance(data.features["image"], datasets.Image)
    assert set(data.features) == {"image", *COLUMNS} - {"file_name"}
    names = listed(out)
    assert names[1:] == [
        f"{place}{r}_N2_{k}.png" for r in ("test_0", "train_3") for k, place in enumerate(("", "", "00001/"))
    ]
    for row, name in zip(data, names, strict=True):
        assert (np.asarray(row["image"]) == pixels(out / name)).all()
        recipe = json.loads(row["recipe"])
        assert recipe == recipe_text(out / name)
        assert (row["seed"], row["sample"]) == (recipe["seed"], recipe["sample"])
        plan = recipe["plan"]
        wanted = (recipe["reference"], plan["factor"], plan["condition_from"], plan["condition_to"])
        wanted = wanted if recipe["reference"] else ("", 0, 0, 0)
        assert (row["reference"], row["factor"], row["condition_from"], row["condition_to"]) == wanted
    assert len(data.filter(lambda row: row["reference"] == "test_0" and row["condition_to"] == 5)) == 3


def test_columns_keep_their_types(run: Run, references: Path) -> None:
    """datasets reads the types off the first lines and needs the same in all others."""
    run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    out = run("--unconditional", "--num-samples", 1)
    for line in (out / "metadata.jsonl").read_text().splitlines():
        assert {name: type(value) for name, value in json.loads(line).items()} == COLUMNS


def test_images_of_other_runs_keep_their_lines_while_they_exist(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    fill(tmp_path, 2, seed=1)
    assert [(line["seed"], line["sample"]) for line in index(tmp_path)] == [(1, 0), (1, 1), (0, 0), (0, 1)]
    assert len(set(listed(tmp_path))) == 4
    (tmp_path / "unconditional_1.png").unlink()
    fill(tmp_path, 1, seed=1)
    assert [(line["seed"], line["sample"]) for line in index(tmp_path)] == [(1, 0), (1, 1), (0, 0)]
    fill(tmp_path, 3)
    assert [(line["seed"], line["sample"]) for line in index(tmp_path)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    "text",
    [
        "", "half a li", "null\n", "[]\n", '{"file_name": []}\n', '{"file_name": "x.png"}\n', "9" * 5000, "[" * 100_000,
        '{"file_name": "' + "x" * 10**6 + '"}\n', "\0" * 100,
    ],
)  # fmt: skip
def test_lines_that_are_none_are_left_out(text: str, tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text(text)
    fill(tmp_path, 1, seed=1)
    assert [line["seed"] for line in index(tmp_path)] == [1]


def test_a_line_that_an_index_holds_twice(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text() * 3)
    fill(tmp_path, 1, seed=1)
    assert [line["seed"] for line in index(tmp_path)] == [1, 0]


def test_a_large_batch_on_a_large_machine(tmp_path: Path) -> None:
    """What a machine can do, its recipes can hold."""
    folder = unconditional(tmp_path, 1)
    folder.write(folder.requests[0], np.zeros((8, 8, 3), np.uint8), {"batch_size": 100_000, "threads": 4096})
    assert read_recipe(tmp_path / "unconditional_0.png").threads == 4096
    assert len(folder.missing()) == 0


@pytest.mark.parametrize(
    "name", ["../escaped.png", "{out}/unconditional_0.png", "x/../unconditional_0.png", "", "x" * 300, "gone.png", "\0"]
)
def test_the_index_lists_nothing_outside_the_folder(name: str, tmp_path: Path) -> None:
    """datasets would refuse the whole index for one such line."""
    out = fill(tmp_path / "out", 1)
    (tmp_path / "escaped.png").write_bytes((out / "unconditional_0.png").read_bytes())
    line = json.loads((out / "metadata.jsonl").read_text())
    (out / "metadata.jsonl").write_text(json.dumps({**line, "file_name": name.format(out=out)}) + "\n")
    fill(out, 1, seed=1)
    assert [line["seed"] for line in index(out)] == [1]


@pytest.mark.parametrize("place", ["a pipe", "a folder", "a loop"])
def test_an_index_that_is_no_file(place: str, tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    if place == "a pipe":
        os.mkfifo(path)
    elif place == "a loop":
        path.symlink_to(path.name)
    else:
        path.mkdir()
    if place == "a folder":
        with pytest.raises(OSError, match="metadata"):
            fill(tmp_path, 1)
    else:
        fill(tmp_path, 1)
        assert len(listed(tmp_path)) == 1


def test_a_column_of_the_users_own_stays_with_images_of_other_runs(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    line = {**json.loads((tmp_path / "metadata.jsonl").read_text()), "caption": "a face"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    fill(tmp_path, 1, seed=1)
    assert [entry.get("caption") for entry in index(tmp_path)] == [None, "a face"]
