"""This project's own files: checkpoints of train.py, new and old, and safetensors with a description."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.families.native import KEY, describe_metadata, to_metadata
from ilvr_lightning.checkpoints.find import BUNDLED
from ilvr_lightning.checkpoints.load import identify, load_denoiser, read_run_config
from ilvr_lightning.errors import UserError
from tests.support.checkpoints import SMALL, adm_file, old_content, own_checkpoint, own_content, refused


def saved(folder: Path, content: dict[str, Any]) -> Path:
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    info = identify(own_checkpoint(tmp_path))
    description = info.description
    assert info.state.has_ema is True
    assert (description.kind, description.image_shape) == ("ilvr_lightning checkpoint", (3, 16, 16))
    assert description.facts == {"step": 1234, "epoch": 5, "images seen": 1234 * 32, "best val/loss": 0.125}
    assert description.config is not None and description.config["data"]["path"] == "data/toon"
    assert description.assumed == ()


def test_average_and_raw_weights(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    ema, raw = load_denoiser(path, say=None), load_denoiser(path, "raw", say=None)
    assert torch.equal(raw.network.norm.weight, ema.network.norm.weight + 1)


def test_a_checkpoint_without_an_average_has_raw_weights_alone(tmp_path: Path) -> None:
    """As a Trainer without the EMA callback writes it; what else its module holds is no weight of the network."""
    content = own_content()
    del content["current_model_state"]
    content["state_dict"]["metric.total"] = torch.zeros(3)
    path = saved(tmp_path, content)
    assert identify(path).state.has_ema is False
    ema, raw = load_denoiser(path, say=None), load_denoiser(path, "raw", say=None)
    assert torch.equal(raw.network.norm.weight, ema.network.norm.weight)


# --- old files


def test_an_old_checkpoint_loads(tmp_path: Path) -> None:
    """With keys that are retired by now; its network and its images are what they were."""
    path = saved(tmp_path, old_content())
    loaded = load_denoiser(path, say=None)
    assert loaded.image_shape == (3, 16, 16) and loaded.prediction_type == "eps"
    assert torch.equal(loaded.network.norm.weight, old_content()["state_dict"]["network.norm.weight"])
    assert loaded.description.facts["step"] == 1234 and "images seen" not in loaded.description.facts
    config, step = read_run_config(path)
    assert (config.seed, config.optim.lr, step) == (0, 1e-4, 1234)
    export(loaded, "safetensors", tmp_path / "again.safetensors")
    again = load_denoiser(tmp_path / "again.safetensors", say=None)
    assert again.description.model == loaded.description.model
    assert again.description.diffusion == loaded.description.diffusion


@pytest.mark.parametrize(
    ("name", "path", "loss"), [("toon64", "data/toon", 0.03227), ("animals64", "data/animals", 0.030392)]
)
def test_the_bundled_models_load(name: str, path: str, loss: float) -> None:
    loaded = load_denoiser(BUNDLED / name, say=None)
    description = loaded.description
    assert loaded.image_shape == (3, 64, 64) and loaded.prediction_type == "v" and loaded.clip
    assert description.diffusion.schedule == "cosine"
    assert description.config is not None and description.config["data"]["path"] == path
    assert description.facts["best val/loss"] == loss
    assert set(description.octave_gains) == {"fast", "draft"}


def test_networks_on_patches_are_refused(tmp_path: Path) -> None:
    """They were of earlier versions: as a checkpoint of a run, and as safetensors."""
    refusal = "model.patch_size=2: networks that work on patches are no longer supported"
    content = old_content()
    content["hyper_parameters"]["config"]["model"] |= {"patch_size": 2, "pixel_channels": 8}
    reads: list[Callable[[Path], object]] = [load_denoiser, read_run_config]
    for read in reads:
        with pytest.raises(UserError, match=refusal) as caught:
            read(saved(tmp_path, content))
        assert "\n" not in str(caught.value) and "last.ckpt" in str(caught.value)
    metadata = to_metadata(load_denoiser(own_checkpoint(tmp_path), say=None).description)
    described = json.loads(metadata[KEY])
    described["model"] |= {"patch_size": 1, "pixel_channels": 0}
    assert describe_metadata(json.dumps(described)).model == SMALL
    described["model"]["patch_size"] = 2
    with pytest.raises(UserError, match=refusal):
        describe_metadata(json.dumps(described))


# --- read_run_config


def test_the_configuration_of_a_run(tmp_path: Path) -> None:
    config, step = read_run_config(own_checkpoint(tmp_path))
    assert step == 1234
    assert config.model.channel_mult == (1, 2) and config.data.path == "data/toon"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_step": "a\nb"}, "its step is"),
        ({"global_step": -1}, "its step is"),
        ({"hyper_parameters": {}}, "no checkpoint of train.py"),
        ({"hyper_parameters": {"config": {"model": {"channels": -3}}}}, "model.channels must be at least 1"),
        ({"hyper_parameters": {"config": {"no_such_key": 3}}}, "no_such_key"),
        ({"state_dict": {"a": 1}}, "holds no ema weights that can be loaded"),
    ],
)
def test_checkpoints_that_no_run_can_resume(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {**own_content(), **change})
    with pytest.raises(UserError, match=message) as caught:
        read_run_config(path)
    assert "last.ckpt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_cannot_resume_from_weights_of_others(tmp_path: Path) -> None:
    for path in (adm_file(tmp_path), BUNDLED / "toon64" / "model.safetensors"):
        with pytest.raises(UserError, match=r"no checkpoint of train\.py; give a last\.ckpt"):
            read_run_config(path)


# --- what is damaged, or made to harm


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"callbacks": 3}, {"callbacks": {"x": {"octave_gains": nested(30), "calibrated_at": 1234}}},
        {"state_dict": {}}, {"state_dict": {"network.a": 1}},
        {"hyper_parameters": {"config": {"data": {"path": "${oc.env:HOME}"}}}},
        {"hyper_parameters": {"config": {"trainer": nested(30)}}},
    ],
)  # fmt: skip
def test_hostile_checkpoints(change: dict[str, Any], tmp_path: Path) -> None:
    assert "last.ckpt" in refused(saved(tmp_path, {**own_content(), **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"model": None}, {"model": {"channels": 64.5}}, {"model": {"channels": 10**9}},
        {"model": {"num_res_blocks": 10**5}}, {"model": {"channel_mult": [1] * 1000}}, {"model": {"unknown": 1}},
        {"fit_scores": {"2": [[float("nan")]]}}, {"fit_scores": {"2": [[1.0]], "4": [[1.0], [2.0]]}},
        {"fit_scores": {"2": [[1.0], [1.0, 2.0]]}}, {"fit_scores": {"x": []}}, {"fit_scores": [1]},
        {"diffusion": {"num_timesteps": 10**9}}, {"diffusion": {"prediction": "x"}}, {"diffusion": {"schedule": "x"}},
        {"image_shape": [3, "inf", 1]}, {"image_shape": [3, 10**9, 16]}, {"image_shape": 3}, {"image_shape": [3, 16]},
        {"image_shape": [3, 16, 16, 16]}, {"image_shape": [2, 16, 16]}, {"image_shape": [3, 16.5, 16]},
        {"facts": []}, {"clip": 1}, {"facts": {"step": nested(30)}}, {"facts": {"step": "9" * 10**5}}, {"kind": 3},
        {"config": "a"}, {"config": {"data": {"path": "${oc.env:HOME}"}}}, {"assumed": None},
        {"octave_gains": {"fast": {"2": [9.0]}}}, {"octave_gains": nested(30)},
    ],
)  # fmt: skip
def test_hostile_descriptions(change: dict[str, Any], tmp_path: Path) -> None:
    export(load_denoiser(own_checkpoint(tmp_path), say=None), "safetensors", tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["ilvr_lightning"])
    for name, value in change.items():
        merged = description[name] | value if isinstance(value, dict) and name in ("model", "diffusion") else value
        description[name] = merged
    save_file(state, tmp_path / "b.safetensors", {"ilvr_lightning": json.dumps(description)})
    assert str(tmp_path / "b.safetensors") in refused(tmp_path / "b.safetensors")


def test_nothing_can_be_overridden(tmp_path: Path) -> None:
    message = refused(own_checkpoint(tmp_path), overrides={"num_heads": 2})
    assert "override num_heads: a checkpoint of ilvr_lightning has no such override; leave the override out" in message
