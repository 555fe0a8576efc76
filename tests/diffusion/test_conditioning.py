import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilvr_lightning.diffusion.conditioning import ILVR, Unconditional
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate, generate_steps
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.samplers import SAMPLERS
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from tests.support.oracles import GaussianDenoiser, RecordedNoise, make_plan

SCHEDULE = NoiseSchedule.linear()
A = SCHEDULE.alphas_cumprod.tolist()
SHAPE = (3, 16, 32)
DENOISE = GaussianDenoiser(SCHEDULE, 0.1, 0.3)


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand((count, *SHAPE), generator=generator, dtype=torch.float64) - 1


def start(count: int, seed: int = 100) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("noise", ["fresh", "matched", "fixed"])
@pytest.mark.parametrize(
    ("kernel", "orthogonal"), [("cubic", True), ("linear", True), ("lanczos3", True), ("ideal", False)]
)
def test_result_has_the_references_low_band(sampler: str, noise: str, kernel: str, orthogonal: bool) -> None:
    plan = make_plan(
        sampler=sampler,
        num_steps=5,
        factor=4,
        kernel=kernel,
        orthogonal=orthogonal,
        eta=0.5,
        reference_noise=noise,
    )
    reference = images(2)
    low_pass = LowPassFilter((16, 32), 4, kernel, orthogonal)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        x = generate(DENOISE, SCHEDULE, plan, seeds=[0, 1], shape=SHAPE, reference=reference, x_T=start(2).to(dtype))
        assert x.dtype == dtype
        torch.testing.assert_close(low_pass(x.double()), low_pass(reference), rtol=0, atol=tolerance)
        # The high band is the sampler's, and not the reference's.
        assert float((x - reference).std()) > 0.2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_last_step_is_algorithm_1s_line_9(sampler: str) -> None:
    """x_0 = phi(y) + x' - phi(x'), where x' is the prediction, since the last step is noiseless."""
    plan = make_plan(sampler=sampler, num_steps=4, factor=8)
    reference, phi = images(1), LowPassFilter((16, 32), 8)
    *_, last = generate_steps(DENOISE, SCHEDULE, plan, seeds=[7], shape=SHAPE, reference=reference, x_T=start(1))
    assert last.t == 0
    torch.testing.assert_close(last.x, phi(reference) + last.x0 - phi(last.x0), rtol=0, atol=1e-12)


def test_reference_is_noised_at_the_level_that_the_step_goes_to() -> None:
    """With factor 1, phi is the identity and x_s is y_s = sqrt(a_s) y + sqrt(1 - a_s) n itself."""
    reference = images(2)
    noise = [start(2, seed) for seed in range(3)]
    plan = make_plan(timesteps=(1000, 700, 300, 20), factor=1)
    recorded = RecordedNoise({"reference": list(noise)})
    states = list(
        generate_steps(
            DENOISE, SCHEDULE, plan, seeds=[0, 1], shape=SHAPE, reference=reference, x_T=start(2), noise=recorded
        )
    )
    assert [state.t for state in states] == [700, 300, 20, 0]
    for state, n in zip(states[:3], noise, strict=True):
        expected = math.sqrt(A[state.t]) * reference + math.sqrt(1 - A[state.t]) * n
        torch.testing.assert_close(state.x, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(states[3].x, reference, rtol=0, atol=1e-12)


def refined_levels(plan: SamplingPlan) -> list[int]:
    """The levels at which the reference shows: with factor 1 and no noise, x_s is sqrt(a_s) y there."""
    reference = torch.full((1, *SHAPE), 0.77, dtype=torch.float64)
    states = generate_steps(
        DENOISE,
        SCHEDULE,
        plan,
        seeds=[0],
        shape=SHAPE,
        reference=reference,
        x_T=start(1),
        noise=RecordedNoise(),
    )
    return [s.t for s in states if torch.allclose(s.x, math.sqrt(A[s.t]) * reference, rtol=0, atol=1e-12)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        (None, 0, [800, 600, 400, 200, 0]),
        (1000, 0, [800, 600, 400, 200, 0]),
        (600, 200, [600, 400, 200]),
        (599, 201, [400]),
        (800, 800, [800]),
        (1000, 1, [800, 600, 400, 200]),
        (0, 0, [0]),
        # x_T itself is never refined.
        (1000, 801, []),
    ],
)
def test_range_is_in_training_timesteps_and_holds_both_ends(
    sampler: str, high: int | None, low: int, expected: list[int]
) -> None:
    plan = make_plan(
        sampler=sampler,
        timesteps=(1000, 800, 600, 400, 200),
        factor=1,
        condition_from=high,
        condition_to=low,
    )
    assert refined_levels(plan) == expected


