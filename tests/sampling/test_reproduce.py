"""sample.py --reproduce: an image again from the recipe in it."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sample
from ilvr_lightning.sampling import module
from tests.support import cli
from tests.support.samples import listed, pixels, recipe_text, with_recipe

Run = Callable[..., Path]
refused = functools.partial(cli.refused, sample.main)


@pytest.fixture
def one(run: Run, references: Path) -> Path:
    """An image that follows a.png."""
    return run("--ref", references / "a.png", "--factor", 2, "--num-samples", 1) / "a_N2_0.png"


@pytest.fixture
def again(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Reproduce an image into tmp_path/again; returns what was said."""

    def again(image: Path, *argv: object) -> str:
        capsys.readouterr()
        command = ("--reproduce", image, "--ckpt", checkpoint, "--out", tmp_path / "again", *argv)
        assert sample.main(list(map(str, command))) == 0
        return capsys.readouterr().out

    return again


@pytest.mark.parametrize("asked", [["--ref", "a.png", "--factor", "2", "4"], ["--unconditional"]])
def test_reproduce(
    asked: list[str], run: Run, references: Path, checkpoint: Path, tmp_path: Path, again: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = run(*(references / word if word == "a.png" else word for word in asked), "--num-samples", 3)
    image = out / listed(out)[-2]
    assert "identical" in again(image)
    assert (pixels(tmp_path / "again" / image.name) == pixels(image)).all()
    assert recipe_text(tmp_path / "again" / image.name) == recipe_text(image)
    # Where an image of that name exists, the new one goes beside it.
    again(image)
    beside = tmp_path / "again" / f"{image.stem}_reproduced.png"
    assert (pixels(beside) == pixels(image)).all()
    command = ("--reproduce", image, "--ckpt", checkpoint, "--out", tmp_path / "again")
    assert "exists already; give another folder" in refused(capsys, *command)
    again(image, "--overwrite")


def test_an_image_in_a_subfolder(
    run: Run, references: Path, again: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reference lies beside the subfolder; in earlier versions these had other names."""
    monkeypatch.setattr("ilvr_lightning.sampling.folder.PER_SUBFOLDER", 1)
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 2)
    assert "identical" in again(out / "00001" / "a_N2_1.png")
    (out / "00001").rename(out / "3f")
    assert "identical" in again(out / "3f" / "a_N2_1.png", "--overwrite")


def test_an_image_of_the_first_version(run: Run, references: Path, again: Callable[..., str], tmp_path: Path) -> None:
    """Its recipe lacks what was added later; the sampler and the noise of that time are in it."""
    out = run("--ref", references / "a.png", "--num-samples", 1, "--sampler", "ddpm", "--spacing", "uniform",
              "--no-orthogonal", "--reference-noise", "fresh", "--factor", 2)  # fmt: skip
    recipe = recipe_text(out / "a_N2_0.png")
    for name in ("mask_sha256", "overrides", "compiled"):
        del recipe[name]
    kept = ("sampler", "num_steps", "spacing", "eta", "variance", "clip", "factor", "kernel", "orthogonal",
            "reference_noise", "condition_from", "condition_to", "timesteps")  # fmt: skip
    recipe["plan"] = {name: recipe["plan"][name] for name in kept}
    old = with_recipe(out / "a_N2_0.png", out / "old.png", json.dumps(recipe))
    assert "identical" in again(old)
    # Were the defaults of today taken for a field that is missing, another image would come.
    for name in ("sampler", "spacing", "orthogonal", "reference_noise"):
        del recipe["plan"][name]
    assert "identical" in again(with_recipe(old, old, json.dumps(recipe)), "--overwrite")


def test_where_it_is_computed_may_be_given(
    one: Path, again: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--device, --batch-size, --precision and --compile; the note says what that does."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert again(one, "--device", "cpu").splitlines()[1:] == [f"{one.parents[1] / 'again' / one.name}: identical"]
    said = again(one, "--batch-size", 3, "--precision", "bf16", "--compile", "true", "--overwrite")
    notes = [line.removeprefix("note         ") for line in said.splitlines() if line.startswith("note")]
    assert notes == [
        "precision was 32 and is bf16 now, which rounds differently",
        "compiled was False and is True now, which rounds differently",
        "batch_size was 1 and is 3 now, which may round differently",
    ]
    made = recipe_text(one.parents[1] / "again" / one.name)
    assert (made["precision"], made["compiled"], made["batch_size"]) == ("bf16", True, 3)


def test_it_is_computed_as_it_was(one: Path, again: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless flags say otherwise: a batch of the same size, on as many threads, in the same precision."""
    recipe = recipe_text(one) | {"batch_size": 3, "threads": 2, "precision": "bf16", "device": "cuda"}
    sizes: list[tuple[int, int]] = []
    predict_step = module.ILVRSampler.predict_step

    def watched(self: module.ILVRSampler, batch: Any, batch_idx: int = 0) -> torch.Tensor:
        sizes.append((len(batch), torch.get_num_threads()))
        assert self.bf16
        return predict_step(self, batch, batch_idx)

    monkeypatch.setattr(module.ILVRSampler, "predict_step", watched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    try:
        said = again(with_recipe(one, one, json.dumps(recipe)))
    finally:
        torch.set_num_threads(threads)
    assert sizes == [(3, 2)]
    assert "note         device was cuda and is cpu now, which draws other noise" in said


def test_a_png_cannot_ask_for_any_batch_or_thread(
    one: Path, again: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilvr_lightning.sampling.reproduce.MAX_BATCH_PIXELS", 5 * 64)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    said = again(with_recipe(one, one, json.dumps(recipe_text(one) | {"batch_size": 10**9, "threads": 10**6})))
    assert asked == [256]
    assert "batch_size was 1000000000 and is 5 now" in said


def test_what_is_missing_is_named(
    one: Path, references: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], again: Callable[..., str],
) -> None:  # fmt: skip
    out = ("--out", tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    assert "the checkpoint with SHA-256" in refused(capsys, "--reproduce", one, *out)
    for kept in (one.parent / "references").iterdir():
        kept.unlink()
    known = ("--ckpt", checkpoint, *out)
    assert "the reference 'a' (SHA-256" in refused(capsys, "--reproduce", one, *known)
    assert "the reference 'a' (SHA-256" in refused(capsys, "--reproduce", one, *known, "--ref", references / "b.png")
    assert "identical" in again(one, "--ref", references / "a.png")
    assert "holds no recipe; give a PNG that sample.py wrote" in refused(
        capsys, "--reproduce", references / "a.png", *known
    )
    assert "there is no file" in refused(capsys, "--reproduce", tmp_path / "none.png", *known)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"later": 1}, "cannot be used by this version: Key 'later' not in 'Recipe'"),
        ({"checkpoint_sha256": "../../secret"}, "checkpoint_sha256 must have 64 hexadecimal digits"),
        ({"plan": {"factor": 3}}, "--factor must divide the image size: got factor=3 for 8 px"),
        ({"plan": {"num_steps": 26}}, "--steps must be at most T=25: got 26"),
        ({"plan": {"sampler": "ddpm", "variance": "learned"}}, "--variance learned needs a network"),
        ({"plan": {"later": 1}}, "cannot be used by this version: Key 'later' not in 'SamplingPlan'"),
        ({"plan": {"reference_noise": "fixed", "start_from": 30}}, "--start-from must be in [1, 25]: got 30"),
    ],
)
def test_hostile_recipes_are_refused_in_one_line(
    change: dict[str, Any], words: str, one: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_text(one)
    plan = recipe["plan"] | change.get("plan", {})
    hostile = with_recipe(one, one.with_name("hostile.png"), json.dumps(recipe | change | {"plan": plan}))
    error = refused(capsys, "--reproduce", hostile, "--ckpt", checkpoint, "--out", tmp_path / "new")
    assert words in error
    assert not (tmp_path / "new" / "hostile.png").exists()


def test_an_unconditional_image_that_would_start_from_a_reference(
    run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = run("--unconditional", "--num-samples", 1) / "unconditional_0.png"
    recipe = recipe_text(image)
    with_recipe(image, image, json.dumps(recipe | {"plan": recipe["plan"] | {"start_from": 9}}))
    error = refused(capsys, "--reproduce", image, "--ckpt", checkpoint, "--out", tmp_path / "new")
    assert "--start-from needs a reference to begin from" in error


def test_an_image_far_larger_than_its_network(
    one: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((800, 80, 3), np.uint8)).save(tmp_path / "large.png")
    text = json.dumps(recipe_text(one))
    with_recipe(tmp_path / "large.png", tmp_path / "large.png", text)
    error = refused(capsys, "--reproduce", tmp_path / "large.png", "--ckpt", checkpoint, "--out", tmp_path / "new")
    assert "has 800x80 pixels, far more than the 8x8 of its network" in error
