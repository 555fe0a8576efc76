import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate, generate_steps
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.samplers import SAMPLERS
from ilvr_lightning.diffusion.schedule import NoiseSchedule, spaced_timesteps
from tests.support import golden
from tests.support.oracles import GaussianDenoiser, ProbeNoise, RecordedNoise, make_plan

SCHEDULE = NoiseSchedule.linear()
A = SCHEDULE.alphas_cumprod.tolist()
MEAN = torch.tensor([[[0.3, -0.5], [0.0, 0.9]]], dtype=torch.float64)
VARIANCE = torch.tensor([[[0.25, 1.0], [0.04, 0.5]]], dtype=torch.float64)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, 1, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(denoise: GaussianDenoiser, plan: SamplingPlan) -> tuple[Tensor, Tensor]:
    """Exact mean and variance, a pixel each, of what the plan samples: the sampler is affine in all its noise."""
    count = plan.evaluations + 1
    x_T = torch.zeros((count + 1, 1, 2, 2), dtype=torch.float64)
    x_T[-1] = 1
    x = generate(denoise, SCHEDULE, plan, seeds=range(count + 1), shape=(1, 2, 2), x_T=x_T, noise=ProbeNoise())
    return x[0], (x[1:] - x[0]).square().sum(0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_over_all_timesteps_samples_the_gaussian(variance: str) -> None:
    plan = SamplingPlan.preset("paper", variance=variance, clip=False).resolved(1000)
    mean, sampled = moments(GaussianDenoiser(SCHEDULE, MEAN, VARIANCE), plan)
    # x_T is N(0, 1) and not q(x_T), and a thousand steps are not infinitely many.
    torch.testing.assert_close(mean[0], MEAN[0], rtol=0, atol=6e-3)
    torch.testing.assert_close(sampled[0], VARIANCE[0], rtol=0.04, atol=0)


@pytest.mark.parametrize("num_steps", [1, 5, 100])
def test_ddpm_moments_follow_the_recursion_of_the_posterior(num_steps: int) -> None:
    """Mean and variance pushed through x_s ~ q(x_s | x_t, x_0 = E[x_0 | x_t]), by Bayes' rule for two normals."""
    mu, v = 0.9, 0.5
    steps = [*spaced_timesteps(SCHEDULE, num_steps), 0]
    mean, variance = 0.0, 1.0
    for t, s in pairwise(steps):
        ratio = A[t] / A[s]
        gain = math.sqrt(A[t]) * v / (A[t] * v + 1 - A[t])
        if s:
            # q(x_s | x_0) = N(sqrt(a_s) x_0, 1 - a_s) times q(x_t | x_s) = N(sqrt(ratio) x_s, 1 - ratio).
            precision = 1 / (1 - A[s]) + ratio / (1 - ratio)
            of_x0 = math.sqrt(A[s]) / (1 - A[s]) / precision
            of_xt = math.sqrt(ratio) / (1 - ratio) / precision
            added = 1 / precision
        else:
            of_x0, of_xt, added = 1.0, 0.0, 0.0
        slope = of_x0 * gain + of_xt
        mean = slope * mean + of_x0 * mu * (1 - math.sqrt(A[t]) * gain)
        variance = slope**2 * variance + added
    plan = make_plan(num_steps=num_steps, clip=False)
    got_mean, got_variance = moments(GaussianDenoiser(SCHEDULE, mu, v), plan)
    torch.testing.assert_close(got_mean, torch.full_like(got_mean, mean), rtol=1e-10, atol=0)
    torch.testing.assert_close(got_variance, torch.full_like(got_variance, variance), rtol=1e-10, atol=1e-25)


@pytest.mark.parametrize("num_steps", [3, 20])
def test_small_variance_is_exact_for_a_single_image(num_steps: int) -> None:
    """Data that are one image: p(x_s | x_t) is the posterior itself, so every level has q(x_s | x_0)'s moments."""
    x0, count = 0.4, num_steps + 1
    x_T = torch.full((count, 1, 2, 2), math.sqrt(A[1000]) * x0, dtype=torch.float64)
    x_T[-1] += math.sqrt(1 - A[1000])
    plan = make_plan(num_steps=num_steps, clip=False)
    denoise = GaussianDenoiser(SCHEDULE, x0, 0.0)
    for state in generate_steps(
        denoise, SCHEDULE, plan, seeds=range(count), shape=(1, 2, 2), x_T=x_T, noise=ProbeNoise()
    ):
        mean, variance = state.x[0], (state.x[1:] - state.x[0]).square().sum(0)
        torch.testing.assert_close(mean, torch.full_like(mean, math.sqrt(A[state.t]) * x0), rtol=1e-10, atol=0)
        torch.testing.assert_close(variance, torch.full_like(variance, 1 - A[state.t]), rtol=1e-10, atol=1e-25)


@pytest.mark.parametrize("num_steps", [2, 20])
def test_large_variance_is_exact_for_white_noise(num_steps: int) -> None:
    """Data N(0, 1): with beta for its variance every level keeps variance 1; the last step, noiseless, has a_1's."""
    plan = make_plan(num_steps=num_steps, variance="large", clip=False)
    mean, variance = moments(GaussianDenoiser(SCHEDULE), plan)
    last = A[spaced_timesteps(SCHEDULE, num_steps)[-1]]
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=0)
    torch.testing.assert_close(variance, torch.full_like(variance, last), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_ddim_of_white_noise_is_a_product_of_cosines(num_steps: int) -> None:
    """With cos(angle_t) = sqrt(a_t), E[x_0 | x_t] = cos x and E[eps | x_t] = sin x: a step multiplies by a cosine."""
    x_T = normal(3)
    steps = [*spaced_timesteps(SCHEDULE, num_steps, "quadratic"), 0]
    angles = [math.acos(math.sqrt(A[t])) for t in steps]
    factor = math.prod(math.cos(p - q) for p, q in pairwise(angles))
    plan = make_plan(sampler="ddim", num_steps=num_steps, spacing="quadratic", clip=False)
    x = generate(GaussianDenoiser(SCHEDULE), SCHEDULE, plan, seeds=range(3), shape=(1, 2, 2), x_T=x_T)
    torch.testing.assert_close(x, factor * x_T, rtol=1e-10, atol=0)


def ddim_error(num_steps: int) -> float:
    """Distance of DDIM from the probability flow's map of a Gaussian, which keeps every quantile."""
    fine = NoiseSchedule.cosine(4000)
    start, x_T = 3600, normal(4)
    a = float(fine.alphas_cumprod[start])
    exact = MEAN + (VARIANCE / (a * VARIANCE + 1 - a)).sqrt() * (x_T - math.sqrt(a) * MEAN)
    timesteps = tuple(round(start * (1 - i / num_steps)) for i in range(num_steps))
    plan = make_plan(sampler="ddim", timesteps=timesteps, clip=False)
    x = generate(GaussianDenoiser(fine, MEAN, VARIANCE), fine, plan, seeds=range(4), shape=(1, 2, 2), x_T=x_T)
    return float((x - exact).square().mean().sqrt())


def test_ddim_converges_to_the_probability_flow_at_first_order() -> None:
    errors = [ddim_error(n) for n in (50, 100, 200, 400)]
    assert errors[-1] < 5e-3
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_ddim_is_deterministic() -> None:
    plan = make_plan(sampler="ddim", num_steps=10)
    noise = RecordedNoise()
    generate(GaussianDenoiser(SCHEDULE), SCHEDULE, plan, seeds=[0], shape=(1, 2, 2), x_T=normal(1), noise=noise)
    assert noise.drawn == []


@pytest.mark.parametrize(("spacing", "num_steps"), [("uniform", 1000), ("logsnr", 12)])
def test_ddim_with_eta_one_is_ddpm_with_small_variance(spacing: str, num_steps: int) -> None:
    x_T = normal(2)
    recorded = [normal(2, seed=i + 1) for i in range(num_steps - 1)]
    results = []
    for sampler in ("ddim", "ddpm"):
        plan = make_plan(sampler=sampler, num_steps=num_steps, spacing=spacing, eta=1.0, variance="small")
        noise = RecordedNoise({"sampler": list(recorded)})
        denoise = GaussianDenoiser(SCHEDULE, MEAN, VARIANCE)
        states = generate_steps(denoise, SCHEDULE, plan, seeds=[0, 1], shape=(1, 2, 2), x_T=x_T, noise=noise)
        results.append(torch.stack([state.x for state in states]))
        assert noise.recorded["sampler"] == []
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_eta_scales_the_noise_and_keeps_the_level() -> None:
    """Data that are one image: whatever eta, x_s has q(x_s | x_0)'s variance (Song et al. 2021, lemma 1)."""
    for eta in (0.0, 0.3, 1.0):
        plan = make_plan(sampler="ddim", timesteps=(1000, 600, 300), eta=eta, clip=False)
        states = list(
            generate_steps(
                GaussianDenoiser(SCHEDULE, 0.0, 0.0),
                SCHEDULE,
                plan,
                seeds=range(4),
                shape=(1, 1, 1),
                x_T=torch.tensor([0.0, 0, 0, math.sqrt(1 - A[1000])], dtype=torch.float64).reshape(4, 1, 1, 1),
                noise=ProbeNoise() if eta else RecordedNoise(),
            )
        )
        assert [state.t for state in states] == [600, 300, 0]
        for state in states[:2]:
            assert float(state.x.square().sum()) == pytest.approx(1 - A[state.t], rel=1e-12)
        of_first_noise = float(states[0].x[1])
        sigma = math.sqrt((1 - A[600]) / (1 - A[1000]) * (1 - A[1000] / A[600]))
        assert of_first_noise == pytest.approx(eta * sigma, rel=1e-12)


def one_step_deviation(variance: str, fraction: float | None) -> float:
    """Standard deviation that ddpm adds in the step 800 -> 500."""
    plan = make_plan(timesteps=(800, 500), variance=variance, clip=False)
    noise = RecordedNoise({"sampler": [torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)]})
    denoise = GaussianDenoiser(SCHEDULE, fraction=fraction)
    x_T = torch.zeros((2, 1, 1, 1), dtype=torch.float64)
    state = next(generate_steps(denoise, SCHEDULE, plan, seeds=[0, 1], shape=(1, 1, 1), x_T=x_T, noise=noise))
    return float(state.x[1] - state.x[0])