def test_range_defaults_to_all_of_any_schedule() -> None:
    assert make_plan().resolved(4000).condition_from == 4000
    long = NoiseSchedule.cosine(4000)
    run = ILVR(reference=images(1), low_pass=LowPassFilter((16, 32), 1)).start(long, RecordedNoise())
    refined = run.refine_sample(start(1), 4000)
    torch.testing.assert_close(refined, math.sqrt(float(long.alphas_cumprod[4000])) * images(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("noise", ["fresh", "matched", "fixed"])
def test_settings_an_image_equal_single_runs(sampler: str, noise: str) -> None:
    factors, highs, lows, seeds = (1, 4, 8, 4), (1000, 600, 500, 300), (0, 200, 500, 0), (5, 6, 7, 5)
    reference = images(4)
    common = {"sampler": sampler, "timesteps": (1000, 800, 500, 200), "eta": 0.7, "reference_noise": noise}
    together = generate(
        DENOISE,
        SCHEDULE,
        make_plan(**common, factor=factors, condition_from=highs, condition_to=lows),
        seeds=seeds,
        shape=SHAPE,
        reference=reference,
    )
    for i in range(4):
        plan = make_plan(**common, factor=factors[i], condition_from=highs[i], condition_to=lows[i])
        alone = generate(DENOISE, SCHEDULE, plan, seeds=seeds[i : i + 1], shape=SHAPE, reference=reference[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-6)
    # Same seed, other settings: the four are not all alike.
    assert float((together[0] - together[3]).abs().max()) > 0.1


def test_extrapolation_begins_for_each_image_where_its_range_does() -> None:
    y, common = images(2), {"sampler": "dpmpp_2m", "timesteps": (1000, 800, 500, 200, 50), "factor": 4}
    settings = {**common, "reference_noise": "matched", "eps_extrapolation": 0.75}
    together = generate(
        DENOISE, SCHEDULE, make_plan(**settings, condition_from=(1000, 500)), seeds=[1, 2], shape=SHAPE, reference=y
    )
    alone = generate(
        DENOISE, SCHEDULE, make_plan(**settings, condition_from=500), seeds=[2], shape=SHAPE, reference=y[1:]
    )
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("high", "low"), [(1000, (0, 300)), ((700, 200), 0)])
def test_one_end_an_image_goes_with_a_common_other(high: int | tuple[int, ...], low: int | tuple[int, ...]) -> None:
    phi, y, x = LowPassFilter((16, 32), 1), images(2), start(2)
    run = ILVR(reference=y, low_pass=phi, condition_from=high, condition_to=low).start(SCHEDULE, RecordedNoise())
    refined = run.refine_sample(x, 250)
    first = math.sqrt(A[250]) * y[0]
    torch.testing.assert_close(refined[0], first, rtol=0, atol=1e-12)
    assert torch.equal(refined[1], x[1])


def test_one_reference_serves_the_batch() -> None:
    plan, y = make_plan(num_steps=4, factor=4, orthogonal=True), images(1)
    one = generate(DENOISE, SCHEDULE, plan, seeds=[1, 2], shape=SHAPE, reference=y)
    two = generate(DENOISE, SCHEDULE, plan, seeds=[1, 2], shape=SHAPE, reference=y.repeat(2, 1, 1, 1))
    assert torch.equal(one, two)
    assert float((one[0] - one[1]).abs().max()) > 0.1


def test_unconditional_leaves_all_alone() -> None:
    x, prediction = start(1), Prediction(x0=images(1), eps=start(1))
    assert Unconditional().refine_sample(x, 3) is x
    assert Unconditional().refine_prediction(prediction, 3) is prediction
    # A range that no step meets leaves the samples of the same seed as they are without a reference.
    outside = make_plan(num_steps=4, condition_from=1000, condition_to=1000)
    steered = generate(DENOISE, SCHEDULE, outside, seeds=[3], shape=SHAPE, reference=images(1))
    assert torch.equal(steered, generate(DENOISE, SCHEDULE, make_plan(num_steps=4), seeds=[3], shape=SHAPE))


@pytest.mark.parametrize("shape", [(3, *SHAPE), (2, 1, 16, 32), (2, 3, 32, 16), SHAPE])
def test_reference_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"reference must have the shape \(2, 3, 16, 32\), or 1 in place of 2: got"):
        generate(DENOISE, SCHEDULE, make_plan(), seeds=[0, 1], shape=SHAPE, reference=torch.zeros(shape))


@pytest.mark.parametrize(
    "changes", [{"factor": (4, 8, 4)}, {"condition_from": (900, 800, 700)}, {"condition_to": (0, 1, 2)}]
)
def test_settings_for_another_number_of_images(changes: dict[str, tuple[int, ...]]) -> None:
    (name,) = changes
    plan = make_plan(**changes)
    with pytest.raises(ValueError, match=f"sampling.{name} must be one, or one per image: got 3 for 2 images"):
        generate(DENOISE, SCHEDULE, plan, seeds=[0, 1], shape=SHAPE, reference=images(2))


def test_factor_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"sampling\.factor must divide the image size: got factor=5 for 16x32 px"):
        generate(DENOISE, SCHEDULE, make_plan(factor=5), seeds=[0], shape=SHAPE, reference=images(1))


