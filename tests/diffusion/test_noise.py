import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import PerImageNoise, Stream, derive_seed, image_seed
from ilvr_lightning.diffusion.samplers import SAMPLERS
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from tests.support.oracles import GaussianDenoiser, make_plan

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 8, 8)
STREAMS: tuple[Stream, ...] = ("x_T", "sampler", "reference")


def sample(sampler: str, seeds: list[int], reference: Tensor | None = None) -> Tensor:
    plan = make_plan(sampler=sampler, num_steps=6, factor=4, eta=0.5)
    denoise = GaussianDenoiser(SCHEDULE, 0.1, 0.3)
    return generate(denoise, SCHEDULE, plan, seeds=seeds, shape=SHAPE, reference=reference)


@pytest.mark.parametrize("stream", STREAMS)
def test_noise_of_an_image_does_not_depend_on_its_batch(stream: Stream) -> None:
    seeds = [11, 12, 13, 11]
    together = PerImageNoise(seeds)
    alone = [PerImageNoise([seed]) for seed in seeds]
    for _ in range(3):
        drawn = together.draw(stream, torch.empty(4, *SHAPE))
        assert torch.equal(drawn, torch.cat([source.draw(stream, torch.empty(1, *SHAPE)) for source in alone]))
        assert torch.equal(drawn[0], drawn[3])


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_do_not_depend_on_batch_size_or_order(sampler: str, conditioned: bool) -> None:
    seeds, order = [3, 1, 4, 15], [2, 0, 3, 1]
    reference = torch.rand(4, *SHAPE) * 2 - 1 if conditioned else None
    together = sample(sampler, seeds, reference)
    shuffled = sample(sampler, [seeds[i] for i in order], None if reference is None else reference[order])
    alone = torch.cat(
        [sample(sampler, [seed], None if reference is None else reference[i : i + 1]) for i, seed in enumerate(seeds)]
    )
    assert torch.equal(shuffled, together[order])
    assert torch.equal(alone, together)


def test_streams_and_drawings_differ() -> None:
    like = torch.empty(1, 1, 100, 100)
    source = PerImageNoise([5])
    drawn = torch.stack([source.draw(stream, like).flatten() for stream in STREAMS for _ in range(2)])
    correlation = torch.corrcoef(drawn)
    # 10,000 numbers: uncorrelated ones stay within 5 standard errors of 0.
    assert float((correlation - torch.eye(6)).abs().max()) < 0.05
    assert float(drawn.mean().abs()) < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)


def test_streams_do_not_depend_on_each_others_use() -> None:
    like = torch.empty(1, *SHAPE)
    used, fresh = PerImageNoise([5]), PerImageNoise([5])
    used.draw("sampler", like)
    used.draw("x_T", like)
    assert torch.equal(used.draw("reference", like), fresh.draw("reference", like))


def test_derived_seeds_never_change() -> None:
    """Pinned: another value would change every picture that was ever published with its seed."""
    assert derive_seed(0) == 4761921975702974394
    assert derive_seed(7, "sampler") == 7080776975805879447
    assert image_seed(0, None, 0) == 8391818778511502832
    assert image_seed(1, "ab" * 32, 2) == 2437192454908865097


def test_derived_seeds_keep_parts_apart_and_fit_a_generator() -> None:
    seeds = {derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(1, "23", ""), derive_seed(23, 1)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_image_seed_is_made_from_run_reference_and_sample() -> None:
    seed = image_seed(0, "a" * 64, 0)
    assert image_seed(0, "a" * 64, 0) == seed
    others = {
        image_seed(1, "a" * 64, 0),
        image_seed(0, "b" * 64, 0),
        image_seed(0, "a" * 64, 1),
        image_seed(0, None, 0),
    }
    assert len(others | {seed}) == 5


def test_another_seed_is_another_picture() -> None:
    pictures = sample("ddpm", [0, 1])
    assert float((pictures[0] - pictures[1]).abs().mean()) > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_generator_is_neither_read_nor_moved(sampler: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = sample(sampler, [4, 5], torch.zeros(1, *SHAPE))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(sample(sampler, [4, 5], torch.zeros(1, *SHAPE)), first)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float64_is_kept_and_nearly_float32s(sampler: str) -> None:
    plan = make_plan(sampler=sampler, num_steps=6)
    denoise = GaussianDenoiser(SCHEDULE, 0.1, 0.3)
    x_T = PerImageNoise([1]).draw("x_T", torch.empty((1, *SHAPE), dtype=torch.float64))
    x = generate(denoise, SCHEDULE, plan, seeds=[1], shape=SHAPE, x_T=x_T)
    assert x.dtype == torch.float64
    # Not a float32 run in a wider coat.
    assert not torch.equal(x, x.float().double())


def test_given_x_T_replaces_the_seeds_own() -> None:  # noqa: N802
    like = torch.empty(1, *SHAPE)
    plan, denoise = make_plan(num_steps=4), GaussianDenoiser(SCHEDULE, 0.1, 0.3)
    own = PerImageNoise([8]).draw("x_T", like)
    drawn = generate(denoise, SCHEDULE, plan, seeds=[8], shape=SHAPE)
    assert torch.equal(generate(denoise, SCHEDULE, plan, seeds=[8], shape=SHAPE, x_T=own), drawn)
    assert not torch.equal(generate(denoise, SCHEDULE, plan, seeds=[8], shape=SHAPE, x_T=own + 1), drawn)


def test_seeds_and_batch_must_agree() -> None:
    with pytest.raises(ValueError, match="one seed per image is needed: got 2 seeds for 3 images"):
        PerImageNoise([0, 1]).draw("sampler", torch.empty(3, *SHAPE))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_seed_makes_its_picture_again(seed: int) -> None:
    like = torch.zeros((2, 1, 4, 4))
    first, again = (PerImageNoise([seed, seed + 1]).draw("x_T", like) for _ in range(2))
    assert torch.equal(first, again)
