"""ILVR against the true conditional of Gaussian images."""

import pytest
import torch

from ilvr_lightning.diffusion.low_pass import low_pass_matrix
from ilvr_lightning.diffusion.plan import SamplingPlan
from tests.support.gaussian import (
    SCHEDULE,
    TABLE,
    TABLE_2D,
    Gaussian,
    agrees,
    ancestral,
    errors,
    modulated_ar1,
    probe,
    run_map,
    solver,
    spectrum_1d,
    spectrum_2d,
    with_factor,
)

QUICK = [name for name, (plan, _) in TABLE.items() if plan.resolved(1000).evaluations <= 20]


@pytest.mark.parametrize("name", QUICK)
def test_rows_of_the_exact_table(name: str) -> None:
    plan, printed = TABLE[name]
    (w4, f4), (w8, f8) = (errors(spectrum_1d(), with_factor(plan, factor)) for factor in (4, 8))
    for figure, expected in zip((w4, w8, f4, f8), printed, strict=False):
        assert expected is None or agrees(figure, expected), (figure, expected)


@pytest.mark.parametrize("name", ["2M 10 log-SNR"])
def test_a_row_in_two_dimensions(name: str) -> None:
    plan, printed = TABLE_2D[name]
    for factor, expected in zip((4, 8), printed, strict=False):
        assert expected is not None and agrees(errors(spectrum_2d(), with_factor(plan, factor))[0], expected)


@pytest.mark.parametrize(
    ("plan", "bound"),
    [
        (solver(10), 0.0026),
        (solver(20), 0.0015),
        (solver(10, eps_extrapolation=0.75), 0.0013),
        (solver(20, eps_extrapolation=0.75), 0.0004),
        (solver(20, kernel="ideal"), 0.0003),
    ],
)
@pytest.mark.parametrize("factor", [4, 8])
def test_what_must_not_get_worse(plan: SamplingPlan, bound: float, factor: int) -> None:
    assert errors(spectrum_1d(), with_factor(plan, factor))[0] <= bound


def test_matched_noise_goes_to_the_truth_for_a_covariance_that_no_filter_diagonalises() -> None:
    coarse, fine = (errors(modulated_ar1(32), with_factor(solver(n, spacing="quadratic"), 4))[0] for n in (25, 100))
    assert fine < 0.002
    assert fine < coarse / 3


def test_extrapolation_fades_where_steps_are_small() -> None:
    """At 60 log-SNR steps they are below 0.2 but for the last few, whole timesteps; at 20 they are 0.51."""

    def gain(num_steps: int) -> float:
        plain, kappa = (solver(num_steps, eps_extrapolation=k, factor=4) for k in (0.0, 0.75))
        return errors(spectrum_1d(16), kappa)[0] / errors(spectrum_1d(16), plain)[0]

    assert gain(20) < 0.5
    assert gain(60) == pytest.approx(1, rel=1e-3)


def test_true_conditional_by_hand() -> None:
    """Two pixels whose mean is seen: x = m + d and m - d, of which d stays free."""
    data = Gaussian((1, 2), torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    gain, covariance = data.conditional(low_pass_matrix(2, 2, "box"))
    torch.testing.assert_close(gain, torch.full((2, 2), 0.5, dtype=torch.float64))
    expected = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64)  # d has a variance of (2 - 1) / 2
    torch.testing.assert_close(covariance, expected)


def test_denoiser_is_the_posterior_mean() -> None:
    """Against Bayes' rule for precisions."""
    data = spectrum_1d(8)
    x = torch.randn(3, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = float(SCHEDULE.alphas_cumprod[300])
    precision = torch.linalg.inv(data.covariance) + a / (1 - a) * torch.eye(8, dtype=torch.float64)
    expected = (a**0.5 / (1 - a)) * x.flatten(1) @ torch.linalg.inv(precision)
    got = data.denoise(x, torch.full((3,), 300)).x0.flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("preset", ["paper", "ilvr_adm"])
def test_probing_step_by_step_is_probing_the_run(preset: str) -> None:
    data, plan = spectrum_1d(8), with_factor(ancestral(preset, 4), 4)
    stepwise = run_map(data, plan)
    whole = probe(data, plan, 2 * 4)
    torch.testing.assert_close(stepwise.of_x, whole.of_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(stepwise.of_y, whole.of_y, rtol=0, atol=1e-12)
    torch.testing.assert_close(stepwise.covariance, whole.covariance, rtol=0, atol=1e-12)
    assert bool((torch.linalg.eigvalsh(whole.covariance) > -1e-12).all())
