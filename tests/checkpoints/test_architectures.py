"""Exports of every architecture: other code runs what is written, or the export is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDPMPipeline
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig
from tests.support.checkpoints import assert_equal_up_to_rounding, export_target, overrides_for, random_network


@st.composite
def descriptions(draw: Callable[..., Any]) -> ModelDescription:
    """Small networks of every architecture, with every kind of diffusion; some that no other code can run."""

    def rarely(value: Any, usual: Any) -> Any:
        return draw(st.sampled_from([*[usual] * 19, value]))

    channels = rarely(draw(st.sampled_from([8, 16])), draw(st.sampled_from([32, 64])))
    mult = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    mult = rarely(mult, (1, *mult[1:]))
    height = 2 ** (len(mult) - 1) * draw(st.integers(2, 4))
    heights = [height // 2**level for level in range(len(mult))]
    by_channels = draw(st.booleans())
    T = draw(st.sampled_from([1000, 400, 50]))
    config = UNetConfig(
        channels=channels,
        channel_mult=mult,
        num_res_blocks=draw(st.integers(1, 2)),
        attention_resolutions=tuple(draw(st.lists(st.sampled_from(heights), unique=True))),
        num_head_channels=draw(st.sampled_from([8, 16, 64])) if by_channels else -1,
        num_heads=draw(st.sampled_from([1, 2, 4])),
        resblock_updown=draw(st.booleans()),
        use_scale_shift_norm=draw(st.booleans()),
        use_new_attention_order=draw(st.booleans()),
        learn_sigma=draw(st.booleans()),
        downsample_padding=rarely(0, 1),
        flip_sin_to_cos=rarely(False, True),
        freq_shift=rarely(1, 0),
        timestep_scale=rarely(1000 / T, 1.0),
        norm_num_groups=rarely(8, 32) if channels >= 32 else 8,
        norm_eps=rarely(1e-6, 1e-5),
    )
    betas = rarely((0.01, 0.02, 0.3), None)
    return ModelDescription(
        kind="a network",
        model=config,
        image_shape=(draw(st.sampled_from([3, 1])), height, rarely(2 * height, height)),
        diffusion=DiffusionConfig(
            schedule=draw(st.sampled_from(["linear", "cosine"])), num_timesteps=T, betas=betas,
            prediction=rarely("v", draw(st.sampled_from(["eps", "x0"]))),
        ),
        clip=draw(st.booleans()),
    )  # fmt: skip


def denoiser_of(description: ModelDescription) -> LoadedDenoiser | None:
    """A denoiser with random weights; None where the heads do not divide the channels."""
    channels, *size = description.image_shape
    diffusion = description.diffusion
    try:
        network = random_network(description.model, (size[0], size[1]), channels)
    except ValueError:
        return None
    schedule = make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas)
    denoiser = LoadedDenoiser(network, schedule, diffusion.prediction)
    denoiser.description, denoiser.image_shape, denoiser.clip = description, description.image_shape, description.clip
    return denoiser


def exported(denoiser: LoadedDenoiser, kind: str, folder: Path) -> bool:
    """Whether a format can express a network; if not, the refusal is one line that names the format."""
    refusal = ""
    try:
        export(denoiser, kind, export_target(kind, folder))
    except UserError as error:
        refusal = str(error)
    event(f"refused: {refusal[:60]}" if refusal else "expressed")
    if refusal:
        assert refusal.startswith(f"--to {kind}: ") and "\n" not in refusal
        assert list(folder.iterdir()) == []
    return not refusal


WIDE = ModelDescription(
    kind="32 channels x 2,3,4",
    model=UNetConfig(
        channels=32, channel_mult=(2, 3, 4), num_res_blocks=1, attention_resolutions=(), num_head_channels=32,
        num_heads=4,
    ),
    image_shape=(3, 8, 8),
    diffusion=DiffusionConfig(schedule="linear", num_timesteps=1000, prediction="eps"),
)  # fmt: skip
"""ADM embeds its timestep in 32 channels, diffusers in the 64 of its first level."""


@settings(max_examples=25, deadline=None)
@example(WIDE)
@given(descriptions())
def test_diffusers_runs_every_network_that_is_exported(description: ModelDescription) -> None:
    denoiser = denoiser_of(description)
    if denoiser is None:
        return
    with TemporaryDirectory() as folder:
        if not exported(denoiser, "diffusers", Path(folder)):
            return
        pipeline = DDPMPipeline.from_pretrained(Path(folder) / "out", low_cpu_mem_usage=False)
        assert_equal_up_to_rounding(denoiser, lambda x, t: pipeline.unet(x, t).sample)
        scheduler, diffusion = pipeline.scheduler, description.diffusion
        alphas = denoiser.schedule.alphas_cumprod[1:]
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), alphas, rtol=2e-4, atol=1e-8)
        assert len(scheduler) == diffusion.T and scheduler.config.clip_sample == description.clip
        again = load_denoiser(Path(folder) / "out", say=None)
        assert_equal_up_to_rounding(denoiser, again.network)
        assert (again.image_shape, again.clip) == (denoiser.image_shape, denoiser.clip)
        assert again.prediction_type == denoiser.prediction_type
        torch.testing.assert_close(again.schedule.alphas_cumprod[1:], alphas, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@example(WIDE)
@given(descriptions())
def test_an_adm_file_is_read_as_it_was_with_the_printed_overrides(description: ModelDescription) -> None:
    denoiser = denoiser_of(description)
    if denoiser is None:
        return
    with TemporaryDirectory() as folder:
        if not exported(denoiser, "adm", Path(folder)):
            return
        overrides = overrides_for(denoiser, "adm")
        again = load_denoiser(export_target("adm", Path(folder)), overrides=overrides, say=None)
    x, t = torch.randn((2, *denoiser.image_shape)), torch.tensor([1, 40])
    with torch.no_grad():
        assert torch.equal(again.network(x, t), denoiser.network(x, t))
    assert again.image_shape == denoiser.image_shape
    assert again.prediction_type == denoiser.prediction_type
    assert torch.equal(again.schedule.alphas_cumprod, denoiser.schedule.alphas_cumprod)
