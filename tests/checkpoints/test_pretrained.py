"""SaveCheckpoints of others: recognised by content, loaded strictly, given back."""

import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ilvr_lightning.checkpoints.__main__ import main
from ilvr_lightning.checkpoints.export import Options, export
from ilvr_lightning.checkpoints.families import adm, ddim
from ilvr_lightning.checkpoints.files import PIECES, StateDict
from ilvr_lightning.checkpoints.finetune import load_weights_into
from ilvr_lightning.checkpoints.load import LoadedDenoiser, identify, load_denoiser
from ilvr_lightning.config.schema import Config, DataConfig, DiffusionConfig, GridConfig
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.training.module import DDPM
from tests.support import golden

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
"""As google/ddpm-* has it, smaller."""
PLAIN: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
}
"""With diffusers' own defaults."""
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
"""ADM's blocks, not square, greyscale, learned variance."""
UNETS = {"google": GOOGLE, "plain": PLAIN, "residual": RESIDUAL}


def random_unet(settings: dict[str, Any]) -> UNet2DModel:
    unet = UNet2DModel(**settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            value.copy_(0.05 * torch.randn(value.shape, generator=generator) + is_scale)
    return unet.eval()


def save_folder(folder: Path, unet: UNet2DModel, *, safe: bool = True, **scheduler: Any) -> Path:
    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(folder, safe_serialization=safe)
    return folder


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return torch.randn((3, *shape), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])


def assert_same_output(loaded: LoadedDenoiser, unet: UNet2DModel) -> None:
    x, t = inputs(loaded.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(x, t), unet(x, t).sample, rtol=0, atol=2e-5)


def assert_same_weights(a: LoadedDenoiser, b: LoadedDenoiser) -> None:
    first, second = a.network.state_dict(), b.network.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


SILENT = {"predict_xstart": False}
"""With golden.overrides, all that a state dict does not tell."""


def adm_file(folder: Path, model: golden.ModelName = "ilvr", name: str = "adm.pt") -> Path:
    torch.save(golden.filled_state(model), folder / name)
    return folder / name


# --- ADM and its kin


@pytest.mark.parametrize("model", golden.MODELS)
def test_architecture_is_read_off_names_and_shapes(model: golden.ModelName, tmp_path: Path) -> None:
    h = golden.hparams(model)
    found = identify(adm_file(tmp_path, model), overrides=golden.overrides(model) | SILENT).description
    assert found.kind == ("ADM state dict" if h["resblock_updown"] else "improved-diffusion state dict")
    assert found.assumed == ()
    config = found.model
    assert config.channels == h["num_channels"]
    assert ",".join(map(str, config.channel_mult)) == h["channel_mult"]
    assert ",".join(map(str, config.attention_resolutions)) == h["attention_resolutions"]
    for name in ("num_res_blocks", "resblock_updown", "use_scale_shift_norm", "learn_sigma"):
        assert getattr(config, name) == h[name]
    assert found.diffusion.schedule == h["noise_schedule"]


def full_size_state() -> dict[str, Tensor]:
    """Names and shapes of the FFHQ, AFHQ-dog, CelebA-HQ, CUB, Flowers and MetFaces files."""
    config = UNetConfig(
        channels=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=1, attention_resolutions=(16,),
        num_head_channels=64, resblock_updown=True, learn_sigma=True,
    )  # fmt: skip
    with torch.device("meta"):
        ours = UNet(config, (256, 256)).state_dict()
    return {
        theirs: ours[name][..., None] if re.search(r"(qkv|proj_out)\.weight$", theirs) else ours[name]
        for name, (theirs,) in adm.names(ours, config).items()
    }


def test_the_published_files_are_recognised_with_no_override() -> None:
    shapes = {name: tuple(value.shape) for name, value in full_size_state().items()}
    found = adm.describe(shapes, None)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 93_563_910
    assert found.image_shape == (3, 256, 256)
    model = found.model
    assert (model.channels, model.channel_mult, model.num_res_blocks) == (128, (1, 1, 2, 2, 4, 4), 1)
    assert model.attention_resolutions == (16,)
    assert (model.num_head_channels, model.resblock_updown, model.use_scale_shift_norm) == (64, True, True)
    assert model.learn_sigma and not model.use_new_attention_order
    assert (found.diffusion.schedule, found.diffusion.T, found.diffusion.prediction) == ("linear", 1000, "eps")


