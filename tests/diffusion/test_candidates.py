"""Several runs for one reference, one of which is kept by its evidence."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.mixture import Mixture, measure
from ilvr_lightning.diffusion.candidates import choose
from ilvr_lightning.diffusion.evidence import MAX_SNR, step_evidence
from ilvr_lightning.diffusion.generate import generate, generate_steps
from ilvr_lightning.diffusion.low_pass import low_pass_matrix
from ilvr_lightning.diffusion.noise import PerImageNoise, Stream
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from tests.support.oracles import GaussianDenoiser

SCHEDULE = NoiseSchedule.linear()
DENOISE = GaussianDenoiser(SCHEDULE, 0.1, 0.3)
SHAPE = (3, 16, 16)
PLAN = SamplingPlan(num_steps=4, factor=4)
Y = 2 * torch.rand((3, *SHAPE), generator=torch.Generator().manual_seed(0)) - 1


def sample(plan: SamplingPlan, seeds: list[int], **settings: Any) -> Tensor:
    return generate(DENOISE, SCHEDULE, plan, seeds=seeds, shape=SHAPE, reference=Y[: len(seeds)], **settings)


def runs(seeds: list[int], count: int, plan: SamplingPlan = PLAN, mask: Tensor | None = None) -> list[SamplerState]:
    """The ends of so many runs, one after the other, as candidates are made."""
    noise = PerImageNoise(seeds)
    ends = []
    for _ in range(count):
        *_, end = generate_steps(
            DENOISE, SCHEDULE, plan, seeds=seeds, shape=SHAPE, reference=Y[: len(seeds)], noise=noise, mask=mask
        )
        ends.append(end)
    return ends


HALF = torch.cat([torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)], dim=3)


@pytest.mark.parametrize(
    ("changes", "mask"),
    [
        ({}, None), ({}, HALF), ({"factor": (2, 4, 8), "condition_to": (0, 300, 600)}, None),
        ({"reference_sigma": (0.0, 0.1, 0.3)}, None), ({"reference_noise": "fresh"}, None),
    ],
)  # fmt: skip
def test_each_image_is_one_of_the_runs(changes: dict[str, Any], mask: Tensor | None) -> None:
    seeds, plan = [0, 1, 2], replace(PLAN, **changes)
    images, ends = sample(replace(plan, candidates=3), seeds, mask=mask), runs(seeds, 3, plan, mask)
    found = [[int(i) for i in range(3) if torch.equal(image, ends[i].x[k])] for k, image in enumerate(images)]
    assert all(len(which) == 1 for which in found)
    assert len({which[0] for which in found}) > 1  # chosen image by image
    for k, (which,) in enumerate(found):
        evidence = [float(end.evidence[k]) for end in ends if end.evidence is not None]
        assert evidence[which] > max(evidence) - 15  # e^-15


def test_one_candidate_is_a_plain_run() -> None:
    torch.testing.assert_close(sample(replace(PLAN, candidates=1), [5]), runs([5], 1)[0].x, rtol=0, atol=0)


def test_a_picture_depends_on_its_own_seed_alone() -> None:
    plan = replace(PLAN, candidates=3)
    torch.testing.assert_close(sample(plan, [4, 7])[:1], sample(plan, [4]), rtol=0, atol=1e-6)


def test_without_a_reference_there_is_one_run() -> None:
    states = list(generate_steps(DENOISE, SCHEDULE, replace(PLAN, candidates=3), seeds=[0], shape=SHAPE))
    assert len(states) == PLAN.steps
    assert states[-1].evidence is None


def test_the_probability_is_that_of_the_evidence() -> None:
    evidence = torch.tensor([[0.0], [1.0], [-1.0]]).expand(3, 20_000)
    noise, chosen = PerImageNoise([0]), None

    class Fast:
        def draw(self, stream: Stream, like: Tensor) -> Tensor:
            return noise.draw(stream, like.reshape(1, -1)).reshape(like.shape)

    for k, row in enumerate(evidence):
        x = torch.full((20_000, 1, 1, 1), float(k))
        chosen = choose(chosen, SamplerState(x=x, x0=x, t=0, evidence=row), Fast())
    assert chosen is not None
    shares = torch.bincount(chosen.state.x.flatten().long()) / 20_000
    torch.testing.assert_close(shares, evidence[:, 0].softmax(0), rtol=0, atol=0.015)


def test_evidence_is_the_integral_of_the_squared_error() -> None:
    """Whatever the steps are, an error of one size integrates to the same."""
    error = torch.full((2, 3, 4, 4), 0.1)
    for steps in ([1000, 0], [1000, 500, 3, 0]):
        pairs = itertools.pairwise(steps)
        total = sum((step_evidence(error, SCHEDULE, t, s) for t, s in pairs), torch.zeros(2))
        start = float((2 * SCHEDULE.log_snr_half[1000]).exp())
        assert total.tolist() == pytest.approx(2 * [-0.5 * 0.48 * (MAX_SNR - start)], rel=1e-5)
    variance = torch.tensor([0.25, 0.0]).reshape(2, 1, 1, 1)
    assert step_evidence(error, SCHEDULE, 1000, 0, variance).tolist() == pytest.approx(
        [-0.5 * 0.48 * 4, -0.5 * 0.48 * MAX_SNR], rel=1e-3
    )


def test_candidates_find_the_mode_that_one_run_misses() -> None:
    means = torch.zeros((2, 16), dtype=torch.float64)
    means[0, ::2], means[1, 1::2], means[1, :8] = 0.7, 0.7, means[1, :8] + 0.2
    data = Mixture(means, 0.01 * torch.eye(16, dtype=torch.float64))
    phi = low_pass_matrix(16, 4, orthogonal=True)
    y = data.draw(1, torch.Generator().manual_seed(3))[0]
    plan = SamplingPlan.preset("draft", clip=False)
    one, several = (measure(data, y, phi, replace(plan, candidates=k), 4, 300, 0)[0] for k in (1, 6))
    assert one > 0.1
    assert several < one / 3


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_noise": "fresh", "candidates": 8, "reference_sigma": (0.0, 0.3)},
        {"reference_noise": "fresh_released", "respaced_range_t": 0, "condition_from": (1000, 500)},
    ],
)
def test_an_image_does_not_depend_on_its_batch(changes: dict[str, Any]) -> None:
    """Nor does the noise of its reference: a clean one beside a noisy one, a late range beside a full one."""
    plan = replace(PLAN, sampler="ddpm", **changes)
    together = sample(plan, [5, 6])
    for place in (0, 1):
        own = {name: value[place] for name, value in changes.items() if isinstance(value, tuple)}
        alone = generate(
            DENOISE, SCHEDULE, replace(plan, **own), seeds=[5 + place], shape=SHAPE, reference=Y[place : place + 1]
        )
        assert torch.allclose(alone[0], together[place], atol=1e-5)
