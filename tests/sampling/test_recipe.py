"""The recipe in a PNG: how it is read, what it identifies, and what a field means that it lacks."""

import json
from collections.abc import Callable
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from ilvr_lightning.diffusion.plan import FORMER_DEFAULTS, SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling import recipe as module
from ilvr_lightning.sampling.recipe import (
    Recipe,
    digest,
    identity,
    read_recipe,
    read_values,
)

FIRST_VERSION: dict[str, Any] = {
    "plan": {
        "sampler": "ddim", "num_steps": 50, "spacing": "uniform", "eta": 0.0, "variance": "auto", "clip": True,
        "factor": 4, "kernel": "cubic", "orthogonal": False, "reference_noise": "fresh", "condition_from": 1000,
        "condition_to": 0, "timesteps": None,
    },
    "seed": 3, "sample": 1, "weights": "ema", "checkpoint_sha256": "a" * 64, "reference": "x",
    "reference_sha256": "b" * 64, "batch_size": 8, "threads": 2, "precision": "32", "device": "cpu",
}  # fmt: skip
"""What the first version of this program wrote into its PNGs."""


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        plan=SamplingPlan(factor=4).resolved(1000), seed=3, sample=1, weights="ema", checkpoint_sha256="a" * 64,
        reference="x", reference_sha256="b" * 64,
    )  # fmt: skip


def save(path: Path, text: str, zip: bool = False) -> Path:
    info = PngInfo()
    info.add_text("ilvr_lightning", text, zip=zip)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, pnginfo=info)
    return path


def test_what_is_written_is_read(recipe: Recipe, tmp_path: Path) -> None:
    full = replace(recipe, mask_sha256="c" * 64, overrides={"num_heads": 4, "noise_schedule": "cosine"}, threads=3)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png", pnginfo=full.png_info())
    assert read_recipe(tmp_path / "x.png") == full
    assert read_values(tmp_path / "x.png") == full.plain()