@pytest.mark.parametrize(
    ("mult", "size"), [((1, 1, 2, 2, 4, 4), 256), ((1, 1, 2, 3, 4), 128), ((1, 2, 3, 4), 64), ((1, 2, 2, 2), 32)]
)
def test_image_size_follows_the_published_tables(mult: tuple[int, ...], size: int) -> None:
    config = UNetConfig(channels=32, channel_mult=mult, num_res_blocks=1, attention_resolutions=(16,))
    with torch.device("meta"):
        ours = UNet(config, (size, size)).state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, (theirs,) in adm.names(ours, config).items()}
    found = adm.describe(shapes, None)
    assert found.image_shape == (3, size, size)
    assert found.model.attention_resolutions == (16,)
    assert found.model.num_heads == 4 and found.model.num_head_channels == -1  # improved-diffusion's


def test_every_assumption_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_denoiser(adm_file(tmp_path))
    said = capsys.readouterr().out
    assert "ADM state dict, 3x32x32" in said
    for assumption in ("image_size=32", "num_head_channels=64", "use_new_attention_order=False",
                       "noise_schedule=linear", "diffusion_steps=1000", "predict_xstart=False"):  # fmt: skip
        assert assumption in said
    load_denoiser(adm_file(tmp_path), overrides=golden.overrides("ilvr") | SILENT)
    assert "assumed" not in capsys.readouterr().out


def heads(overrides: dict[str, Any] | None, model: golden.ModelName = "ilvr") -> tuple[int, int]:
    shapes = {name: tuple(value.shape) for name, value in golden.filled_state(model).items()}
    config = adm.describe(shapes, overrides).model
    return config.num_head_channels, config.num_heads


def test_num_head_channels_wins_unless_it_is_minus_one() -> None:
    assert heads(None) == (64, 4)
    assert heads({"num_head_channels": 16, "num_heads": 2})[0] == 16
    assert heads({"num_head_channels": -1, "num_heads": 2}) == (-1, 2)
    assert heads({"num_heads": 2}) == (-1, 2)
    assert heads(None, "improved") == (-1, 4)
    assert heads({"num_head_channels": 32}, "improved")[0] == 32


def test_improved_diffusion_rescales_the_timesteps_of_long_schedules() -> None:
    shapes = {name: tuple(value.shape) for name, value in golden.filled_state("improved").items()}
    assert adm.describe(shapes, {"diffusion_steps": 4000}).model.timestep_scale == 0.25
    assert adm.describe(shapes, {"diffusion_steps": 4000, "rescale_timesteps": False}).model.timestep_scale == 1
    assert adm.describe(shapes, None).model.timestep_scale == 1
    shapes = {name: tuple(value.shape) for name, value in golden.filled_state("ilvr").items()}
    assert adm.describe(shapes, {"diffusion_steps": 4000}).model.timestep_scale == 1


def test_rescaled_timesteps_reach_the_embedding(tmp_path: Path) -> None:
    path = adm_file(tmp_path, "improved")
    plain = load_denoiser(path, overrides=golden.overrides("improved"), say=None)
    long = load_denoiser(path, overrides=golden.overrides("improved") | {"diffusion_steps": 4000}, say=None)
    x, _ = inputs((3, 32, 32))
    with torch.no_grad():
        a = plain.network(x, torch.tensor([0, 10, 999]))
        b = long.network(x, torch.tensor([0, 40, 3996]))
    assert torch.equal(a, b)


@pytest.mark.parametrize("wrapper", ["model", "ema", "state_dict", "module", "bare", "ddim", "half", "safetensors"])
def test_wrappings_of_a_state_dict(wrapper: str, tmp_path: Path) -> None:
    state, other = golden.filled_state("plain"), {k: v + 1 for k, v in golden.filled_state("plain").items()}
    path = tmp_path / "x.bin"
    contents: dict[str, Any] = {
        "model": {"model": state, "step": 3},
        "ema": {"ema": state, "model": other},
        "state_dict": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "module": {f"module.{k}": v for k, v in state.items()},
        "bare": state,
        "ddim": [other, {"state": {}}, 3, 4, state],
        "half": {k: v.half() for k, v in state.items()},
    }
    if wrapper == "safetensors":
        save_file(state, path)
    else:
        torch.save(contents[wrapper], path, _use_new_zipfile_serialization=wrapper != "bare")
    loaded = load_denoiser(path, overrides=golden.overrides("plain"), say=None)
    x, t = golden.array("unet/plain/x"), golden.array("unet/plain/t")
    with torch.no_grad():
        out = loaded.network(x, t)
    assert out.dtype == torch.float32 and not loaded.network.training
    # Weights rounded to half precision move the output by more than float32's own rounding.
    atol = 2e-2 if wrapper == "half" else 2e-5
    torch.testing.assert_close(out, golden.array("unet/plain/out"), rtol=0, atol=atol)
    if wrapper in ("ema", "ddim"):
        raw = load_denoiser(path, "raw", golden.overrides("plain"), say=None)
        assert torch.equal(raw.network.norm.weight, other["out.0.weight"])


