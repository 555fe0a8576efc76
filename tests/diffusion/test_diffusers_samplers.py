"""Our samplers against diffusers' schedulers, on one denoiser and the same noise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.generate import generate_steps
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from tests.support.oracles import RecordedNoise, make_plan

SHAPE = (2, 3, 4, 4)
X_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
SCHEDULES = {"linear": NoiseSchedule.linear(1000), "squaredcos_cap_v2": NoiseSchedule.cosine(1000)}


class Network(nn.Module):
    """Smooth, not linear, different at each timestep; 0-based t as diffusers has it."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = (t.reshape(-1, 1, 1, 1) / 1000).to(x)
        eps = 0.6 * x + 0.3 * torch.sin(2 * x + 3 * phase) + 0.1 * x.roll(1, -1)
        return torch.cat([eps, torch.cos(x + phase)], dim=1) if self.learned else eps


def theirs(scheduler: Any, num_steps: int, learned: bool = False, **step: Any) -> tuple[list[int], list[Tensor]]:
    """Timesteps (1-based) and the sample after each step; noise from a seeded generator."""
    network, x, states = Network(learned), X_T, []
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x, generator=generator, **step).prev_sample
        states.append(x)
    return [int(t) + 1 for t in scheduler.timesteps], states


def ours(timesteps: list[int], schedule: str = "linear", learned: bool = False, **plan: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = RecordedNoise({"sampler": [torch.randn(SHAPE, generator=generator) for _ in timesteps]})
    denoise = Denoiser(Network(learned), SCHEDULES[schedule], plan.pop("prediction", "eps"))
    settings = make_plan(timesteps=tuple(timesteps), **plan)
    states = generate_steps(denoise, denoise.schedule, settings, seeds=[0, 1], shape=SHAPE[1:], x_T=X_T, noise=noise)
    return [state.x for state in states]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(torch.stack(a), torch.stack(b).float(), rtol=0, atol=1e-4)


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [10, 50, 1000])
@pytest.mark.parametrize(
    ("variance_type", "variance"), [("fixed_small", "small"), ("fixed_large", "large"), ("learned_range", "learned")]
)
def test_ddpm(schedule: str, num_steps: int, variance_type: Any, variance: Any) -> None:
    learned = variance == "learned"
    scheduler = DDPMScheduler(beta_schedule=schedule, variance_type=variance_type)
    if num_steps == 1000:
        # Its float32 tables lose the small betas in 1 - a_t / a_s: 2.7e-4 after 1000 steps of the cosine schedule.
        scheduler.alphas_cumprod = SCHEDULES[schedule].alphas_cumprod[1:]
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    timesteps, states = theirs(scheduler, num_steps, learned)
    assert_same(states, ours(timesteps, schedule, learned, variance=variance))


@pytest.mark.parametrize(("prediction_type", "prediction"), [("v_prediction", "v"), ("sample", "x0")])
def test_ddpm_of_other_predictions(prediction_type: Any, prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    timesteps, states = theirs(scheduler, 20)
    assert_same(states, ours(timesteps, prediction=prediction, clip=False))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(schedule: str, spacing: Any, eta: float) -> None:
    """With 20 steps, which divide 1000; clipping computes eps from x_0 (use_clipped_model_output)."""
    scheduler = DDIMScheduler(beta_schedule=schedule, timestep_spacing=spacing)
    timesteps, states = theirs(scheduler, 20, eta=eta, use_clipped_model_output=True)
    assert_same(states, ours(timesteps, schedule, sampler="ddim", eta=eta))


def test_diffusers_ddim_keeps_an_eps_that_does_not_belong_to_the_clipped_x0() -> None:
    timesteps, states = theirs(DDIMScheduler(), 20)
    assert worst(states, ours(timesteps, sampler="ddim")) > 1e-2
    timesteps, states = theirs(DDIMScheduler(clip_sample=False), 20)
    assert_same(states, ours(timesteps, sampler="ddim", clip=False))


def test_diffusers_linspace_ddim_steps_to_levels_that_are_not_next() -> None:
    """It goes to t - T // n, whatever the next timestep is: with 3 steps, 1000 -> 667 where 501 comes next."""
    scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
    timesteps, states = theirs(scheduler, 3)
    assert timesteps == [1000, 501, 1]  # what it evaluates
    stepped = [t - 1000 // 3 for t in timesteps]
    assert stepped[:2] == [667, 168]  # where its steps go to
    alphas = SCHEDULES["linear"].alphas_cumprod
    x, wrong = X_T, []
    for t, s in zip(timesteps, stepped, strict=True):
        a_t, a_s = alphas[t], alphas[max(s, 0)]
        eps = Network()(x, torch.tensor([t - 1, t - 1]))
        x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
        x = (a_s.sqrt() * x0 + (1 - a_s).sqrt() * eps).float()
        wrong.append(x)
    assert_same(states, wrong)
    assert worst(states[:1], ours(timesteps, sampler="ddim", clip=False)[:1]) > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_dpm_solver(schedule: str, algorithm: Any, eta: float, num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=schedule,
        algorithm_type=algorithm,
        prediction_type="v_prediction",  # well-conditioned at T, where float32 cannot tell x_0 from eps
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )
    timesteps, states = theirs(scheduler, num_steps)
    plan: dict[str, Any] = {"sampler": "dpmpp_2m", "eta": eta, "clip": False, "prediction": "v"}
    assert_same(states, ours(timesteps, schedule, **plan))


@pytest.mark.parametrize(
    ("schedule", "make"), [("linear", NoiseSchedule.linear), ("squaredcos_cap_v2", NoiseSchedule.cosine)]
)
@pytest.mark.parametrize("T", [1000, 4000])
def test_schedules(schedule: str, make: Callable[[int], NoiseSchedule], T: int) -> None:
    scale = 1000 / T
    scheduler = DDPMScheduler(T, beta_schedule=schedule, beta_start=scale * 1e-4, beta_end=scale * 0.02)
    expected = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
    np.testing.assert_allclose(make(T).alphas_cumprod[1:].numpy(), expected, rtol=1e-3, atol=1e-8)