BETA = 1 - A[800] / A[500]
POSTERIOR = BETA * (1 - A[500]) / (1 - A[800])


@pytest.mark.parametrize(
    ("variance", "fraction", "expected"),
    [
        ("small", None, POSTERIOR),
        ("large", None, BETA),
        ("auto", None, POSTERIOR),
        ("learned", 0.0, POSTERIOR),
        ("learned", 1.0, BETA),
        ("learned", 0.5, math.sqrt(POSTERIOR * BETA)),
        ("auto", 1.0, BETA),
        ("small", 1.0, POSTERIOR),
        ("large", 0.0, BETA),
    ],
)
def test_variance_of_a_step(variance: str, fraction: float | None, expected: float) -> None:
    assert one_step_deviation(variance, fraction) == pytest.approx(math.sqrt(expected), rel=1e-12)


def test_learned_variance_needs_one() -> None:
    with pytest.raises(ValueError, match=r"sampling\.variance=learned needs a network that learned its variance"):
        one_step_deviation("learned", None)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_states_and_early_stop(sampler: str) -> None:
    calls: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        calls.extend(t.tolist())
        return GaussianDenoiser(SCHEDULE, MEAN, VARIANCE)(x, t)

    plan = make_plan(sampler=sampler, num_steps=10, spacing="logsnr", eta=0.5)
    states = list(generate_steps(denoise, SCHEDULE, plan, seeds=[3], shape=(1, 2, 2)))
    assert calls == [1000, 887, 758, 604, 411, 203, 74, 23, 6, 1]
    assert [state.t for state in states] == [887, 758, 604, 411, 203, 74, 23, 6, 1, 0]
    assert torch.equal(states[-1].x, generate(denoise, SCHEDULE, plan, seeds=[3], shape=(1, 2, 2)))
    # The last step returns the (clipped) prediction.
    torch.testing.assert_close(states[-1].x, states[-1].x0, rtol=0, atol=1e-6)

    calls.clear()
    for state in generate_steps(denoise, SCHEDULE, plan, seeds=[3], shape=(1, 2, 2)):
        if state.t == 604:
            assert torch.equal(state.x, states[2].x)
            break
    assert calls == [1000, 887, 758]


