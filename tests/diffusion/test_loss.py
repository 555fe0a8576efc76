import math

import pytest
import torch
from torch import Tensor, nn

from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction, PredictionType, clip_prediction
from ilvr_lightning.diffusion.loss import bound_term, discretized_log_likelihood, normal_kl, training_losses
from ilvr_lightning.diffusion.schedule import NoiseSchedule, spaced_timesteps
from tests.support import golden

SCHEDULE = NoiseSchedule.linear()


class Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.output


class Respaced(nn.Module):
    """A network of a thousand timesteps asked with the index of fewer."""

    def __init__(self, network: nn.Module, timesteps: list[int]) -> None:
        super().__init__()
        self.network = network
        self.timesteps = timesteps

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        output: Tensor = self.network(x, torch.tensor(self.timesteps)[index] - 1)
        return output


def close(actual: Tensor, name: str, atol: float = 0) -> None:
    torch.testing.assert_close(actual, golden.array(name), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("model", ["ilvr", "plain"])
def test_matches_the_reference_implementation(model: golden.ModelName) -> None:
    """The simple loss; with a learned variance the hybrid one, of which the rest is the bound's term."""
    x0, noise, t = (golden.array(f"loss/{model}/{name}") for name in ("x0", "noise", "t"))
    denoiser = golden.denoiser(model)
    with torch.no_grad():
        close(training_losses(denoiser, x0, t + 1, noise), f"loss/{model}/loss")
        x_t = SCHEDULE.q_sample(x0, t + 1, noise)
        prediction = denoiser(x_t, t + 1)
        close((prediction.eps - noise).square().mean((1, 2, 3)), f"loss/{model}/mse")
        if model == "ilvr":
            close(bound_term(SCHEDULE, prediction, x0, x_t, t + 1), f"loss/{model}/vb")


def test_the_golden_times_hold_both_branches_of_the_bound() -> None:
    t = golden.array("loss/ilvr/t")
    assert bool((t == 0).any())
    assert bool((t > 0).any())


def test_variational_bound_of_an_image() -> None:
    """Ten timesteps, clipped: a schedule of its own, made of the thousand's alphas_cumprod."""
    x0, noise = golden.array("bpd/x0"), golden.array("bpd/noise")
    steps = spaced_timesteps(SCHEDULE, 10)[::-1]
    a = SCHEDULE.alphas_cumprod[[0, *steps]]
    schedule = NoiseSchedule(1 - a[1:] / a[:-1])
    denoiser = Denoiser(Respaced(golden.network("ilvr"), steps), schedule)
    terms = []
    for level, n in zip(range(10, 0, -1), noise, strict=True):
        t = torch.tensor([level])
        x_t = schedule.q_sample(x0, t, n)
        with torch.no_grad():
            prediction = clip_prediction(denoiser(x_t, t), x_t, level, schedule)
        terms.append(bound_term(schedule, prediction, x0, x_t, t))
    vb = torch.stack(terms, 1)
    # At high t a term is the square of a small difference of two float32 means; in float64 we are as far from them.
    close(vb, "bpd/vb", atol=5e-8)
    signal, sigma = schedule.signal_and_noise(10, x0)
    zero = torch.zeros_like(x0)
    prior = normal_kl(signal * x0, 2 * sigma.log() + zero, zero, zero).mean((1, 2, 3)) / math.log(2)
    close(prior, "bpd/prior_bpd", atol=1e-8)
    close(vb.sum(1) + prior, "bpd/total_bpd")


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "expected"),
    [
        # SNR = a / (1 - a): with betas 0.1, 0.5, 0.9 it is 9, 0.45/0.55, 0.045/0.955.
        ("simple", "eps", [1, 1, 1]),
        ("simple", "v", [1, 1, 1]),
        ("simple", "x0", [1, 1, 1]),
        ("min_snr", "eps", [5 / 9, 1, 1]),
        ("min_snr", "v", [5 / 10, 0.45, 0.045]),
        ("min_snr", "x0", [5, 0.45 / 0.55, 0.045 / 0.955]),
    ],
)
def test_weights(weighting: str, prediction_type: PredictionType, expected: list[float]) -> None:
    """A network that is off by 2 everywhere has the loss 4 w."""
    schedule, t = NoiseSchedule(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([1, 2, 3])
    x0, noise = torch.randn((2, 3, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = torch.tensor([0.9, 0.45, 0.045], dtype=torch.float64).reshape(3, 1, 1, 1)
    target = {"eps": noise, "x0": x0, "v": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction_type]
    denoiser = Denoiser(Constant(target + 2), schedule, prediction_type)
    assert weighting in ("simple", "min_snr")
    losses = training_losses(denoiser, x0, t, noise, "min_snr" if weighting == "min_snr" else "simple")
    torch.testing.assert_close(losses, 4 * torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_min_snr_weighs_the_error_of_x0_alike_whatever_is_predicted() -> None:
    """The same prediction has the same loss, written as eps, v or x0."""
    t = torch.tensor([1, 120, 500, 990])
    x0, noise, guess = torch.randn((3, 4, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = SCHEDULE.q_sample(x0, t, noise)
    signal, sigma = SCHEDULE.signal_and_noise(t, x0)
    eps = (x_t - signal * guess) / sigma
    outputs: dict[PredictionType, Tensor] = {"x0": guess, "eps": eps, "v": signal * eps - sigma * guess}
    losses = [
        training_losses(Denoiser(Constant(output), SCHEDULE, kind), x0, t, noise, "min_snr")
        for kind, output in outputs.items()
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-8, atol=0)


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
def test_gradient_of_the_bound_reaches_the_variance_alone(prediction_type: PredictionType) -> None:
    t = torch.tensor([1, 400])
    x0, noise, error, variance = torch.randn(
        (4, 2, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    signal, sigma = SCHEDULE.signal_and_noise(t, x0)
    target = {"eps": noise, "x0": x0, "v": signal * noise - sigma * x0}[prediction_type]
    # Not far off, or the likelihood at t=1 would be at its floor, where it has no gradient.
    mean = target + 0.01 * error
    plain, learned = Constant(mean), Constant(torch.cat([mean, variance], 1))
    grads: list[Tensor] = []
    for network in (plain, learned):
        loss = training_losses(Denoiser(network, SCHEDULE, prediction_type), x0, t, noise).sum()
        grads += torch.autograd.grad(loss, network.output)
    torch.testing.assert_close(grads[1][:, :1], grads[0], rtol=0, atol=0)
    assert bool((grads[1][:, 1:] != 0).all())


@pytest.mark.parametrize("T", [21, 4000])
def test_hybrid_is_simple_plus_a_thousandth_of_the_sum_of_terms(T: int) -> None:
    schedule, t = NoiseSchedule.linear(T), torch.tensor([1, 20])
    x0, noise, mean, variance = torch.randn(
        (4, 2, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    denoiser = Denoiser(Constant(torch.cat([mean, variance], 1)), schedule)
    with torch.no_grad():
        simple = training_losses(Denoiser(Constant(mean), schedule), x0, t, noise)
        x_t = schedule.q_sample(x0, t, noise)
        term = bound_term(schedule, denoiser(x_t, t), x0, x_t, t)
        torch.testing.assert_close(
            training_losses(denoiser, x0, t, noise), simple + T * term / 1000, rtol=1e-12, atol=0
        )


def test_term_of_a_perfect_prediction_is_zero() -> None:
    x0, noise = torch.randn((2, 1, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([300])
    x_t = SCHEDULE.q_sample(x0, t, noise)
    # -1 asks for the posterior's own variance.
    denoiser = Denoiser(Constant(torch.cat([noise, -torch.ones_like(noise)], 1)), SCHEDULE)
    with torch.no_grad():
        term = bound_term(SCHEDULE, denoiser(x_t, t), x0, x_t, t)
    assert float(term) == pytest.approx(0, abs=1e-12)


def test_term_needs_a_variance() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="needs a prediction with a log_variance"):
        bound_term(SCHEDULE, Prediction(x0=x, eps=x), x, x, torch.tensor([2]))


def test_normal_kl_is_torchs() -> None:
    mean1, log_variance1, mean2, log_variance2 = torch.randn(
        (4, 50), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    p = torch.distributions.Normal(mean1, (0.5 * log_variance1).exp())
    q = torch.distributions.Normal(mean2, (0.5 * log_variance2).exp())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(normal_kl(mean1, log_variance1, mean2, log_variance2), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 0.0])
def test_probabilities_of_all_256_values_sum_to_one(log_scale: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, scale = torch.full_like(x, 0.3), torch.full_like(x, log_scale)
    log_likelihood = discretized_log_likelihood(x, mean, scale)
    assert float(log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-6)
    # The tanh form differs from the normal's distribution function by less than 2e-4.
    upper, lower = (torch.special.ndtr((x[1:-1] + side - 0.3) / math.exp(log_scale)) for side in (1 / 255, -1 / 255))
    expected = upper - lower
    torch.testing.assert_close(log_likelihood[1:-1].exp(), expected, rtol=0, atol=4e-4)
