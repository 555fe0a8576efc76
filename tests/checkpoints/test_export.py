"""Exports: what goes out comes in again as the same network, in every format, or is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors import safe_open

from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError
from tests.support import golden
from tests.support.checkpoints import (
    UNETS,
    assert_equal_up_to_rounding,
    assert_same_output,
    assert_same_weights,
    export_target,
    inputs,
    overrides_for,
    own_checkpoint,
    random_unet,
    save_folder,
)

FORMATS = ("safetensors", "adm", "diffusers")


# --- one network, every format


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_own_checkpoint_out_and_in_again(kind: str, learn_sigma: bool, tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, learn_sigma=learn_sigma, num_heads=2, num_head_channels=-1)
    if kind == "diffusers":  # which has one width of heads
        path = own_checkpoint(tmp_path, learn_sigma=learn_sigma)
    loaded = load_denoiser(path, say=None)
    out = export_target(kind, tmp_path)
    files = export(loaded, kind, out)
    assert all(file.is_file() for file in files)
    again = load_denoiser(out, overrides=overrides_for(loaded, kind), say=None)
    assert again.image_shape == loaded.image_shape
    x, t = inputs(loaded.image_shape)
    with torch.no_grad():
        expected, got = loaded.network(x, t), again.network(x, t)
    if kind == "diffusers":  # queries, keys and values change places, and so the order of sums
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        once_more = tmp_path / "once_more"
        export(again, kind, once_more)
        assert_same_weights(again, load_denoiser(once_more, say=None))
    else:
        assert_same_weights(loaded, again)
        assert torch.equal(expected, got)
    if kind == "safetensors":
        assert files == [out / "model.safetensors"]
        for name in ("kind", "model", "diffusion", "image_shape", "facts"):
            assert getattr(again.description, name) == getattr(loaded.description, name)


@pytest.mark.parametrize("model", golden.MODELS)
def test_adm_file_out_and_in_again_is_bit_equal(model: golden.ModelName, tmp_path: Path) -> None:
    export(golden.denoiser(model), "adm", tmp_path / "again.pt")
    state, original = torch.load(tmp_path / "again.pt", weights_only=True), golden.filled_state(model)
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in original)


@pytest.mark.parametrize("model", golden.MODELS)
def test_ours_to_diffusers_runs_in_its_pipeline(model: golden.ModelName, tmp_path: Path) -> None:
    export(golden.denoiser(model), "diffusers", tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    x, t = golden.array(f"unet/{model}/x"), golden.array(f"unet/{model}/t")
    with torch.no_grad():
        out = pipeline.unet(x, t).sample
    torch.testing.assert_close(out, golden.array(f"unet/{model}/out"), rtol=0, atol=2e-5)
    schedule = golden.denoiser(model).schedule.alphas_cumprod[1:]
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), schedule, rtol=2e-5, atol=1e-9)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 32, 32, 3) and images.std() > 0


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_folder_out_and_in_again_is_bit_equal(name: str, tmp_path: Path) -> None:
    unet = random_unet(UNETS[name])
    loaded = load_denoiser(save_folder(tmp_path / "in", unet), say=None)
    export(loaded, "diffusers", tmp_path / "out")
    again = UNet2DModel.from_pretrained(tmp_path / "out" / "unet", low_cpu_mem_usage=False)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in unet.state_dict().items())
    assert_same_output(loaded, again)


# --- what must be known to read a file


def test_overrides_are_what_the_file_would_not_say_alone(tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    assert overrides_for(loaded, "adm") == {"image_size": 16, "num_head_channels": 32}
    assert overrides_for(loaded, "safetensors") == overrides_for(loaded, "diffusers") == {}


# --- what cannot be written


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("adm", {"norm_eps": 1e-6}, "model.norm_eps=1e-05, and this one 1e-06"),
        ("adm", {"channels": 16}, "widths that 32 divides"),
        ("adm", {"timestep_scale": 0.3}, "model.timestep_scale=0.3"),
        ("diffusers", {"timestep_scale": 0.25}, "model.timestep_scale=0.25"),
        ("diffusers", {"attention_resolutions": (16, 8), "num_head_channels": -1, "num_heads": 4}, "attention heads"),
        ("diffusers", {"channel_mult": (2, 3)}, r"model.channel_mult must begin with 1: it is \[2, 3\]"),
        ("diffusers", {"channels": 16}, "model.norm_num_groups=32 divides"),
    ],
)
def test_what_a_format_cannot_express_is_said(kind: str, model: dict[str, Any], message: str, tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path, **model), say=None)
    with pytest.raises(UserError, match=message):
        export(loaded, kind, export_target(kind, tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "last.ckpt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (3, 16, 32)}, "square"),
        ({"diffusion": DiffusionConfig(prediction="v")}, "diffusion.prediction=v"),
        ({"diffusion": DiffusionConfig(betas=(0.1, 0.2), prediction="eps")}, "explicit betas"),
    ],
)
def test_diffusion_that_adm_cannot_express(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    loaded.description = replace(loaded.description, **change)
    with pytest.raises(UserError, match=message):
        export(loaded, "adm", tmp_path / "out.pt")


def test_one_head_at_all_levels_is_expressed(tmp_path: Path) -> None:
    """However wide the levels: diffusers has a word for it."""
    loaded = load_denoiser(own_checkpoint(tmp_path, attention_resolutions=(16, 8), num_head_channels=-1, num_heads=1))
    export(loaded, "diffusers", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["attention_head_dim"] is None
    assert_equal_up_to_rounding(loaded, load_denoiser(tmp_path / "out", say=None).network)


def test_adm_is_a_file(tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    for name in ("folder", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=rf"give a name such as .*{name}\.pt"):
            export(loaded, "adm", tmp_path / name)


@pytest.mark.parametrize("kind", FORMATS)
def test_half_precision(kind: str, tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    sizes = {}
    for half in (False, True):
        out = tmp_path / f"{half}{'.pt' if kind == 'adm' else ''}"
        files = export(loaded, kind, out, half=half)
        sizes[half] = max(path.stat().st_size for path in files)
    assert sizes[True] < 0.6 * sizes[False]
    again = load_denoiser(out, overrides={"image_size": 16} if kind == "adm" else None, say=None).network.state_dict()
    for name, value in loaded.network.state_dict().items():
        assert again[name].dtype == torch.float32
        if kind != "diffusers":
            torch.testing.assert_close(again[name], value, rtol=2**-11, atol=2**-25)


def test_half_that_does_not_hold_a_weight(tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    with torch.no_grad():
        next(loaded.network.parameters()).fill_(1e5)
    with pytest.raises(UserError, match="beyond the range of float16"):
        export(loaded, "safetensors", tmp_path / "out", half=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_that_fails_leaves_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)

    def fail(state: object, path: Path, *rest: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ilvr_lightning.checkpoints.export.save_file", fail)
    monkeypatch.setattr("ilvr_lightning.checkpoints.export.torch.save", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(loaded, kind, export_target(kind, tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        export(load_denoiser(path, say=None), "adm", path)
    assert path.read_bytes() == before
    (tmp_path / "empty").mkdir()
    export(load_denoiser(path, say=None), "safetensors", tmp_path / "empty")
    with pytest.raises(UserError, match="already exists"):
        export(load_denoiser(path, say=None), "safetensors", tmp_path / "empty")


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    for name in ("x" * 300, "a\0b", "last.ckpt/inside"):
        with pytest.raises(UserError, match="cannot be written: "):
            export(loaded, "safetensors", tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / "last.ckpt"]


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    for kind in FORMATS:
        for file in export(loaded, kind, tmp_path / f"{kind}.pt"):
            assert file.stat().st_mode & 0o444 == 0o444


# --- what an export says of the machine


def test_no_place_of_the_machine_is_exported(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    config = content["hyper_parameters"]["config"]
    config["data"]["path"] = config["init_from"] = "/home/someone/pictures"
    config["grid"]["references"] = ("/home/someone/a.png",)
    config["trainer"]["default_root_dir"] = "/home/someone/runs"
    torch.save(content, path)
    export(load_denoiser(path, say=None), "safetensors", tmp_path / "out")
    assert b"someone" not in (tmp_path / "out" / "model.safetensors").read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ilvr_lightning"])["config"]["data"]["path"] == "pictures"