def test_x_T_of_another_shape() -> None:  # noqa: N802
    with pytest.raises(ValueError, match=r"x_T must have the shape \(2, 3, 16, 32\): got \(1, 3, 16, 32\)"):
        generate(DENOISE, SCHEDULE, make_plan(), seeds=[0, 1], shape=SHAPE, x_T=start(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition_from": 1001}, r"sampling.condition_from must be in \[0, 1000\]: got 1001"),
        ({"condition_to": 1001}, r"sampling.condition_to must be in \[0, 1000\]: got 1001"),
        ({"num_steps": 1001}, "sampling.num_steps must be at most T=1000: got 1001"),
        ({"timesteps": (1001, 4)}, "sampling.timesteps must start at T=1000 or below: got 1001"),
        ({"start_from": 0}, r"sampling.start_from must be in \[1, 1000\]: got 0"),
        ({"start_from": 20}, "sampling.num_steps must be at most sampling.start_from=20: got 50"),
        ({"start_from": 20, "timesteps": (30, 2)}, "sampling.timesteps must begin with sampling.start_from=20: got 30"),
        ({"start_from": 700}, "sampling.start_from needs a reference to begin from"),
    ],
)
def test_plan_that_does_not_fit_the_schedule(changes: dict[str, object], message: str) -> None:
    plan = make_plan(**changes)
    with pytest.raises(ValueError, match=message):
        generate(DENOISE, SCHEDULE, plan, seeds=[0], shape=SHAPE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "sampling.num_steps must be at least 1: got 0"),
        ({"eta": 1.5}, "sampling.eta must be between 0 and 1: got 1.5"),
        ({"eta": math.nan}, "sampling.eta must be between 0 and 1: got nan"),
        ({"factor": (4, 0)}, "sampling.factor must be at least 1: got 0"),
        ({"condition_to": 0.3}, "sampling.condition_to must be an integer, or one per image: got 0.3"),
        ({"timesteps": ()}, r"sampling.timesteps must descend and end at 1 or above: got \[\]"),
        ({"timesteps": (5, 5)}, r"sampling.timesteps must descend and end at 1 or above: got \[5, 5\]"),
        ({"timesteps": (5, 0)}, r"sampling.timesteps must descend and end at 1 or above: got \[5, 0\]"),
        ({"condition_to": -1}, "sampling.condition_to must be at least 0: got -1"),
        ({"condition_from": 3, "condition_to": 5}, "sampling.condition_from=3 is below sampling.condition_to=5"),
        ({"condition_from": (9, 3), "condition_to": (2, 5)}, "the range is reversed"),
        ({"condition_from": (9, 8), "condition_to": (1, 2, 3)}, "got 2 and 3 values"),
        (
            {"eps_extrapolation": 1.1, "reference_noise": "matched"},
            "sampling.eps_extrapolation must be between 0 and 1",
        ),
        ({"eps_extrapolation": 0.5}, "sampling.eps_extrapolation needs sampling.reference_noise=matched: got 0.5"),
        ({"respaced_range_t": -1}, "sampling.respaced_range_t must be at least 0: got -1"),
    ],
)
def test_plan_that_makes_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**changes)


