"""Folders of diffusers: networks, schedulers, spellings, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from ilvr_lightning.checkpoints.load import identify, load_denoiser
from tests.support.checkpoints import (
    GOOGLE,
    PLAIN,
    UNETS,
    assert_same_output,
    assert_same_weights,
    random_unet,
    refused,
    save_folder,
)


def changed(folder: Path, file: str, settings: dict[str, Any]) -> str:
    """The message that refuses a folder after a change to one of its JSON files."""
    save_folder(folder, random_unet(PLAIN))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return refused(folder)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("safe", [True, False])
def test_diffusers_folder(name: str, safe: bool, tmp_path: Path) -> None:
    unet = random_unet(UNETS[name])
    loaded = load_denoiser(save_folder(tmp_path, unet, safe=safe), say=None)
    assert_same_output(loaded, unet)
    for part in (tmp_path / "unet", next((tmp_path / "unet").glob("diffusion_pytorch_model.*"))):
        assert_same_weights(loaded, load_denoiser(part, say=None))


def test_diffusers_attention_before_it_was_renamed(tmp_path: Path) -> None:
    unet = random_unet(GOOGLE)
    save_folder(tmp_path, unet)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(file).items():
        for word, old in new.items():
            name = name.replace(f".{word}.", f".{old}.")
        state[name] = value
    save_file(state, file)
    assert_same_output(load_denoiser(tmp_path, say=None), unet)


def test_half_precision_variant_of_a_folder(tmp_path: Path) -> None:
    unet = random_unet(PLAIN)
    DDPMPipeline(unet.half(), DDPMScheduler()).save_pretrained(tmp_path, variant="fp16")
    loaded = load_denoiser(tmp_path, say=None)
    assert torch.equal(loaded.network.norm.weight, unet.conv_norm_out.weight.float())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert "split up (diffusion_pytorch_model.safetensors.index.json)" in refused(tmp_path)


def test_the_hash_covers_the_settings(tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN))
    before = identify(tmp_path).sha256
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}))
    assert identify(tmp_path).sha256 != before


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        ({}, "linear"),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400}, "cosine"),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, None),
        ({"beta_schedule": "sigmoid"}, None),
        ({"trained_betas": [0.01, 0.02, 0.05, 0.2], "num_train_timesteps": 4}, None),
        ({"beta_start": 1e-5, "beta_end": 0.03, "num_train_timesteps": 100}, None),
    ],
)
def test_diffusers_scheduler(scheduler: dict[str, Any], schedule: str | None, tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN), **scheduler, prediction_type="v_prediction", clip_sample=False)
    loaded = load_denoiser(tmp_path, say=None)
    expected = DDPMScheduler(**scheduler).alphas_cumprod.double()
    torch.testing.assert_close(loaded.schedule.alphas_cumprod[1:], expected, rtol=2e-5, atol=1e-9)
    assert loaded.prediction_type == "v" and loaded.clip is False
    assert (loaded.description.diffusion.betas is None) == (schedule is not None)
    if schedule is not None:
        assert loaded.description.diffusion.schedule == schedule


def test_a_folder_without_a_scheduler_is_as_published(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, random_unet(PLAIN)) / "unet"
    folder.rename(tmp_path / "alone")
    description = identify(tmp_path / "alone").description
    assert description.clip and {"noise_schedule", "diffusion_steps"} <= description.assumed_names
    given = identify(tmp_path / "alone", overrides={"noise_schedule": "cosine", "diffusion_steps": 50}).description
    assert (given.diffusion.schedule, given.diffusion.T) == ("cosine", 50)


def test_what_the_scheduler_does_and_sampling_does_not_is_noted(tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN), thresholding=True, clip_sample_range=2.0)
    noted = "; ".join(identify(tmp_path).description.assumed)
    assert "dynamic thresholding is not done here" in noted and "it clips to 2.0" in noted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"num_class_embeds": 10}, "num_class_embeds=10"),
        ({"add_attention": False}, "add_attention=False"),
        ({"block_out_channels": [32, 48]}, "multiples of 32"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "['AttnUpBlock2D', 'UpBlock2D'] can"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types=['UpBlock2D'] cannot be loaded"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "CrossAttnDownBlock2D"),
        ({"down_block_types": 3}, "describes no network that loads: 'int' object is not"),
        ({"layers_per_block": "many"}, "describes no network that loads"),
        ({"layers_per_block": 3}, "is missing"),
        ({"out_channels": 4}, "out_channels=4 cannot be loaded; only 3 can"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups=8 cannot be loaded; only 16 can"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift=ada_group"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups"),
        ({"downsample_type": "resnet"}, "up_block_types="),
    ],
)
def test_networks_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    if settings == {"downsample_type": "resnet"}:
        settings = {**settings, "down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}
    assert message in changed(tmp_path, "unet/config.json", settings)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "is for a EDMEulerScheduler"),
        ({"num_train_timesteps": 10**12}, "up to 100,000"),
        ({"num_train_timesteps": "x"}, "up to 100,000"),
        ({"beta_start": None}, "describes no network that loads: linspace()"),
        ({"beta_schedule": "laplace"}, "beta_schedule=laplace"),
        ({"prediction_type": ["a"]}, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, "zero SNR"),
    ],
)
def test_schedulers_that_do_not_fit(scheduler: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in changed(tmp_path, "scheduler/scheduler_config.json", scheduler)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": [1, 2, 3]}, {"sample_size": "abc"}, {"in_channels": "z"}, {"in_channels": -1},
        {"block_out_channels": [0, 64]}, {"layers_per_block": 10**24}, {"norm_num_groups": 1.5},
        {"attention_head_dim": -1}, {"attention_head_dim": 10**9}, {"sample_size": 10**9}, {"attention_head_dim": 0},
        {"block_out_channels": [65536] * 500}, {"block_out_channels": []}, {"down_block_types": []},
        {"down_block_types": [{}, 3]}, {"block_out_channels": "8"}, {"block_out_channels": [32.0, "x"]},
    ],
)  # fmt: skip
def test_hostile_configurations(change: dict[str, Any], tmp_path: Path) -> None:
    changed(tmp_path, "unet/config.json", change)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b" " * 5_000_000])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_cannot_be_read(file: str, content: bytes, tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN))
    (tmp_path / file).write_bytes(content)
    assert Path(file).name in refused(tmp_path)


def test_parts_of_a_folder_that_do_not_suffice(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", random_unet(PLAIN))
    assert "overrid" in refused(folder, overrides={"diffusion_steps": 100})
    assert "the folder's scheduler says it" in refused(folder, overrides={"diffusion_steps": 100})
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), tmp_path / "alone.safetensors")
    assert "without its config.json" in refused(tmp_path / "alone.safetensors")
    weights.unlink()
    assert "holds no weights" in refused(folder)


def test_another_model_of_diffusers_is_named(tmp_path: Path) -> None:
    """By its folder, and by its file alone, whose names are of no family."""
    save_file({"encoder.conv_in.weight": torch.zeros(4)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    assert "holds a VQModel" in refused(tmp_path)
    assert "holds a VQModel" in refused(tmp_path / "diffusion_pytorch_model.safetensors")
