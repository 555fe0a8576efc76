"""State dicts of ADM and of the code derived from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.checkpoints.families.adm import FAMILY
from ilvr_lightning.checkpoints.families.family import StateDict
from ilvr_lightning.checkpoints.load import identify, load_denoiser
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from tests.support import golden
from tests.support.checkpoints import adm_file, inputs, refused

SILENT = {"predict_xstart": False}
"""With golden.overrides, all that a state dict does not contain."""


def describe(state: dict[str, Tensor], overrides: dict[str, Any] | None = None) -> ModelDescription:
    given = Overrides(overrides, FAMILY.overridable, "adm")
    return FAMILY.describe(StateDict(path=Path("adm.pt"), tensors=state), given)


def empty_state(config: UNetConfig, size: int) -> dict[str, Tensor]:
    """ADM's names and shapes of a network, without memory."""
    with torch.device("meta"):
        weights = UNet(config, (size, size)).state_dict()
    return FAMILY.state_dict(config, weights)


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


def test_the_published_files_are_recognised_with_no_override() -> None:
    """Names and shapes of the FFHQ, AFHQ-dog, CelebA-HQ, CUB, Flowers and MetFaces files."""
    config = UNetConfig(
        channels=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=1, attention_resolutions=(16,),
        num_head_channels=64, resblock_updown=True, learn_sigma=True,
    )  # fmt: skip
    state = empty_state(config, 256)
    found = describe(state)
    assert sum(value.numel() for value in state.values()) == 93_563_910
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
    found = describe(empty_state(config, size))
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
    config = describe(golden.filled_state(model), overrides).model
    return config.num_head_channels, config.num_heads


def test_num_head_channels_wins_unless_it_is_minus_one() -> None:
    assert heads(None) == (64, 4)
    assert heads({"num_head_channels": 16, "num_heads": 2})[0] == 16
    assert heads({"num_head_channels": -1, "num_heads": 2}) == (-1, 2)
    assert heads({"num_heads": 2}) == (-1, 2)
    assert heads(None, "improved") == (-1, 4)
    assert heads({"num_head_channels": 32}, "improved")[0] == 32


def test_improved_diffusion_rescales_the_timesteps_of_long_schedules() -> None:
    state = golden.filled_state("improved")
    assert describe(state, {"diffusion_steps": 4000}).model.timestep_scale == 0.25
    assert describe(state, {"diffusion_steps": 4000, "rescale_timesteps": False}).model.timestep_scale == 1
    assert describe(state).model.timestep_scale == 1
    assert describe(golden.filled_state("ilvr"), {"diffusion_steps": 4000}).model.timestep_scale == 1


def test_rescaled_timesteps_reach_the_embedding(tmp_path: Path) -> None:
    path = adm_file(tmp_path, "improved")
    plain = load_denoiser(path, overrides=golden.overrides("improved"), say=None)
    long = load_denoiser(path, overrides=golden.overrides("improved") | {"diffusion_steps": 4000}, say=None)
    x, _ = inputs((3, 32, 32))
    with torch.no_grad():
        a = plain.network(x, torch.tensor([0, 10, 999]))
        b = long.network(x, torch.tensor([0, 40, 3996]))
    assert torch.equal(a, b)


def test_schedule_of_a_loaded_denoiser(tmp_path: Path) -> None:
    loaded = load_denoiser(adm_file(tmp_path), overrides={"noise_schedule": "cosine", "diffusion_steps": 400}, say=None)
    assert torch.equal(loaded.schedule.alphas_cumprod, NoiseSchedule.cosine(400).alphas_cumprod)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_emb.weight": (10, 128)}, "class-conditional"),
        ({"input_blocks.4.1.transformer_blocks.0.x": (1,)}, "text-conditional"),
        ({"out.2.weight": None}, "classifier or encoder"),
        ({"input_blocks.0.0.weight": (32, 6, 3, 3)}, "super-resolution"),
    ],
)
def test_conditional_networks_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt")


def test_overrides_are_checked(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    assert "override num_head: a checkpoint of adm has no such override; did you mean num_heads?" in refused(
        path, overrides={"num_head": 2}
    )
    assert "override num_heads: must be of type int: got '4'" in refused(path, overrides={"num_heads": "4"})
    assert "must be of type int: got True" in refused(path, overrides={"num_heads": True})
    assert "noise_schedule: must be linear or cosine" in refused(path, overrides={"noise_schedule": "sqrt"})
    assert "num_heads" in refused(path, overrides={"num_heads": 5})
    assert "diffusion_steps" in refused(path, overrides={"diffusion_steps": 0})
    assert "image_size must be a multiple of" in refused(path, overrides={"image_size": 31})