def test_half_precision_is_loaded_as_float32(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in golden.filled_state("plain").items()}
    torch.save(state, tmp_path / "half.pt")
    loaded = load_denoiser(tmp_path / "half.pt", overrides=golden.overrides("plain"), say=None)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert torch.equal(loaded.network.norm.weight, state["out.0.weight"].float())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_is_read_in_parts(zipped: bool, tmp_path: Path) -> None:
    sizes = {f"w{i}": 10 * i for i in range(40)}
    torch.save(
        {name: torch.full((size,), 1.0 + size) for name, size in sizes.items()},
        tmp_path / "w.pt",
        _use_new_zipfile_serialization=zipped,
    )
    state = StateDict(path=tmp_path / "w.pt", shapes={name: (size,) for name, size in sizes.items()})
    pieces = list(state.pieces())
    if zipped:
        assert PIECES // 2 <= len(pieces) <= PIECES
        assert max(sum(v.numel() for v in piece.values()) for piece in pieces) < 0.13 * sum(sizes.values())
    read = {name: value for piece in pieces for name, value in piece.items()}
    assert read.keys() == sizes.keys()
    assert all(torch.equal(read[name], torch.full((size,), 1.0 + size)) for name, size in sizes.items())


# --- diffusers


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
    theirs = DDPMScheduler(**scheduler).alphas_cumprod.double()
    torch.testing.assert_close(loaded.schedule.alphas_cumprod[1:], theirs, rtol=2e-5, atol=1e-9)
    assert loaded.prediction_type == "v" and loaded.clip is False
    assert (loaded.description.diffusion.betas is None) == (schedule is not None)
    if schedule is not None:
        assert loaded.description.diffusion.schedule == schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"num_class_embeds": 10}, "num_class_embeds=10"),
        ({"add_attention": False}, "add_attention=False"),
        ({"block_out_channels": [32, 48]}, "multiples of 32"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "they must match"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "CrossAttnDownBlock2D"),
        ({"down_block_types": 3}, "no readable UNet2DModel"),
        ({"layers_per_block": "many"}, "must be a whole number"),
    ],
)
def test_diffusers_networks_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN))
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path, say=None)


# --- the DDIM authors' layout


