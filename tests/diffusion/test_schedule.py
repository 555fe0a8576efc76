import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_lightning.diffusion.schedule import SPACINGS, NoiseSchedule, respaced_timesteps, spaced_timesteps
from tests.support import golden

LINEAR = NoiseSchedule.linear()


def test_linear_is_that_of_ho_et_al() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(LINEAR.betas.numpy(), betas, rtol=1e-12)
    np.testing.assert_allclose(LINEAR.alphas_cumprod[1:].numpy(), np.cumprod(1 - betas), rtol=1e-12)


def test_linear_keeps_its_end_at_another_length() -> None:
    betas = NoiseSchedule.linear(4000).betas
    assert (float(betas[0]), float(betas[-1])) == pytest.approx((0.25e-4, 0.005), rel=1e-12)
    # The integral of beta is the same, so the noise at T is nearly so.
    assert math.log(float(NoiseSchedule.linear(4000).alphas_cumprod[-1])) == pytest.approx(
        math.log(float(LINEAR.alphas_cumprod[-1])), rel=0.01
    )


def test_cosine_is_that_of_nichol_and_dhariwal() -> None:
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    schedule = NoiseSchedule.cosine()
    # The cap on beta bites at the last step alone.
    np.testing.assert_allclose(schedule.alphas_cumprod[:1000].numpy(), (f / f[0])[:1000], rtol=1e-9)
    assert float(schedule.betas[-1]) == 0.999
    assert float(schedule.alphas_cumprod[1000]) == pytest.approx(f[999] / f[0] * 0.001, rel=1e-9)


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(), NoiseSchedule(torch.tensor([0.1, 0.5]))])
def test_time_zero_is_data(schedule: NoiseSchedule) -> None:
    T = schedule.num_timesteps
    assert schedule.alphas_cumprod.shape == (T + 1,)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert float(schedule.alphas_cumprod[0]) == 1
    assert float(schedule.alphas_cumprod[1]) == pytest.approx(1 - float(schedule.betas[0]), rel=1e-15)
    x0 = torch.rand(2, 3, 4, 4)
    assert torch.equal(schedule.q_sample(x0, 0, torch.randn_like(x0)), x0)


def test_log_snr() -> None:
    a = float(LINEAR.alphas_cumprod[300])
    assert float(LINEAR.log_snr_half[300]) == pytest.approx(math.log(math.sqrt(a) / math.sqrt(1 - a)), rel=1e-12)
    assert float(LINEAR.log_snr_half[0]) == math.inf