def test_x0_is_clipped_on_request() -> None:
    denoise = GaussianDenoiser(SCHEDULE, 3.0, 0.0)
    for clip, expected in ((True, 1.0), (False, 3.0)):
        plan = make_plan(num_steps=4, clip=clip)
        x = generate(denoise, SCHEDULE, plan, seeds=[0], shape=(1, 2, 2))
        torch.testing.assert_close(x, torch.full_like(x, expected), rtol=0, atol=1e-5)


RUNS = [("ilvr/10_N4_range3", 4, 3), ("ilvr/ddim7_N8_range0", 8, 0)]


@dataclass
class Follow:
    """Replays a recorded trajectory: the sampler's every step starts from the reference implementation's own state."""

    states: list[Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        x.copy_(self.states.pop(0))
        return golden.denoiser("ilvr")(x, t)


def released_run(name: str, factor: int, range_t: int, *, follow: bool = False, **changes: object) -> Tensor:
    """The trajectory of preset ilvr_adm, with the recorded noise of a run of the released code."""
    timesteps = tuple(sorted((golden.array(f"{name}/timesteps") + 1).tolist(), reverse=True))
    recorded, noise = list(golden.array(f"{name}/noise")), RecordedNoise({"sampler": [], "reference": []})
    for index in reversed(range(len(timesteps))):
        own = recorded.pop(0)
        if index:  # It draws for the last step too, and multiplies by zero.
            noise.recorded["sampler"].append(own)
        noise.recorded["reference"].append(recorded.pop(0) if index > range_t else torch.zeros_like(own))
    assert recorded == []
    x_T, trajectory = golden.array(f"{name}/x_T"), golden.array(f"{name}/trajectory")
    plan = SamplingPlan.preset("ilvr_adm", timesteps=timesteps, factor=factor, respaced_range_t=range_t)
    states = generate_steps(
        Follow([x_T, *trajectory[:-1]]) if follow else golden.denoiser("ilvr"),
        SCHEDULE,
        replace(plan, **changes),  # type: ignore[arg-type]
        seeds=range(len(x_T)),
        shape=(3, 32, 32),
        reference=golden.array(f"{name}/ref"),
        x_T=x_T.clone(),
        noise=noise,
    )
    return torch.stack([state.x.clone() for state in states])


@pytest.mark.parametrize(("name", "factor", "range_t"), RUNS)
def test_every_step_of_the_released_code(name: str, factor: int, range_t: int) -> None:
    """Ancestral steps with clipping, learned variance and the released conditioning, each from the recorded state."""
    trajectory = released_run(name, factor, range_t, follow=True)
    torch.testing.assert_close(trajectory, golden.array(f"{name}/trajectory"), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "factor", "range_t"), RUNS)
