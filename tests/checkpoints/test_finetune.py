"""Fine-tuning: whose weights are copied, and what is said of networks that differ."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ilvr_lightning.checkpoints.finetune import load_weights_into
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from tests.support import golden
from tests.support.checkpoints import (
    GOOGLE,
    PLAIN,
    adm_file,
    inputs,
    own_checkpoint,
    random_unet,
    save_folder,
)

LINEAR = DiffusionConfig(schedule="linear", num_timesteps=1000, prediction="eps")


def unet_of(config: UNetConfig, size: int = 32) -> UNet:
    return UNet(config, (size, size))


def test_takes_an_adm_files_weights(tmp_path: Path) -> None:
    said: list[str] = []
    config = replace(golden.network("ilvr").config, attention_resolutions=(32,))
    network = unet_of(config, 64)  # at another size
    load_weights_into(network, adm_file(tmp_path), LINEAR, say=said.append)
    expected = golden.network("ilvr").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    assert "ADM state dict" in said[0] and "weights copied" in said[0]
    assert "num_head_channels" in said[1]
    assert "published default is model.num_head_channels=64, this run has 16" in said[-1]


def test_names_the_settings_that_differ(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, random_unet(GOOGLE))
    config = UNetConfig(
        channels=32, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(16,), use_scale_shift_norm=False
    )
    with pytest.raises(UserError) as caught:
        load_weights_into(unet_of(config), folder)
    for setting in ("model.downsample_padding=0", "model.flip_sin_to_cos=false", "model.freq_shift=1",
                    "model.norm_eps=1e-06", "model.use_new_attention_order=true"):  # fmt: skip
        assert setting in str(caught.value)
    with pytest.raises(UserError, match=r"model\.channel_mult=\[1,2\]"):
        load_weights_into(unet_of(config), own_checkpoint(tmp_path))
    grey = UNet(load_denoiser(own_checkpoint(tmp_path), say=None).network.config, (16, 16), image_channels=1)
    with pytest.raises(UserError, match=r"data\.channels=3"):
        load_weights_into(grey, own_checkpoint(tmp_path))


@pytest.mark.parametrize("run_learns", [False, True])
def test_the_head_is_re_made_only_when_asked(run_learns: bool, tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, learn_sigma=not run_learns)
    trained = load_denoiser(path, say=None).network
    network = UNet(replace(trained.config, learn_sigma=run_learns), (16, 16))
    with pytest.raises(UserError, match="init_remake_head=true"):
        load_weights_into(network, path)
    said: list[str] = []
    load_weights_into(network, path, remake_head=True, say=said.append)
    assert "output layer was re-made" in said[0]
    x, t = inputs((3, 16, 16))
    with torch.no_grad():
        mean, expected = network(x, t), trained(x, t)
    torch.testing.assert_close(mean[:, :3], expected[:, :3], rtol=0, atol=1e-6)
    if run_learns:
        assert mean[:, 3:].abs().max() == 0


def test_notes_another_schedule(tmp_path: Path) -> None:
    said: list[str] = []
    path = own_checkpoint(tmp_path)
    network = UNet(load_denoiser(path, say=None).network.config, (16, 16))
    load_weights_into(network, path, LINEAR, say=said.append)
    assert len(said) == 1
    folder = save_folder(tmp_path / "d", random_unet(PLAIN), beta_schedule="squaredcos_cap_v2")
    network = UNet(load_denoiser(folder, say=None).network.config, (16, 16))
    load_weights_into(network, folder, LINEAR, say=said.append)
    assert "diffusion.schedule=cosine, this run has linear" in said[-1]


def test_improved_diffusions_long_schedules(tmp_path: Path) -> None:
    path = adm_file(tmp_path, "improved")
    config = replace(golden.network("improved").config, timestep_scale=0.25)
    diffusion = DiffusionConfig(schedule="cosine", num_timesteps=4000, prediction="eps")
    said: list[str] = []
    load_weights_into(unet_of(config), path, diffusion, say=said.append)
    assert not any("note" in line for line in said)
    load_weights_into(unet_of(replace(config, timestep_scale=1.0)), path, diffusion, say=said.append)
    assert "published default is model.timestep_scale=0.25, this run has 1.0" in said[-1]
    load_weights_into(unet_of(replace(config, num_head_channels=64)), path, diffusion, say=said.append)
    assert "published default is model.num_head_channels=-1, this run has 64" in said[-1]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    state["out.0.weight"][0] = torch.inf
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not finite"):
        load_weights_into(unet_of(golden.network("plain").config), tmp_path / "x.pt", LINEAR)
