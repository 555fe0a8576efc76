from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ilvr_lightning.diffusion.denoiser import Denoiser, PredictionType, adjacent_log_variances, clip_prediction
from ilvr_lightning.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
T_BATCH = torch.tensor([1, 400, 1000])
GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn((2, 3, 3, 4, 4), generator=GENERATOR, dtype=torch.float64)
X_T = SCHEDULE.q_sample(X0, T_BATCH, EPS)


class Constant(nn.Module):
    """Answers with what it was given, and remembers the index it was asked with."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.index = torch.empty(0)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        self.index = index
        return self.output


class Wrapped(nn.Module):
    """A network that does not look at the timestep."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        output: Tensor = self.network(x)
        return output


def truth(prediction_type: PredictionType) -> Tensor:
    """What a perfect network would say (v: Salimans and Ho 2022, appendix D)."""
    a = SCHEDULE.alphas_cumprod[T_BATCH].reshape(-1, 1, 1, 1)
    v: Tensor = a.sqrt() * EPS - (1 - a).sqrt() * X0
    truths: dict[PredictionType, Tensor] = {"eps": EPS, "x0": X0, "v": v}
    return truths[prediction_type]


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
def test_parametrisations_agree(prediction_type: PredictionType) -> None:
    prediction = Denoiser(Constant(truth(prediction_type)), SCHEDULE, prediction_type)(X_T, T_BATCH)
    torch.testing.assert_close(prediction.x0, X0, rtol=0, atol=1e-10)
    torch.testing.assert_close(prediction.eps, EPS, rtol=0, atol=1e-10)
    assert prediction.log_variance is None
    assert prediction.variance_fraction is None


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
def test_pair_is_consistent_whatever_the_network_says(prediction_type: PredictionType) -> None:
    output = torch.randn(X_T.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prediction = Denoiser(Constant(output), SCHEDULE, prediction_type)(X_T, T_BATCH)
    torch.testing.assert_close(SCHEDULE.q_sample(prediction.x0, T_BATCH, prediction.eps), X_T, rtol=0, atol=1e-10)


def test_network_is_asked_with_a_zero_based_index() -> None:
    network = Constant(X_T)
    Denoiser(network, SCHEDULE)(X_T, T_BATCH)
    assert network.index.tolist() == [0, 399, 999]
    assert network.index.dtype == torch.int64


def test_prediction_has_the_dtype_of_x() -> None:
    prediction = Denoiser(Constant(EPS.to(torch.bfloat16)), SCHEDULE)(X_T, T_BATCH)
    assert (prediction.x0.dtype, prediction.eps.dtype) == (torch.float64, torch.float64)


def test_clipping_computes_eps_again() -> None:
    prediction = Denoiser(Constant(torch.cat([EPS, EPS], 1)), SCHEDULE)(X_T, T_BATCH)
    for i, t in enumerate(T_BATCH.tolist()):
        clipped = clip_prediction(prediction, X_T, t, SCHEDULE)
        inside = X0[i].abs() <= 1
        assert bool(inside.any())
        assert not bool(inside.all())
        torch.testing.assert_close(clipped.x0[i], X0[i].clamp(-1, 1), rtol=0, atol=1e-10)
        # At t=1 the division by a small sigma amplifies rounding.
        torch.testing.assert_close(clipped.eps[i][inside], EPS[i][inside], rtol=0, atol=1e-8)
        torch.testing.assert_close(SCHEDULE.q_sample(clipped.x0, t, clipped.eps)[i], X_T[i], rtol=0, atol=1e-10)
        assert clipped.log_variance is prediction.log_variance
        assert clipped.variance_fraction is prediction.variance_fraction


@pytest.mark.parametrize("said", [-1.0, 0.0, 1.0])
def test_learned_variance_lies_between_the_posteriors_and_beta(said: float) -> None:
    """Nichol and Dhariwal 2021, equation 15: -1 is the smallest, 1 the largest, between them geometrically."""
    output = torch.cat([EPS, torch.full_like(EPS, said)], 1)
    prediction = Denoiser(Constant(output), SCHEDULE)(X_T, T_BATCH)
    torch.testing.assert_close(prediction.eps, EPS, rtol=0, atol=0)
    a = SCHEDULE.alphas_cumprod.tolist()
    v = (said + 1) / 2
    for i, t in enumerate(T_BATCH.tolist()):
        beta = 1 - a[t] / a[t - 1]
        u = max(t, 2)  # The posterior's variance at t=1 is 0: that of t=2 stands in.
        posterior = (1 - a[u - 1]) / (1 - a[u]) * (1 - a[u] / a[u - 1])
        variance = cast(Tensor, prediction.log_variance)[i].exp()
        torch.testing.assert_close(
            variance, torch.full_like(variance, beta**v * posterior ** (1 - v)), rtol=1e-9, atol=0
        )
    fraction = cast(Tensor, prediction.variance_fraction)
    assert torch.equal(fraction, torch.full_like(EPS, v))


def test_bounds_of_a_single_timestep_are_finite() -> None:
    low, high = adjacent_log_variances(NoiseSchedule(torch.tensor([0.3])), torch.tensor([1]), X0[:1])
    assert low.exp().item() == pytest.approx(0.3)
    assert high.exp().item() == pytest.approx(0.3)


def test_the_network_gets_its_own_precision_and_the_prediction_has_that_of_x() -> None:
    network = nn.Conv2d(3, 3, 1).double()
    asked: list[torch.dtype] = []
    network.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0].dtype))
    denoise = Denoiser(Wrapped(network), SCHEDULE)
    assert denoise(X_T.float(), T_BATCH).x0.dtype == torch.float32
    assert asked == [torch.float64]