DDIM_WORDS = [
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", r"down.\1.attn.\2."),
    (r"^down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]
"""diffusers' names to the DDIM authors', written down apart from the package's tables."""


def ddim_state(unet: UNet2DModel) -> dict[str, Tensor]:
    levels, state = len(unet.config["block_out_channels"]), {}
    for name, value in unet.state_dict().items():
        for pattern, word in DDIM_WORDS:
            name = re.sub(pattern, word, name)
        for kind, word in (("resnets", "block"), ("attentions", "attn"), ("upsamplers", "upsample")):
            if match := re.match(rf"up_blocks\.(\d+)\.{kind}\.(\d+)\.", name):
                place = "" if kind == "upsamplers" else f".{match[2]}"
                name = f"up.{levels - 1 - int(match[1])}.{word}{place}.{name[match.end() :]}"
        is_attention = re.search(r"\.(q|k|v|proj_out)\.weight$", name)
        state[name] = value[..., None, None].clone() if is_attention else value.clone()
    return state


@pytest.mark.parametrize("mult", [(1, 2, 2), (1, 2, 2, 2)])
def test_ddim_layout_is_ho_et_als_network(mult: tuple[int, ...], tmp_path: Path) -> None:
    inner = len(mult) - 2
    settings = GOOGLE | {
        "block_out_channels": tuple(32 * m for m in mult),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * inner),
        "up_block_types": (*["UpBlock2D"] * inner, "AttnUpBlock2D", "UpBlock2D"),
    }
    unet = random_unet(settings)
    torch.save(ddim_state(unet), tmp_path / "celeba_hq.ckpt")
    loaded = load_denoiser(tmp_path / "celeba_hq.ckpt", say=None)
    assert loaded.description.kind.startswith("DDIM state dict")
    assert loaded.image_shape == (3, 32, 32)
    assert_same_output(loaded, unet)


@pytest.mark.parametrize("setting", ["downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps", "num_heads"])
def test_each_difference_of_ho_et_als_network_matters(setting: str) -> None:
    """None of them shows in the shapes: without it the weights load without complaint, and the output is another."""
    unet = random_unet(GOOGLE)
    state = ddim_state(unet)
    config = ddim.describe({name: tuple(v.shape) for name, v in state.items()}, None).model
    changed: dict[str, Any] = {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-2,
                               "num_heads": 4}  # fmt: skip
    outputs = []
    for model in (config, replace(config, **{setting: changed[setting]})):
        network = UNet(model, (32, 32)).eval()
        names = ddim.names(network.state_dict(), model)
        network.load_state_dict(
            {ours: torch.cat([state[n] for n in theirs]).reshape(network.state_dict()[ours].shape)
             for ours, theirs in names.items()}
        )  # fmt: skip
        with torch.no_grad():
            outputs.append(network(*inputs((3, 32, 32))))
    torch.testing.assert_close(outputs[0], unet(*inputs((3, 32, 32))).sample.detach(), rtol=0, atol=2e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 2e-4


# --- what does not load


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_denoiser(path, say=None, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Evil:
    """Unpickles by running a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(zipped: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "executed"
    content = golden.filled_state("plain") | {"extra": Evil(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert "other things than tensors" in message and "system" in message
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # so the plant would have worked


def test_damaged_files(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(path)
    path.write_bytes(b"not a checkpoint at all")
    assert "no checkpoint" in refused(path)
    path.write_bytes(b"")
    assert "no checkpoint" in refused(path)
    save_file(golden.filled_state("plain"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "a damaged one" in refused(path)
    assert "no checkpoint" in refused(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("page.safetensors", b"<!doctype html><title>not found</title>", "no checkpoint"),
        ("empty.safetensors", b"", "no checkpoint"),
    ],
)
def test_what_is_no_safetensors_whatever_its_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_named_safetensors_is_told_by_its_content(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save(golden.filled_state("plain"), path, _use_new_zipfile_serialization=zipped)
    loaded = load_denoiser(path, overrides=golden.overrides("plain"), say=None)
    assert torch.equal(loaded.network.norm.weight, golden.filled_state("plain")["out.0.weight"])


def test_a_header_whose_length_reads_like_a_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = golden.filled_state("plain")
    save_file(state, path, {"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    target = 0x4B50 if length < 0x4B50 else 0x14B50  # whose low bytes are "PK"
    save_file(state, path, {"note": "x" * (target - length)})
    start = path.read_bytes()[:2]
    assert start == b"PK"
    assert load_denoiser(path, overrides=golden.overrides("plain"), say=None).image_shape == (3, 32, 32)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """As a run in progress does with last.ckpt: never a mixture of two."""
    path = adm_file(tmp_path, "plain")
    found = identify(path, overrides=golden.overrides("plain"))
    pieces = found.weights.pieces()
    next(pieces)
    torch.save({name: value + 1 for name, value in golden.filled_state("plain").items()}, tmp_path / "new.pt")
    os.replace(tmp_path / "new.pt", path)
    with pytest.raises(UserError, match="was changed while it was read"):
        list(pieces)
    with pytest.raises(UserError, match="was changed while it was read"):
        _ = found.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to_sparse(), "sparse_coo"),
        (lambda v: v.to(torch.int32), "int32"),
        (lambda v: v.to(torch.complex64), "complex64"),
        (lambda v: v.to("meta"), "on no device"),
    ],
)
def test_weights_of_another_kind(change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    state["out.0.weight"] = change(state["out.0.weight"])
    torch.save(state, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("time_embed.0.weight", ()),
        ("time_embed.0.weight", (4,)),
        ("time_embed.0.weight", (4, 0)),
        ("input_blocks.0.0.weight", (3,)),
        ("out.2.weight", ()),
        ("output_blocks.x.0", (1,)),
        ("output_blocks.999999999.0.w", (1,)),
    ],
)
def test_state_dicts_of_impossible_shapes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(golden.filled_state("plain") | {name: torch.zeros(shape)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"model": None}, {"model": {"channels": 64.5}}, {"model": {"channels": 10**9}},
        {"model": {"num_res_blocks": 10**5}}, {"model": {"channel_mult": [1] * 1000}}, {"model": {"unknown": 1}},
        {"diffusion": {"num_timesteps": 10**9}}, {"diffusion": {"prediction": "x"}}, {"diffusion": {"schedule": "x"}},
        {"image_shape": [3, "inf", 1]}, {"image_shape": [3, 10**9, 16]}, {"image_shape": 3}, {"facts": []}, {"clip": 1},
        {"config": "a"}, {"config": {"data": {"path": "${oc.env:HOME}"}}}, {"assumed": None},
    ],
)  # fmt: skip
def test_hostile_descriptions_of_our_own_format(change: dict[str, Any], tmp_path: Path) -> None:
    export(load_denoiser(own_checkpoint(tmp_path), say=None), "safetensors", tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    description = json.loads(recognise_metadata(tmp_path / "a.safetensors"))
    for name, value in change.items():
        merged = description[name] | value if isinstance(value, dict) and name != "config" else value
        description[name] = merged
    save_file(state, tmp_path / "b.safetensors", {"ilvr_lightning": json.dumps(description)})
    assert str(tmp_path / "b.safetensors") in refused(tmp_path / "b.safetensors")


def recognise_metadata(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["ilvr_lightning"])


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": [1, 2, 3]}, {"sample_size": "abc"}, {"in_channels": "z"}, {"in_channels": -1},
        {"block_out_channels": [0, 64]}, {"layers_per_block": 10**24}, {"norm_num_groups": 1.5},
        {"attention_head_dim": -1}, {"attention_head_dim": 10**9}, {"sample_size": 10**9},
    ],
)  # fmt: skip
def test_hostile_configurations_of_diffusers(change: dict[str, Any], tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN))
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "adm", "diffusers"])
def test_an_export_that_fails_leaves_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)

    def fail(state: object, path: Path, *rest: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ilvr_lightning.checkpoints.export.save_file", fail)
    monkeypatch.setattr("ilvr_lightning.checkpoints.export.torch.save", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(loaded, kind, tmp_path / ("out.pt" if kind == "adm" else "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_the_file_does_not_hold(tmp_path: Path) -> None:
    """A kilobyte may claim terabytes: by strides of 0, or by weights that share their numbers."""
    state = {name: value.new_zeros(()).expand(value.shape) for name, value in golden.filled_state("plain").items()}
    torch.save(state, tmp_path / "x.pt")
    assert re.search(r"x\.pt: the weights claim [\d,]+ bytes, and it holds \d+", refused(tmp_path / "x.pt"))
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "there is no checkpoint" in refused(tmp_path / "pipe.ckpt")
    with zipfile.ZipFile(tmp_path / "over.pt", "w") as file:
        file.writestr("a/data.pkl", "x" * 1000)
        file.filelist = file.filelist * 50
    assert "entries lie over one another" in refused(tmp_path / "over.pt")


def test_what_is_found_and_what_loads_is_said(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, tmp_path / "other.pt")
    message = refused(tmp_path / "other.pt")
    assert "2 weights of an unknown network (fc.weight, fc.bias" in message and "what loads is" in message
    torch.save({"lr": 0.1, "epoch": 3}, tmp_path / "none.pt")
    assert "no checkpoint that loads: found the keys lr, epoch" in refused(tmp_path / "none.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "found Tensor" in refused(tmp_path / "tensor.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("x")
    assert "holds a.txt" in refused(tmp_path / "folder")
    save_file(load_file(save_folder(tmp_path / "d", random_unet(PLAIN)) / "unet/diffusion_pytorch_model.safetensors"),
              tmp_path / "alone.safetensors")  # fmt: skip
    assert "without its config.json" in refused(tmp_path / "alone.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_emb.weight": (10, 128)}, "class-conditional"),
        ({"input_blocks.4.1.transformer_blocks.0.x": (1,)}, "text-conditional"),
        ({"out.2.weight": None}, "classifier or encoder"),
        ({"input_blocks.0.0.weight": (32, 6, 3, 3)}, "super-resolution"),
    ],
)
def test_conditional_networks_of_adms_kin(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt")


def test_faults_are_listed(tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    for name in list(state):
        if name.startswith("middle_block.0."):
            del state[name]
    state["extra"] = torch.zeros(1)
    state["out.0.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt", overrides=golden.overrides("plain"))
    assert "(12 faults)" in message
    assert message.count("is missing") == 5 and message.endswith("...")
    state = golden.filled_state("plain") | {"extra": torch.zeros(1), "out.0.weight": torch.zeros(7)}
    torch.save(state, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt", overrides=golden.overrides("plain"))
    assert "extra is unexpected" in message and "out.0.weight is (7,), not (32,)" in message
    state = golden.filled_state("plain")
    state["out.0.weight"][3] = torch.nan
    torch.save(state, tmp_path / "x.pt")
    assert "not finite" in refused(tmp_path / "x.pt", overrides=golden.overrides("plain"))


def test_overrides_are_checked(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    assert "did you mean num_heads?" in refused(path, overrides={"num_head": 2})
    assert "must be of type int: got '4'" in refused(path, overrides={"num_heads": "4"})
    assert "must be of type int: got True" in refused(path, overrides={"num_heads": True})
    assert "noise_schedule" in refused(path, overrides={"noise_schedule": "sqrt"})
    assert "num_heads" in refused(path, overrides={"num_heads": 5})
    folder = save_folder(tmp_path / "d", random_unet(PLAIN))
    assert "in the folder's scheduler" in refused(folder, overrides={"diffusion_steps": 100})


# --- and out again


SMALL = UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=32, attention_resolutions=(8,))


def own_checkpoint(folder: Path, **model: Any) -> Path:
    """As train.py writes it, without training."""
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(path="data/toon", image_size=16),
        model=replace(SMALL, **model),
        grid=GridConfig(factors=(4,)),
    )
    module = DDPM(config)
    with torch.no_grad():
        for p in module.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ema = module.state_dict()
    raw = {name: value + 1 for name, value in ema.items()}
    path = folder / "last.ckpt"
    torch.save(
        {"state_dict": ema, "current_model_state": raw, "hyper_parameters": {"config": config.plain()},
         "global_step": 1234, "epoch": 5, "callbacks": {"SaveCheckpoints": {"best": 0.125}}},
        path,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["safetensors", "adm", "diffusers"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_own_checkpoint_out_and_in_again(kind: str, learn_sigma: bool, tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, learn_sigma=learn_sigma, num_heads=2, num_head_channels=-1)
    if kind == "diffusers":  # which has one width of heads
        path = own_checkpoint(tmp_path, learn_sigma=learn_sigma)
    loaded = load_denoiser(path, say=None)
    out = tmp_path / ("out.pt" if kind == "adm" else "out")
    export(loaded, kind, out)
    overrides = {"num_heads": 2, "image_size": 16} if kind == "adm" else None
    again = load_denoiser(out, overrides=overrides, say=None)
    assert again.image_shape == loaded.image_shape
    x, t = inputs(loaded.image_shape)
    with torch.no_grad():
        expected, got = loaded.network(x, t), again.network(x, t)
    if kind == "diffusers":  # queries, keys and values change places, and so the sums' order
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        once_more = tmp_path / "once_more"
        export(again, kind, once_more)
        assert_same_weights(again, load_denoiser(once_more, say=None))
    else:
        assert_same_weights(loaded, again)
        assert torch.equal(expected, got)
    if kind == "safetensors":
        for name in ("kind", "model", "diffusion", "image_shape", "facts"):
            assert getattr(again.description, name) == getattr(loaded.description, name)
        card = (out / "README.md").read_text()
        for fact in (
            "data/toon",
            "1234",
            "images seen",
            "0.125",
            "sample.py --ckpt model.safetensors",
            "channel_mult=1,2",
        ):
            assert fact in card


@pytest.mark.parametrize("kind", ["safetensors", "adm", "diffusers"])
def test_export_in_half(kind: str, tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path), say=None)
    sizes = {}
    for half in (False, True):
        out = tmp_path / f"{half}{'.pt' if kind == 'adm' else ''}"
        files = export(loaded, kind, out, Options(half=half))
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
    with pytest.raises(UserError, match="beyond what float16 holds"):
        export(loaded, "safetensors", tmp_path / "out", Options(half=True))
    assert not (tmp_path / "out").exists()


def test_card_with_notes_and_pictures(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    (tmp_path / "notes.md").write_text("Of toons, under CC BY 4.0.\n")
    (tmp_path / "grid.png").write_bytes(b"a picture")
    command = ["export", path, "--to", "safetensors", tmp_path / "out", "--notes", tmp_path / "notes.md",
               "--picture", tmp_path / "grid.png"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![grid](grid.png)" in card
    assert card.endswith("Of toons, under CC BY 4.0.\n")
    assert (tmp_path / "out" / "grid.png").read_bytes() == b"a picture"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--to", "adm", "out.pt", "--notes", "notes.md"], "go into a model card: give --to safetensors and a folder"),
        (["--to", "safetensors", "out.safetensors", "--picture", "a.png"], "go into a model card"),
        (["--to", "safetensors", "out", "--picture", "b.png"], "--picture: there is no file b.png"),
        (["--to", "safetensors", "out", "--notes", "b.md"], "--notes: b.md cannot be read as text"),
        (["--to", "safetensors", "out", "--picture", "a.png", "x/a.png"], "a.png, a.png would overwrite one another"),
    ],
)
def test_card_that_cannot_be_made(
    asked: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("notes.md", "a.png", "x/a.png"):
        (tmp_path / name).write_text("there")
    path = own_checkpoint(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(path), *asked]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


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
    card = (tmp_path / "out" / "README.md").read_text()
    assert "someone" not in card and "| data set | pictures |" in card


def test_raw_weights_are_exported_on_request(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    ema, raw = load_denoiser(path, say=None), load_denoiser(path, "raw", say=None)
    assert torch.equal(raw.network.norm.weight, ema.network.norm.weight + 1)
    assert (
        main(["export", str(path), "--to", "safetensors", str(tmp_path / "raw.safetensors"), "--weights", "raw"]) == 0
    )
    assert_same_weights(raw, load_denoiser(tmp_path / "raw.safetensors", say=None))


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


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("adm", {"patch_size": 2, "attention_resolutions": ()}, "model.patch_size=2"),
        ("adm", {"norm_eps": 1e-6}, "model.norm_eps=1e-06"),
        ("diffusers", {"patch_size": 2, "attention_resolutions": ()}, "model.patch_size=2"),
        ("diffusers", {"attention_resolutions": (16, 8), "num_head_channels": -1, "num_heads": 4}, "attention heads"),
    ],
)
def test_what_a_format_cannot_hold_is_said(kind: str, model: dict[str, Any], message: str, tmp_path: Path) -> None:
    loaded = load_denoiser(own_checkpoint(tmp_path, **model), say=None)
    with pytest.raises(UserError, match=message):
        export(loaded, kind, tmp_path / "out.pt" if kind == "adm" else tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is there already"):
        export(load_denoiser(path, say=None), "adm", path)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own_checkpoint(tmp_path))]) == 0
    said = capsys.readouterr().out
    for fact in ("ilvr_lightning checkpoint, 3x16x16", "channel_mult=1,2", "linear, T=1000, predicts eps",
                 "EMA          yes", "step         1234", "best val/loss 0.125"):  # fmt: skip
        assert fact in said
    assert main(["inspect", str(adm_file(tmp_path)), "--override", "num_heads=2"]) == 0
    said = capsys.readouterr().out
    state = golden.filled_state("ilvr")
    assert f"parameters   {sum(v.numel() for v in state.values()):,}" in said
    assert "EMA          the file does not tell" in said and "num_head_channels=-1 num_heads=2" in said
    assert main(["inspect", str(tmp_path / "missing")]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


# --- fine-tuning


def unet_of(config: UNetConfig, size: int = 32) -> UNet:
    return UNet(config, (size, size))


def test_fine_tuning_takes_an_adm_files_weights(tmp_path: Path) -> None:
    said: list[str] = []
    config = replace(golden.network("ilvr").config, attention_resolutions=(32,))
    network = unet_of(config, 64)  # at another size
    load_weights_into(network, adm_file(tmp_path), Config().diffusion, say=said.append)
    expected = golden.network("ilvr").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    assert "ADM state dict" in said[0] and "weights taken over" in said[0]
    assert "num_head_channels" in said[1]
    assert "published default is model.num_head_channels=64" in said[-1] and "other heads" in said[-1]


def test_fine_tuning_names_the_settings_that_differ(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, random_unet(GOOGLE))
    ours = UNetConfig(channels=32, channel_mult=(1, 2, 2), attention_resolutions=(16,), use_scale_shift_norm=False)
    with pytest.raises(UserError) as caught:
        load_weights_into(unet_of(ours), folder)
    for setting in ("model.downsample_padding=0", "model.flip_sin_to_cos=false", "model.freq_shift=1",
                    "model.norm_eps=1e-06", "model.use_new_attention_order=true"):  # fmt: skip
        assert setting in str(caught.value)
    with pytest.raises(UserError, match=r"model\.channel_mult=\[1,2\]"):
        load_weights_into(unet_of(ours), own_checkpoint(tmp_path))


@pytest.mark.parametrize("patches", [{}, {"patch_size": 2, "pixel_channels": 4}])
@pytest.mark.parametrize("ours_learned", [False, True])
def test_the_head_is_re_made_only_when_asked(ours_learned: bool, patches: dict[str, int], tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, learn_sigma=not ours_learned, **patches)
    theirs = load_denoiser(path, say=None).network
    network = UNet(replace(theirs.config, learn_sigma=ours_learned), (16, 16))
    with pytest.raises(UserError, match="init_remake_head=true"):
        load_weights_into(network, path)
    said: list[str] = []
    load_weights_into(network, path, remake_head=True, say=said.append)
    assert "output layer re-made" in said[0]
    x, t = inputs((3, 16, 16))
    with torch.no_grad():
        mean, expected = network(x, t), theirs(x, t)
    torch.testing.assert_close(mean[:, :3], expected[:, :3], rtol=0, atol=1e-6)
    if ours_learned:
        assert mean[:, 3:].abs().max() == 0


def test_fine_tuning_notes_another_schedule(tmp_path: Path) -> None:
    said: list[str] = []
    path = own_checkpoint(tmp_path)
    network = UNet(load_denoiser(path, say=None).network.config, (16, 16))
    load_weights_into(network, path, Config().diffusion, say=said.append)
    assert len(said) == 1
    folder = save_folder(tmp_path / "d", random_unet(PLAIN), beta_schedule="squaredcos_cap_v2")
    network = UNet(load_denoiser(folder, say=None).network.config, (16, 16))
    load_weights_into(network, folder, Config().diffusion, say=said.append)
    assert "diffusion.schedule=cosine, this run has linear" in said[-1]


def test_fine_tuning_from_improved_diffusions_long_schedules(tmp_path: Path) -> None:
    path = adm_file(tmp_path, "improved")
    ours = replace(golden.network("improved").config, timestep_scale=0.25)
    diffusion = DiffusionConfig(schedule="cosine", num_timesteps=4000)
    said: list[str] = []
    load_weights_into(unet_of(ours), path, diffusion, say=said.append)
    assert not any("note" in line for line in said)
    load_weights_into(unet_of(replace(ours, timestep_scale=1.0)), path, diffusion, say=said.append)
    assert "published default is model.timestep_scale=0.25, this run has 1.0" in said[-1]
    load_weights_into(unet_of(replace(ours, num_head_channels=64)), path, diffusion, say=said.append)
    assert "published default is model.num_head_channels=-1 model.num_heads=4" in said[-1]


def test_an_adm_file_says_what_it_must_be_read_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_checkpoint(tmp_path)
    assert main(["export", str(path), "--to", "adm", str(tmp_path / "a.pt")]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note == "note         read it with --override image_size=16 --override num_head_channels=32"
    words = note.split("read it with ")[1].replace("--override ", "").split()
    overrides = {name: int(value) for name, _, value in (word.partition("=") for word in words)}
    again, loaded = load_denoiser(tmp_path / "a.pt", overrides=overrides, say=None), load_denoiser(path, say=None)
    assert again.image_shape == loaded.image_shape
    x, t = inputs((3, 16, 16))
    with torch.no_grad():
        assert torch.equal(again.network(x, t), loaded.network(x, t))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "is for a EDMEulerScheduler"),
        ({"num_train_timesteps": 10**12}, "up to 100,000"),
        ({"num_train_timesteps": "x"}, "up to 100,000"),
        ({"beta_start": None}, "makes no schedule"),
        ({"beta_schedule": "laplace"}, "beta_schedule=laplace"),
        ({"prediction_type": ["a"]}, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, "zero SNR"),
    ],
)
def test_schedulers_that_do_not_fit(scheduler: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_folder(tmp_path, random_unet(PLAIN))
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    assert message in refused(tmp_path)


def test_half_precision_variant_of_a_folder(tmp_path: Path) -> None:
    unet = random_unet(PLAIN)
    DDPMPipeline(unet.half(), DDPMScheduler()).save_pretrained(tmp_path, variant="fp16")
    loaded = load_denoiser(tmp_path, say=None)
    assert torch.equal(loaded.network.norm.weight, unet.conv_norm_out.weight.float())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert "split into several files" in refused(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "checksum is wrong" in refused(path)


def test_schedule_of_a_loaded_denoiser(tmp_path: Path) -> None:
    loaded = load_denoiser(adm_file(tmp_path), overrides={"noise_schedule": "cosine", "diffusion_steps": 400}, say=None)
    assert torch.equal(loaded.schedule.alphas_cumprod, NoiseSchedule.cosine(400).alphas_cumprod)