def test_respaced_range_must_leave_a_step() -> None:
    plan = make_plan(num_steps=4, respaced_range_t=4)
    with pytest.raises(ValueError, match="respaced_range_t must be below the number of steps, 4: got 4"):
        plan.resolved(1000)


def test_explicit_timesteps_override_the_number_of_steps() -> None:
    short = NoiseSchedule(torch.tensor([0.1, 0.5, 0.9]))
    plan = make_plan(timesteps=(3, 1))
    assert plan.num_steps == 50
    assert plan.resolved(3).num_steps == 2
    states = generate_steps(GaussianDenoiser(short), short, plan, seeds=[0], shape=SHAPE)
    assert [state.t for state in states] == [1, 0]


def matched_run(kappa: float = 0.0, **plan: object) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Samples and eps of each step of a DDIM run with matched noise in factor 1, and the reference."""
    said: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        prediction = DENOISE(x, t)
        said.append(prediction.eps)
        return prediction

    settings = {"sampler": "ddim", "timesteps": (1000, 700, 300, 20), "factor": 1, "clip": False} | plan
    noise = make_plan(reference_noise="matched", eps_extrapolation=kappa, **settings)
    y = images(1)
    states = generate_steps(
        denoise, SCHEDULE, noise, seeds=[0], shape=SHAPE, reference=y, x_T=start(1), noise=RecordedNoise()
    )
    return [state.x for state in states], said, y


def test_matched_noise_is_the_networks_own() -> None:
    """With factor 1 all of x_s is the low band: sqrt(a_s) y + sqrt(1 - a_s) eps, eps of the step that goes there."""
    x, eps, y = matched_run()
    for s, at_s, of_step in zip((700, 300, 20), x, eps, strict=False):
        torch.testing.assert_close(at_s, math.sqrt(A[s]) * y + math.sqrt(1 - A[s]) * of_step, rtol=0, atol=1e-12)
    torch.testing.assert_close(x[-1], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kappa", [0.75, 1.0])
def test_eps_is_extrapolated_in_log_snr(kappa: float) -> None:
    lam = SCHEDULE.log_snr_half.tolist()
    x, eps, y = matched_run(kappa)
    first = math.sqrt(A[700]) * y + math.sqrt(1 - A[700]) * eps[0]
    torch.testing.assert_close(x[0], first, rtol=0, atol=1e-12)  # nothing to extrapolate from yet
    for before, t, s, i in ((1000, 700, 300, 1), (700, 300, 20, 2)):
        k = min(1.0, kappa * (lam[s] - lam[t]) / (lam[t] - lam[before]))
        extrapolated = eps[i] + k * (eps[i] - eps[i - 1])
        expected = math.sqrt(A[s]) * y + math.sqrt(1 - A[s]) * extrapolated
        torch.testing.assert_close(x[i], expected, rtol=0, atol=1e-12)


def test_matched_noise_leaves_what_is_outside_the_range() -> None:
    x, eps, y = matched_run(1.0, condition_from=300, condition_to=300)
    free, _, _ = matched_run(condition_from=0, condition_to=0)
    torch.testing.assert_close(x[0], free[0], rtol=0, atol=0)
    # The first refined step has no refined one before it.
    torch.testing.assert_close(x[1], math.sqrt(A[300]) * y + math.sqrt(1 - A[300]) * eps[1], rtol=0, atol=1e-12)
    assert float((x[2] - math.sqrt(A[20]) * y).abs().max()) > 0.1


def test_fixed_noise_is_the_one_that_makes_x_T_of_the_reference() -> None:  # noqa: N802
    y, x_T = images(1), start(1)
    plan = make_plan(sampler="ddim", timesteps=(900, 500, 100), factor=1, clip=False, reference_noise="fixed")
    n = (x_T - math.sqrt(A[900]) * y) / math.sqrt(1 - A[900])
    for state in generate_steps(DENOISE, SCHEDULE, plan, seeds=[0], shape=SHAPE, reference=y, x_T=x_T):
        expected = math.sqrt(A[state.t]) * y + math.sqrt(1 - A[state.t]) * n
        torch.testing.assert_close(state.x, expected, rtol=0, atol=1e-12)


def test_what_a_run_must_be_told() -> None:
    settings = {"reference": images(1), "low_pass": LowPassFilter((16, 32), 4)}
    with pytest.raises(ValueError, match="need the run's timesteps"):
        ILVR(**settings, reference_noise="matched").start(SCHEDULE, RecordedNoise())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs x_T"):
        ILVR(**settings, reference_noise="fixed").start(SCHEDULE, RecordedNoise(), (9, 3))  # type: ignore[arg-type]


def test_start_from_begins_with_the_noised_reference() -> None:
    y, x_T, seen = images(1), start(1), list[tuple[int, Tensor]]()

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        seen.append((int(t[0]), x.clone()))
        return DENOISE(x, t)

    plan = make_plan(sampler="dpmpp_2m", num_steps=10, spacing="logsnr", start_from=700, factor=4)
    generate(denoise, SCHEDULE, plan, seeds=[0], shape=SHAPE, reference=y, x_T=x_T)
    assert [t for t, _ in seen] == [700, 580, 439, 282, 148, 68, 29, 11, 4, 1]  # known
    expected = math.sqrt(A[700]) * y + math.sqrt(1 - A[700]) * x_T
    torch.testing.assert_close(seen[0][1], expected, rtol=0, atol=1e-12)
    assert SamplingPlan.preset("paper", start_from=30).resolved(1000).num_steps == 30


def test_presets() -> None:
    paper = SamplingPlan.preset("paper").resolved(777)
    assert (paper.sampler, paper.num_steps, paper.factor, paper.reference_noise, paper.orthogonal) == (
        "ddpm",
        777,
        8,
        "fresh",
        False,
    )
    assert (paper.condition_from, paper.condition_to) == (777, 0)
    for name, num_steps in (("fast", 20), ("draft", 10)):
        plan = SamplingPlan.preset(name)
        assert (plan.sampler, plan.num_steps, plan.spacing, plan.reference_noise) == (
            "dpmpp_2m",
            num_steps,
            "logsnr",
            "matched",
        )
        assert (plan.eta, plan.orthogonal, plan.eps_extrapolation) == (1.0, True, 0.0)
    with pytest.raises(ValueError, match="there is no preset 'papr'; the presets are fast, "):
        SamplingPlan.preset("papr")


@settings(max_examples=30, deadline=None)
@given(
    factor=st.sampled_from([1, 2, 4, 8, 16]),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    num_steps=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_low_band_of_a_reference_sampled_before_is_a_fixed_point(
    factor: int, sampler: str, num_steps: int, seed: int
) -> None:
    """A sample that followed y has y's low band, so it steers exactly as y does (orthogonal phi)."""
    plan = make_plan(sampler=sampler, num_steps=num_steps, factor=factor, orthogonal=True)
    first = generate(DENOISE, SCHEDULE, plan, seeds=[seed], shape=SHAPE, reference=images(1, seed), x_T=start(1, seed))
    phi = LowPassFilter((16, 32), factor, orthogonal=True)
    torch.testing.assert_close(phi(first), phi(images(1, seed)), rtol=0, atol=1e-11)
    # Its high band does not reach the result where the noise is the same.
    silent = [
        generate(
            DENOISE,
            SCHEDULE,
            plan,
            seeds=[seed],
            shape=SHAPE,
            reference=reference,
            x_T=start(1, seed),
            noise=RecordedNoise(),
        )
        for reference in (first, images(1, seed))
    ]
    torch.testing.assert_close(silent[0], silent[1], rtol=0, atol=1e-10)
