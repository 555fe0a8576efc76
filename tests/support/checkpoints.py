"""Checkpoints for tests: small ones of every family, made without training, and what a test asks of a loaded one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ilvr_lightning.checkpoints.families import export_formats
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.config.schema import Config, DataConfig, DiffusionConfig, GridConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from tests.support import golden

Module = TypeVar("Module", bound=nn.Module)

# --- this project's own


SMALL = UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=32, attention_resolutions=(8,))


def own_content(**model: Any) -> dict[str, Any]:
    """The content of a checkpoint as train.py writes it: 16 px, model SMALL with changes, raw weights = EMA + 1."""
    config = Config(
        data=DataConfig(path="data/toon", image_size=16),
        model=replace(SMALL, **model),
        diffusion=DiffusionConfig(schedule="linear", num_timesteps=1000, prediction="eps", loss="simple"),
        grid=GridConfig(factors=(4,)),
    )
    ema = {f"network.{name}": value for name, value in random_network(config.model, (16, 16)).state_dict().items()}
    return {
        "state_dict": ema,
        "current_model_state": {name: value + 1 for name, value in ema.items()},
        "hyper_parameters": {"config": config.plain()},
        "global_step": 1234,
        "epoch": 5,
        "callbacks": {"SaveCheckpoints": {"best": 0.125}},
    }


def old_content() -> dict[str, Any]:
    """A checkpoint as train.py of commit d81572a wrote it, by hand: with keys that are retired, without later ones."""
    content = own_content()
    content["hyper_parameters"] = {
        "config": {
            "seed": 0, "resume": None, "init_from": None, "compile": "auto", "init_remake_head": False,
            "run": {"name": None},
            "data": {
                "path": "data/toon", "name": None, "split": "train", "validation_split": None,
                "validation_fraction": 0.05, "image_column": None, "label": None, "batch_size": "auto",
                "image_size": 16, "channels": 3, "flip": True, "on_broken": "skip", "cache_mb": 1024,
                "num_workers": None, "epoch_images": None, "streaming": False, "shuffle_window": 4096,
            },
            "model": {
                "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,),
                "num_head_channels": 32, "num_heads": 4, "resblock_updown": False, "use_scale_shift_norm": True,
                "use_new_attention_order": False, "dropout": 0.0, "learn_sigma": False, "downsample_padding": 1,
                "flip_sin_to_cos": True, "freq_shift": 0, "timestep_scale": 1.0, "norm_num_groups": 32,
                "norm_eps": 1e-05, "patch_size": 1, "pixel_channels": 0,
            },
            "diffusion": {
                "schedule": "linear", "num_timesteps": 1000, "betas": None, "prediction": "eps", "loss": "simple"
            },
            "optim": {
                "name": "adamw", "lr": 0.0001, "betas": (0.9, 0.999), "weight_decay": 0.0, "warmup_steps": 100,
                "decay_steps": None, "grad_clip": 1.0,
            },
            "ema": {"decay": 0.9999},
            "sampling": {"sampler": None, "num_steps": 10, "clip": None, "factor": None, "octave_gains": None},
            "grid": {
                "references": (), "factors": (4,), "samples": 2, "every_n_epochs": 1, "every_n_steps": 0,
                "preset": "fast",
            },
            "calibration": {"images": 64},
            "checkpoint": {"every_n_steps": 1000, "on_full_disk": "continue"},
            "trainer": {
                "max_epochs": 100, "log_every_n_steps": 25, "default_root_dir": "runs", "limit_test_batches": 1.0,
                "limit_predict_batches": 1.0, "sync_batchnorm": False, "overfit_batches": 0.0, "min_epochs": None,
                "min_steps": None, "barebones": False, "val_check_interval": None, "precision": "32-true",
            },
        }
    }  # fmt: skip
    return content


def own_checkpoint(folder: Path, **model: Any) -> Path:
    """A checkpoint as train.py writes it, without training."""
    path = folder / "last.ckpt"
    torch.save(own_content(**model), path)
    return path


def random_network(config: UNetConfig, size: tuple[int, int], image_channels: int = 3) -> UNet:
    """A network none of whose layers is zero, as the last ones of residual branches are at first."""
    return filled(UNet(config, size, image_channels))


def filled(module: Module) -> Module:
    """A network in eval mode, with the same random weights each time; none of its layers is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            value.copy_(0.05 * torch.randn(value.shape, generator=generator) + is_scale)
    return module.eval()


# --- ADM's


def adm_file(folder: Path, model: golden.ModelName = "ilvr", name: str = "adm.pt") -> Path:
    """A state dict of ADM, by a network of the reference implementation."""
    torch.save(golden.filled_state(model), folder / name)
    return folder / name


# --- diffusers'


GOOGLE: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
"""The settings of google/ddpm-*, but a smaller network."""
PLAIN: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
}
"""diffusers' own defaults."""
RESIDUAL: dict[str, Any] = {
    "sample_size": (16, 24),
    "in_channels": 1,
    "out_channels": 2,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "layers_per_block": 1,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "attention_head_dim": 16,
}
"""ADM's blocks, for images that are not square and greyscale, with learned variance."""
UNETS = {"google": GOOGLE, "plain": PLAIN, "residual": RESIDUAL}


def random_unet(settings: dict[str, Any]) -> UNet2DModel:
    """A UNet2DModel with random weights."""
    return filled(UNet2DModel(**settings))


def save_folder(folder: Path, unet: UNet2DModel, *, safe: bool = True, **scheduler: Any) -> Path:
    """A folder as diffusers writes it."""
    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(folder, safe_serialization=safe)
    return folder


# --- exports


def export_target(kind: str, folder: Path) -> Path:
    """Where an export goes: ADM's is a file."""
    return folder / ("out.pt" if kind == "adm" else "out")


def overrides_for(loaded: LoadedDenoiser, kind: str) -> dict[str, Any]:
    """The overrides that an export says its file must be read with."""
    return export_formats()[kind].overrides_for(loaded.description, loaded.network.state_dict())


# --- what a test asks


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Three images of noise, and their 0-based timesteps."""
    return torch.randn((3, *shape), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])


def assert_same_output(loaded: LoadedDenoiser, unet: UNet2DModel) -> None:
    x, t = inputs(loaded.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(x, t), unet(x, t).sample, rtol=0, atol=2e-5)


def assert_same_weights(a: LoadedDenoiser, b: LoadedDenoiser) -> None:
    first, second = a.network.state_dict(), b.network.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def refused(path: Path, **settings: Any) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        load_denoiser(path, say=None, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_equal_up_to_rounding(a: LoadedDenoiser, network: Callable[..., Any]) -> None:
    """A network and another's code or weights give the same output, up to the order of float32 sums."""
    x, t = torch.randn((2, *a.image_shape), generator=torch.Generator().manual_seed(2)), torch.tensor([1, 40])
    with torch.no_grad():
        expected, got = a.network(x, t), network(x, t)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))