@pytest.mark.parametrize("name", ["${oc.env:SECRET}", "???", "a b", "日本語", ""])
def test_a_reference_may_have_any_name(name: str, recipe: Recipe, tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", json.dumps(replace(recipe, reference=name).plain()))
    assert read_recipe(path).reference == name


def test_a_recipe_is_read_without_decoding_the_image(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "x.png", json.dumps(recipe.plain()))
    complete = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(PngImageFile, "load", None)
        assert read_recipe(path) == recipe
    for damaged in (complete[:-1], complete[:-13], complete[: len(complete) // 2], b"", b"\0" * len(complete)):
        path.write_bytes(damaged)
        assert read_values(path) is None
    assert read_recipe(save(path, json.dumps(recipe.plain()), zip=True)) == recipe  # as another program may save it


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", "{", '{"plan": 3}', "[" * 100_000, '{"plan": {}, "seed": ' + "9" * 5000]
)
def test_what_is_no_recipe(text: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", text)
    assert read_values(path) is None
    with pytest.raises(UserError, match="holds no recipe"):
        read_recipe(path)


# Which image is meant


def test_every_field_either_identifies_an_image_or_is_its_environment(recipe: Recipe) -> None:
    environment = {"batch_size", "threads", "precision", "compiled", "device", "reference", "evidence"}
    others: dict[str, Any] = {
        "plan": SamplingPlan(factor=8).resolved(1000), "seed": 4, "sample": 2, "weights": "raw",
        "checkpoint_sha256": "c" * 64, "reference": "y", "reference_sha256": "d" * 64, "mask_sha256": "e" * 64,
        "overrides": {"num_heads": 4}, "batch_size": 2, "threads": 9, "precision": "bf16", "compiled": True,
        "device": "cuda", "evidence": -1.5,
    }  # fmt: skip
    assert others.keys() == recipe.plain().keys()
    for name, value in others.items():
        same = digest(identity(replace(recipe, **{name: value}).plain())) == digest(identity(recipe.plain()))
        assert same == (name in environment), name


@pytest.mark.parametrize("name", sorted(FORMER_DEFAULTS))
def test_every_setting_identifies_an_image(name: str, recipe: Recipe) -> None:
    """At its former default, too, where it is left out of the identity."""
    plain = recipe.plain()
    assert plain["plan"][name] != FORMER_DEFAULTS[name]
    changed = {**plain, "plan": {**plain["plan"], name: FORMER_DEFAULTS[name]}}
    assert digest(identity(changed)) != digest(identity(plain))


def test_a_field_that_is_added_later_changes_the_identity_of_no_image(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule: a field is left out of the identity where it has the value that its absence stands for."""
    old = recipe.plain()
    before = digest(identity(old))
    later_plan = make_dataclass(
        "LaterPlan", [("dummy", float, field(default=0.5))], bases=(SamplingPlan,), frozen=True, kw_only=True
    )
    later_recipe = make_dataclass(
        "LaterRecipe", [("extra", list, field(default_factory=list))], bases=(Recipe,), frozen=True, kw_only=True
    )
    monkeypatch.setattr(module, "SamplingPlan", later_plan)
    monkeypatch.setattr(module, "Recipe", later_recipe)
    new = {**old, "extra": [], "plan": {**old["plan"], "dummy": 0.5}}
    assert digest(identity(new)) == digest(identity(old)) == before
    for changed in ({**new, "extra": [1]}, {**new, "plan": {**new["plan"], "dummy": 0.75}}):
        assert digest(identity(changed)) != before


def test_a_default_that_changes_later_changes_the_identity_of_no_image(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORMER_DEFAULTS keeps what the absence of a field meant."""
    later = make_dataclass(
        "Later", [("dummy", float, field(default=0.75))], bases=(SamplingPlan,), frozen=True, kw_only=True
    )
    monkeypatch.setattr(module, "SamplingPlan", later)
    monkeypatch.setattr(module, "FORMER_DEFAULTS", {**FORMER_DEFAULTS, "dummy": 0.5})
    old = recipe.plain()
    then, now = ({**old, "plan": {**old["plan"], "dummy": value}} for value in (0.5, 0.75))
    assert identity(then) == identity(old) != identity(now)


# What a field means that an old PNG lacks


def test_the_first_versions_recipe_is_read(tmp_path: Path) -> None:
    found = read_recipe(save(tmp_path / "x.png", json.dumps(FIRST_VERSION)))
    assert found.plain().items() >= {k: v for k, v in FIRST_VERSION.items() if k != "plan"}.items()
    assert found.plain()["plan"].items() >= FIRST_VERSION["plan"].items()
    plan = found.plan
    assert (plan.eps_extrapolation, plan.octave_gains, plan.start_from, plan.exact_low_band) == (0, (), None, False)
    assert (found.mask_sha256, found.overrides, found.compiled) == (None, {}, False)
    assert identity(found.plain()) == identity(FIRST_VERSION)


@pytest.mark.parametrize("name", sorted(FORMER_DEFAULTS))
def test_a_setting_that_is_missing_means_its_former_default(name: str, tmp_path: Path) -> None:
    plan = {key: value for key, value in FIRST_VERSION["plan"].items() if key != name}
    path = save(tmp_path / "x.png", json.dumps({**FIRST_VERSION, "plan": plan}))
    assert getattr(read_recipe(path).plan, name) == FORMER_DEFAULTS[name] != getattr(SamplingPlan(), name)


# What is refused

Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 2**63}, {"batch_size": 0}, {"threads": -1}, {"threads": 1.5}, {"weights": "foo"},
        {"device": "cuda:/etc"}, {"checkpoint_sha256": "../../secret"}, {"checkpoint_sha256": None},
        {"reference_sha256": "x"}, {"mask_sha256": "A" * 64}, {"seed": -1}, {"seed": 2**32}, {"seed": 2**70},
        {"seed": 1.5}, {"seed": [1]}, {"sample": None}, {"sample": 2**63}, {"compiled": "perhaps"}, {"precision": 16},
        {"overrides": [1]}, {"overrides": {"x": "${oc.env:SECRET}"}}, {"later": 1},
    ],
)  # fmt: skip
def test_hostile_recipes_are_refused(change: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", json.dumps(recipe.plain() | change))
    with pytest.raises(UserError, match=r"the recipe in .* cannot be used by this version: ") as refused:
        read_recipe(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"octave_gains": [[1.0], [1.0]]}, {"octave_gains": 1.0}, {"octave_gains": [True]}, {"octave_gains": [9.0]},
        {"condition_from": [25]}, {"condition_from": 1.5}, {"condition_to": [0, 0]}, {"condition_to": 0.5},
        {"start_from": "x"}, {"start_from": 5.5}, {"timesteps": [True]}, {"timesteps": [[3]]}, {"factor": 2.0},
        {"factor": [2]}, {"factor": True}, {"factor": 0}, {"respaced_range_t": 0.5}, {"respaced_range_t": True},
        {"eta": True}, {"eta": "x"}, {"eta": float("nan")}, {"clip": "perhaps"}, {"sampler": ["ddim"]},
        {"sampler": "foo"}, {"num_steps": 2.5}, {"num_steps": "some"}, {"exact_low_band": None}, {"later": 1},
    ],
)  # fmt: skip
def test_hostile_plans_are_refused(change: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    plain = recipe.plain()
    path = save(tmp_path / "x.png", json.dumps({**plain, "plan": {**plain["plan"], **change}}))
    with pytest.raises(UserError, match=r"the recipe in .* cannot be used by this version: ") as refused:
        read_recipe(path)
    assert "\n" not in str(refused.value)
