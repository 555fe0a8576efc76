"""Which images a run makes: in what order, with which settings, made up when they are asked for."""

import argparse
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.data.references import References, find_references
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.arguments import parse_arguments
from ilvr_lightning.sampling.requests import MAX_SAMPLES, SampleRequests, check_image_size, check_plan, expand_sweep
from tests.support.oracles import make_plan
from tests.support.samples import index, listed

Run = Callable[..., Path]
PLAN = SamplingPlan(factor=2).resolved(25)


def make_requests(
    references: References, plans: list[SamplingPlan], num_samples: int, **changes: Any
) -> SampleRequests:
    made: dict[str, Any] = {"seed": 3, "weights": "ema", "checkpoint_sha256": "0" * 64, "overrides": {}, **changes}
    return SampleRequests(references, plans, num_samples, **made)


@pytest.fixture(scope="module")
def denoiser(checkpoint: Path) -> LoadedDenoiser:
    return load_denoiser(checkpoint, say=None)


@pytest.fixture
def three(references: Path) -> References:
    return find_references([str(references / name) for name in ("a.png", "b.png", "other/a.png")], (3, 8, 8), "crop")


def test_nothing_is_kept() -> None:
    requests = make_requests(References(), [PLAN], MAX_SAMPLES)
    tracemalloc.start()
    assert len(requests) == MAX_SAMPLES
    last = requests[MAX_SAMPLES - 1]
    assert (last.recipe.sample, last.recipe.seed, last.reference, last.index) == (9_999_999, 3, None, 9_999_999)
    assert [request.recipe.sample for request in requests[5:8]] == [5, 6, 7]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    with pytest.raises(IndexError):
        requests[MAX_SAMPLES]
    with pytest.raises(UserError, match="a run makes at most 10000000"):
        make_requests(References(), [PLAN], MAX_SAMPLES + 1)


def test_references_then_plans_then_samples(three: References) -> None:
    plans = [replace(PLAN, factor=factor) for factor in (2, 4)]
    requests = make_requests(three, plans, 3)
    assert (len(requests), requests.per_reference) == (18, 6)
    made = [(r.recipe.reference, r.recipe.reference_sha256, r.recipe.plan.factor, r.recipe.sample) for r in requests]
    wanted = [(r.name, r.sha256, n, k) for r in three for n in (2, 4) for k in range(3)]
    assert made == wanted
    assert [request.index for request in requests] == list(range(18))
    assert requests[17].reference == three[2]


def test_each_reference_has_its_own_noise(three: References) -> None:
    """References that are estimated to be noisy; an image of another noise is another image."""
    requests = make_requests(three, [PLAN], 1, estimate_noise=True)
    plain = make_requests(three, [PLAN], 1)
    noises = [reference.noise for reference in three]
    assert [request.recipe.plan.reference_sigma for request in requests] == noises
    assert all(noise > 0.1 for noise in noises)  # random pixels
    for i, request in enumerate(requests):
        values = request.recipe.plain()
        assert [requests.matches(j, values) for j in range(3)] == [j == i for j in range(3)]
        assert not plain.matches(i, values)
        assert not requests.matches(i, plain[i].recipe.plain())
        values["plan"]["reference_sigma"] += 0.01
        assert not requests.matches(i, values)


def test_an_image_matches_its_own_recipe_alone(three: References) -> None:
    plans = [replace(PLAN, factor=factor) for factor in (2, 4)]
    requests = make_requests(three, plans, 2)
    for i, request in enumerate(requests):
        environment = replace(request.recipe, batch_size=9, precision="bf16", device="cuda", reference="renamed")
        for j in range(len(requests)):
            assert requests.matches(j, environment.plain()) == (i == j)
    other = make_requests(three, plans, 2, seed=4)
    assert not any(other.matches(i, request.recipe.plain()) for i, request in enumerate(requests))
    assert not requests.matches(0, {"plan": {}})
    assert not requests.matches(0, {**requests[0].recipe.plain(), "mask_sha256": "0" * 64})