def test_q_sample_composes_the_forward_steps() -> None:
    """The closed form has the moments of t single steps x_s = sqrt(1 - beta) x + sqrt(beta) noise, and of its draws."""
    t, x0 = 250, 0.7
    mean, variance = x0, 0.0
    for beta in LINEAR.betas[:t].tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    count = 200_000
    noise = torch.randn((count, 1, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = LINEAR.q_sample(torch.full_like(noise, x0), t, noise)
    standard_error = math.sqrt(variance / count)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * standard_error)
    assert float(drawn.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


def test_q_sample_takes_a_timestep_an_image() -> None:
    x0, noise = torch.ones(3, 1, 2, 2, dtype=torch.float64), torch.full((3, 1, 2, 2), 2.0, dtype=torch.float64)
    drawn = LINEAR.q_sample(x0, torch.tensor([0, 1, 1000]), noise)
    a = LINEAR.alphas_cumprod
    for i, t in enumerate((0, 1, 1000)):
        expected = math.sqrt(float(a[t])) + 2 * math.sqrt(1 - float(a[t]))
        torch.testing.assert_close(drawn[i], torch.full_like(drawn[i], expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_timesteps", [20, 1, 0, -5])
def test_linear_refuses_too_few_timesteps(num_timesteps: int) -> None:
    with pytest.raises(ValueError, match=f"diffusion.num_timesteps above 20: got {num_timesteps}"):
        NoiseSchedule.linear(num_timesteps)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [0.1, math.nan], [[0.1]]])
def test_bad_betas(betas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"diffusion\.betas must be a list of numbers, each above 0 and below 1"):
        NoiseSchedule(torch.tensor(betas))


def test_logsnr_spacing_of_ten() -> None:
    assert spaced_timesteps(LINEAR, 10, "logsnr") == [1000, 887, 758, 604, 411, 203, 74, 23, 6, 1]


def test_logsnr_spacing_of_a_cosine_starts_at_the_cap() -> None:
    schedule = NoiseSchedule.cosine()
    lam = schedule.log_snr_half[1:].numpy()
    expected = [int(np.abs(lam - point).argmin()) + 1 for point in np.linspace(-5.5, lam[0], 10)]
    assert expected[0] < 1000
    assert spaced_timesteps(schedule, 10, "logsnr") == expected


def test_quadratic_spacing_of_fifty() -> None:
    steps = spaced_timesteps(LINEAR, 50, "quadratic")
    assert steps[:3] == [1000, 960, 922]
    assert steps[-4:] == [6, 4, 2, 1]


@pytest.mark.parametrize("num_steps", [2, 7, 10, 50, 333, 1000])
def test_uniform_spacing(num_steps: int) -> None:
    expected = 1 + np.round(np.linspace(0, 999, num_steps))[::-1]
    assert spaced_timesteps(LINEAR, num_steps) == expected.tolist()


def test_uniform_spacing_is_the_reference_implementations() -> None:
    assert (
        spaced_timesteps(LINEAR, 10)
        == (golden.array("ilvr/10_N4_range3/timesteps") + 1).sort(descending=True)[0].tolist()
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_and_all_steps(spacing: str) -> None:
    assert spaced_timesteps(LINEAR, 1, spacing) == [1000]
    assert spaced_timesteps(LINEAR, 1000, spacing) == list(range(1000, 0, -1))


def test_coinciding_times_move_up_from_the_small_end() -> None:
    # round(30 (1 - i/12)^2) ends 5 3 2 1 0, and 0 is raised to 1: the later 1 moves to 2, the 2 to 3, the 3 to 4.
    schedule = NoiseSchedule.linear(30)
    assert spaced_timesteps(schedule, 12, "quadratic") == [30, 25, 21, 17, 13, 10, 8, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(("num_steps", "spacing"), [(0, "uniform"), (-1, "logsnr"), (1001, "quadratic")])
def test_number_of_steps_out_of_range(num_steps: int, spacing: str) -> None:
    with pytest.raises(ValueError, match=rf"sampling.num_steps must be in \[1, 1000\]: got {num_steps}"):
        spaced_timesteps(LINEAR, num_steps, spacing)


def test_unknown_spacing() -> None:
    with pytest.raises(ValueError, match=r"sampling\.spacing must be one of uniform, quadratic, logsnr: got 'karras'"):
        spaced_timesteps(LINEAR, 10, "karras")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), T=st.integers(21, 4000), cosine=st.booleans(), spacing=st.sampled_from(sorted(SPACINGS)))
def test_spacings_are_distinct_and_descend(data: st.DataObject, T: int, cosine: bool, spacing: str) -> None:
    num_steps = data.draw(st.one_of(st.integers(1, 60), st.integers(1, T), st.just(T)).filter(lambda n: n <= T))
    schedule = NoiseSchedule.cosine(T) if cosine else NoiseSchedule.linear(T)
    steps = spaced_timesteps(schedule, num_steps, spacing)
    assert len(steps) == num_steps
    assert all(t > s for t, s in pairwise(steps))
    assert steps[-1] >= 1
    assert steps[0] <= T
    if spacing != "logsnr":
        assert steps[0] == T


@pytest.mark.parametrize(
    ("T", "respacing", "expected"),
    [
        (1000, "10", [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
        (1000, "ddim7", [1, 144, 287, 430, 573, 716, 859]),
        (1000, "1", [1]),
        (10, "2,3", [1, 5, 6, 8, 10]),
        (10, "1,1,2", [1, 5, 8, 10]),
        (4000, "ddim4000", list(range(1, 4001))),
    ],
)
def test_respacing_as_adm_writes_it(T: int, respacing: str, expected: list[int]) -> None:
    assert list(respaced_timesteps(T, respacing)) == expected[::-1]


def test_respacing_of_the_recorded_runs() -> None:
    for name, respacing in (("ilvr/10_N4_range3", "10"), ("ilvr/ddim7_N8_range0", "ddim7")):
        recorded = (golden.array(f"{name}/timesteps") + 1).sort(descending=True)[0].tolist()
        assert list(respaced_timesteps(1000, respacing)) == recorded


@pytest.mark.parametrize("num_steps", [2, 25, 50, 100, 250, 1000])
def test_respacing_by_a_number_is_uniform_spacing(num_steps: int) -> None:
    assert list(respaced_timesteps(1000, str(num_steps))) == spaced_timesteps(NoiseSchedule.linear(), num_steps)


def test_respacing_rounds_sums_of_strides_as_adm_does() -> None:
    """Where a sum of strides should fall on a half, float rounding decides: 20 strides of 49.95, ten of them 499.5."""
    assert 500 in respaced_timesteps(1000, "21") and 501 not in respaced_timesteps(1000, "21")
    cases = {"43": 833, "31": 500}  # 0-based, of ADM's space_timesteps
    for respacing, expected in cases.items():
        assert expected + 1 in respaced_timesteps(1000, respacing)
    differing = sum(
        list(respaced_timesteps(1000, str(n))) != spaced_timesteps(NoiseSchedule.linear(), n) for n in range(2, 1001)
    )
    assert differing > 0


def test_empty_respacing_is_every_timestep() -> None:
    assert list(respaced_timesteps(50, "")) == list(range(50, 0, -1))
    assert list(respaced_timesteps(10, "0,2")) == [10, 6]


@pytest.mark.parametrize("respacing", ["ddim", "ddim501", "1001", "600,1", "0", "-3", "a", "ddim0", "10,,3"])
def test_respacing_that_cannot_be(respacing: str) -> None:
    with pytest.raises(ValueError, match="respacing"):
        respaced_timesteps(1000, respacing)