def test_whole_runs_of_the_released_code(name: str, factor: int, range_t: int) -> None:
    """From x_T alone. The network amplifies rounding: x_T moved by 1e-7 ends up to 1.6e-4 away (in float64)."""
    trajectory = released_run(name, factor, range_t)
    torch.testing.assert_close(trajectory, golden.array(f"{name}/trajectory"), rtol=0, atol=5e-4)


@pytest.mark.parametrize(("name", "factor", "range_t"), RUNS)
def test_the_paper_differs_from_the_released_code_in_level_and_last_step(name: str, factor: int, range_t: int) -> None:
    """The same sampler; the reference one level lower from the first step on, and the last step refined."""
    expected, reference = golden.array(f"{name}/trajectory"), golden.array(f"{name}/ref")
    low_pass = LowPassFilter((32, 32), factor)
    paper = released_run(name, factor, range_t, follow=True, reference_noise="fresh", respaced_range_t=None)
    apart = [float((a - b).abs().max()) for a, b in zip(paper, expected, strict=True)]
    assert min(apart) > 1e-3
    # What one step does to the high band is the sampler's alone, and the same.
    for ours, theirs in zip(paper, expected, strict=True):
        difference = ours - theirs
        assert float((difference - low_pass(difference)).abs().mean()) < 0.3 * float(difference.abs().mean())
    gap = float((low_pass(expected[-1]) - low_pass(reference)).square().mean().sqrt())
    assert gap > 1.5 * float((low_pass(paper[-1]) - low_pass(reference)).square().mean().sqrt())


def test_respaced_range_counts_the_steps_that_follow() -> None:
    timesteps, reference = (1000, 700, 400, 100), torch.full((1, 1, 4, 4), 5.0, dtype=torch.float64)
    for range_t, refined in ((0, [True, True, True, False]), (2, [True, False, False, False]), (3, [False] * 4)):
        plan = SamplingPlan.preset("ilvr_adm", timesteps=timesteps, factor=4, respaced_range_t=range_t, clip=False)
        noise = RecordedNoise()
        list(
            generate_steps(
                GaussianDenoiser(SCHEDULE),
                SCHEDULE,
                plan,
                seeds=[0],
                shape=(1, 4, 4),
                reference=reference,
                x_T=torch.zeros((1, 1, 4, 4), dtype=torch.float64),
                noise=noise,
            )
        )
        drawn = ["reference" in noise.drawn[i + 1 : i + 2] for i, s in enumerate(noise.drawn) if s == "sampler"]
        assert drawn == refined[:3]


def test_released_reference_is_noised_at_the_level_it_comes_from() -> None:
    """A reference of one colour, no noise: the low band goes to sqrt(a_t) y, where the paper's goes to sqrt(a_s) y."""
    means = {}
    for kind in ("fresh", "fresh_released"):
        plan = make_plan(timesteps=(800, 500), factor=4, reference_noise=kind, clip=False)
        state = next(
            generate_steps(
                GaussianDenoiser(SCHEDULE),
                SCHEDULE,
                plan,
                seeds=[0],
                shape=(1, 4, 4),
                reference=torch.full((1, 1, 4, 4), 0.7, dtype=torch.float64),
                x_T=torch.zeros((1, 1, 4, 4), dtype=torch.float64),
                noise=RecordedNoise(),
            )
        )
        means[kind] = float(state.x.mean())
    assert means["fresh"] == pytest.approx(0.7 * math.sqrt(A[500]), rel=1e-9)
    assert means["fresh_released"] == pytest.approx(0.7 * math.sqrt(A[800]), rel=1e-9)