def test_a_reference_is_read_only_if_everything_else_agrees(three: References, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests(three, [PLAN], 2)
    first, second = (requests[i].recipe.plain() for i in (0, 1))
    monkeypatch.setattr(References, "__getitem__", None)
    assert not requests.matches(0, second)
    with pytest.raises(TypeError):
        requests.matches(0, first)


def test_a_reference_that_cannot_be_read_is_remembered(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilvr_lightning.data.references.EAGER_LIMIT", 1)
    (tmp_path / "x.png").write_bytes(b"no image")
    references = find_references([str(images / "00.png"), str(tmp_path / "x.png")], (3, 8, 8), "crop")
    requests = make_requests(references, [PLAN], 2)
    assert not requests.references_are_few
    assert [requests.is_usable(i) for i in range(4)] == [True, True, False, False]
    assert list(requests.unusable) == [1]
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        requests[2]


def test_a_mask_does_not_go_with_start_from(tmp_path: Path) -> None:
    """Of few references it is refused at the start, whichever has the mask."""
    pixels = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    references = find_references([str(tmp_path / "whole.png"), str(tmp_path / "cut.png")], (3, 8, 8), "crop")
    make_requests(references, [PLAN], 1)
    with pytest.raises(UserError, match="--start-from cannot be combined with a mask, and cut has one of its own"):
        make_requests(references, [replace(PLAN, start_from=20, num_steps=4)], 1)


# A sweep is a list of plans


def sweep(denoiser: LoadedDenoiser, *argv: object) -> list[SamplingPlan]:
    args: argparse.Namespace = parse_arguments([str(word) for word in ("--steps", 4, *argv)])
    return expand_sweep(args, denoiser, check_image_size(denoiser, args.image_size))


def test_every_factor_with_every_range(denoiser: LoadedDenoiser) -> None:
    plans = sweep(denoiser, "--ref", "x", "--factor", 2, 4, "--range", "25:0", "20:5")
    assert [(p.factor, p.condition_from, p.condition_to) for p in plans] == [
        (factor, *both) for factor in (2, 4) for both in ((25, 0), (20, 5))
    ]
    assert {replace(p, factor=2, condition_from=0, condition_to=0) for p in plans} == {
        replace(plans[0], condition_from=0, condition_to=0)
    }


@pytest.mark.parametrize(
    ("argv", "settings"),
    [
        ("--ref x", [(8, 25, 0)]),
        ("--ref x --factor 4", [(4, 25, 0)]),
        ("--ref x --sweep", [(4, 25, b) for b in (0, 6, 12, 19)]),
        ("--ref x --sweep --factor 2 8 --range 20:3", [(2, 20, 3), (8, 20, 3)]),
        ("--ref x --sweep --image-size 16", [(n, 25, b) for n in (4, 8) for b in (0, 6, 12, 19)]),
        ("--unconditional", [(8, 25, 0)]),
    ],
)
def test_what_is_not_given_is_filled_in(
    argv: str, settings: list[tuple[int, int, int]], denoiser: LoadedDenoiser
) -> None:
    found = [(p.factor, p.condition_from, p.condition_to) for p in sweep(denoiser, *argv.split())]
    assert found == settings


def test_each_plan_is_resolved_once(denoiser: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, calls = SamplingPlan.resolved, []

    def counted(self: SamplingPlan, T: int) -> SamplingPlan:
        calls.append(self)
        return resolved(self, T)

    monkeypatch.setattr(SamplingPlan, "resolved", counted)
    assert len(sweep(denoiser, "--ref", "x", "--factor", 2, 4, "--range", "25:0", "20:5")) == len(calls) == 4


def test_a_sweep_has_factors_that_divide_every_side(denoiser: LoadedDenoiser) -> None:
    args = parse_arguments(["--ref", "x", "--sweep"])
    plans = expand_sweep(args, denoiser, (3, 64, 80))
    assert {plan.factor for plan in plans} == {4, 8, 16}


def test_all_steps_are_those_of_the_checkpoint(denoiser: LoadedDenoiser) -> None:
    assert [p.num_steps for p in sweep(denoiser, "--ref", "x", "--steps", "all")] == [25]
    assert [p.num_steps for p in sweep(denoiser, "--ref", "x", "--steps", "all", "--start-from", 9)] == [9]


def test_clipping_is_the_checkpoints_unless_it_is_given(
    denoiser: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "clip", False)
    assert [sweep(denoiser, "--ref", "x", *more)[0].clip for more in ((), ("--clip",), ("--no-clip",))] == [
        False,
        True,
        False,
    ]


def test_calibrated_gains_go_with_their_factor(denoiser: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = {2: (1.25,), 4: (1.5, 0.75)}
    monkeypatch.setattr(denoiser, "description", replace(denoiser.description, octave_gains={"fast": gains}))

    def used(*argv: object, side: int = 8) -> list[tuple[float, ...]]:
        args = parse_arguments([str(word) for word in ("--ref", "x", "--factor", 2, 4, 8, *argv)])
        return [plan.octave_gains for plan in expand_sweep(args, denoiser, (3, side, side))]

    assert used() == [(1.25,), (1.5, 0.75), ()]
    assert used("--octave-gains", 1.1) == [(1.1,)] * 3
    assert used("--image-size", 8) == used()  # its own size
    assert used("--image-size", 16, side=16) == used("--preset", "draft") == used("--steps", 5) == [()] * 3


def test_a_plan_that_the_checkpoint_does_not_allow(denoiser: LoadedDenoiser) -> None:
    for changes, words in (
        ({"factor": 3}, "--factor must divide the image size: got factor=3 for 8 px"),
        ({"num_steps": 26}, "--steps must be at most T=25: got 26"),
        ({"sampler": "ddpm", "variance": "learned"}, "--variance learned needs a network that learned its variance"),
    ):
        plan = make_plan(**{"factor": 2, "num_steps": 4, **changes})
        with pytest.raises(UserError, match=words):
            check_plan(plan, denoiser, (3, 8, 8), follows=True)
    unconditional = SamplingPlan(factor=3, num_steps=4)
    assert check_plan(unconditional, denoiser, (3, 8, 8), follows=False).condition_from == 25


def test_a_sweep_as_the_command_samples_it(run: Run, references: Path) -> None:
    out = run("--ref", references / "a.png", references / "b.png", "--factor", 2, 4, "--range", "25:0", "25:12",
              "--num-samples", 1)  # fmt: skip
    assert listed(out) == [f"{r}_N{n}_t25-{b}_0.png" for r in "ab" for n in (2, 4) for b in (0, 12)]
    lines = index(out)
    assert [line["recipe"]["plan"]["condition_to"] for line in lines] == [0, 12] * 4
    assert [(line["factor"], line["condition_from"], line["condition_to"]) for line in lines] == [
        (n, 25, b) for _ in "ab" for n in (2, 4) for b in (0, 12)
    ]


def test_a_note_names_references_that_are_smaller_than_the_factor_follows(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (2, 3)).save(tmp_path / "thumbnail.png")
    note = "note         thumbnail has only 2x3 pixels, so that N=2 follows its blur; give --factor 4 or more"
    for factors, noted in (((4, 2), True), ((4,), False)):
        run("--ref", tmp_path / "thumbnail.png", "--factor", *factors, "--num-samples", 1)
        assert (note in capsys.readouterr().out) is noted
