"""Where a reference is followed: masks in phi's space, alpha channels, and the low band kept in 8 bits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilvr_lightning.data.images import from_tensor, to_tensor
from ilvr_lightning.diffusion import exact_low_band as gamut
from ilvr_lightning.diffusion.exact_low_band import project_to_low_band
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import KERNELS, LowPassFilter, low_pass_factors
from ilvr_lightning.diffusion.samplers import SAMPLERS
from tests.support.gaussian import SCHEDULE, spectrum_2d
from tests.support.oracles import GaussianDenoiser, make_plan

DATA = spectrum_2d(32)
PIXELS = GaussianDenoiser(SCHEDULE, 0.1, 0.3)
MATCHED = {"orthogonal": True, "reference_noise": "matched", "spacing": "logsnr"}


def soft_edge(width: int = 8) -> Tensor:
    """(1, 1, 32, 32): 1 on the left, 0 on the right, falling over so many pixels in the middle."""
    return ((16 + width / 2 - 0.5 - torch.arange(32, dtype=torch.float64)) / width).clamp(0, 1).expand(1, 1, 32, 32)


def sampled(mask: Tensor | None, count: int = 1, **changes: object) -> Tensor:
    plan = make_plan(**{"sampler": "dpmpp_2m", "num_steps": 20, "factor": 4, "clip": False, **MATCHED, **changes})
    reference = torch.full((1, 1, 32, 32), 0.8, dtype=torch.float64)
    x_T = torch.randn((count, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return generate(
        DATA.denoise, SCHEDULE, plan, seeds=range(count), shape=(1, 32, 32), reference=reference, mask=mask, x_T=x_T
    )


@pytest.mark.parametrize(
    ("kernel", "orthogonal"), [("cubic", True), ("cubic", False), ("lanczos3", True), ("ideal", False)]
)
def test_weights_of_one_are_the_filter(kernel: str, orthogonal: bool) -> None:
    x = torch.randn((3, 2, 16, 32), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low_pass = LowPassFilter((16, 32), (2, 4, 8), kernel, orthogonal)
    ones = low_pass.cell_means(torch.ones(1, 1, 16, 32))
    torch.testing.assert_close(low_pass.weighted(x, ones), low_pass(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(low_pass.weighted(x, 0 * ones), 0 * x, rtol=0, atol=0)
    assert [int((ones[i] == 1).sum()) for i in range(3)] == [8 * 16, 4 * 8, 2 * 4]


def test_coarse_mask_is_the_mean_of_cells() -> None:
    mask = torch.rand((2, 1, 8, 12), generator=torch.Generator().manual_seed(0))
    expected = mask.double().reshape(2, 1, 2, 4, 3, 4).mean((3, 5))
    torch.testing.assert_close(LowPassFilter((8, 12), 4).cell_means(mask), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("noise", ["fresh", "matched", "fixed"])
def test_low_band_where_the_mask_is_one_is_the_references(sampler: str, noise: str) -> None:
    """On the filter's grid exactly; elsewhere it is the sampler's own."""
    y = 2 * torch.rand((2, 3, 16, 32), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    mask = torch.ones(1, 1, 16, 32)
    mask[..., 16:] = 0
    plan = make_plan(sampler=sampler, num_steps=6, factor=4, eta=0.5, orthogonal=True, reference_noise=noise)
    x = generate(PIXELS, SCHEDULE, plan, seeds=[0, 1], shape=(3, 16, 32), reference=y, mask=mask,
                 x_T=torch.randn_like(y))  # fmt: skip
    (_, down_h), (_, down_w) = (low_pass_factors(side, 4, "cubic", True) for side in (16, 32))
    off = down_h @ (x - y) @ down_w.mT
    torch.testing.assert_close(off[..., :4], torch.zeros_like(off[..., :4]), rtol=0, atol=1e-10)
    assert float(off[..., 4:].abs().mean()) > 0.1


@pytest.mark.parametrize("gains", [(), (1.05, 0.9)])
def test_mask_of_ones_changes_nothing_and_of_zeros_is_unconditional(gains: tuple[float, ...]) -> None:
    ones = sampled(torch.ones(1, 1, 32, 32), octave_gains=gains)
    torch.testing.assert_close(ones, sampled(None, octave_gains=gains), rtol=0, atol=1e-10)
    plan = make_plan(sampler="dpmpp_2m", num_steps=20, clip=False, spacing="logsnr")
    x_T = torch.randn((1, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = generate(DATA.denoise, SCHEDULE, plan, seeds=[0], shape=(1, 32, 32), x_T=x_T)
    torch.testing.assert_close(sampled(torch.zeros(1, 1, 32, 32), octave_gains=gains), free, rtol=0, atol=1e-10)


def test_grey_is_a_range_of_its_own() -> None:
    """m is followed down to (1 - m) T (property 3 of Choi et al. 2021)."""
    for grey, low in ((0.5, 500), (0.25, 750), (0.9, 100)):
        common: dict[str, Any] = {"timesteps": (1000, 800, 750, 500, 300, 100, 50), "octave_gains": (1.05, 0.9)}
        half = sampled(torch.full((1, 1, 32, 32), grey), **common)
        ranged = sampled(None, condition_to=low, **common)
        torch.testing.assert_close(half, ranged, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("width", [1, 8])
def test_edges_leave_no_seam(eta: float, factor: int, width: int) -> None:
    """The mean gradient over 64 pictures, at the column where it is largest, against its median away from the edge."""
    x = sampled(soft_edge(width), 64, eta=eta, factor=factor)
    steps = (x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2))
    edge = torch.zeros(31, dtype=torch.bool)
    edge[11:20] = True
    assert float(steps[edge].max()) <= 1.1 * float(steps[~edge].median())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3, 32, 32), r"the mask must have the shape \(1, 1, 32, 32\), or 1 in place of 1: got"),
        (torch.ones(1, 1, 32, 16), "the mask must have the shape"),
        (torch.full((1, 1, 32, 32), 255.0), r"the mask must be in \[0, 1\]: got 255 to 255"),
        (torch.full((1, 1, 32, 32), torch.nan), r"the mask must be in \[0, 1\]: got nan to nan"),
    ],
)
def test_wrong_mask(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled(mask)


def test_mask_and_start_from() -> None:
    with pytest.raises(ValueError, match=r"sampling\.start_from cannot be combined with a mask"):
        sampled(torch.ones(1, 1, 32, 32), start_from=500)


def test_mask_without_a_reference() -> None:
    with pytest.raises(ValueError, match="a mask needs a reference"):
        generate(PIXELS, SCHEDULE, make_plan(), seeds=[0], shape=(3, 8, 8), mask=torch.ones(1, 1, 8, 8))


def eight_bits(x: Tensor) -> Tensor:
    return to_tensor(from_tensor(x)).double()


@settings(max_examples=60, deadline=None)
@given(
    factor=st.sampled_from([1, 2, 3, 4, 6, 12]),
    kernel=st.sampled_from(list(KERNELS)),
    contrast=st.sampled_from([0.3, 1.0, 5.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_low_band_in_eight_bits(factor: int, kernel: str, contrast: float, seed: int) -> None:
    """References up to pure black and white, samples far out of the gamut."""
    generator = torch.Generator().manual_seed(seed)
    y = to_tensor(from_tensor(contrast * torch.randn((2, 3, 12, 24), generator=generator)))
    x = y.flip(0) + 0.7 * torch.randn((2, 3, 12, 24), generator=generator)
    made = project_to_low_band(x, y, factor, kernel)
    assert float(made.abs().max()) <= 1 + 1e-6
    down_h, down_w = (low_pass_factors(side, factor, kernel)[1] for side in (12, 24))
    off = down_h @ (eight_bits(made) - y.double()) @ down_w.mT
    assert float(off.abs().max()) <= 1 / 127.5


def test_clipping_alone_breaks_the_low_band() -> None:
    y = to_tensor(from_tensor(torch.full((1, 1, 16, 16), 0.9)))
    x = y + 0.5 * torch.randn((1, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    x = x + LowPassFilter((16, 16), 4, orthogonal=True)(y - x)
    _, down = low_pass_factors(16, 4)
    assert float((down @ (x - y).double() @ down.mT).abs().max()) < 1e-6
    assert float((down @ (eight_bits(x) - y.double()) @ down.mT).abs().max()) > 10 / 127.5
    made = project_to_low_band(x, y, 4)
    assert float((down @ (eight_bits(made) - y.double()) @ down.mT).abs().max()) <= 1 / 127.5
    # It is still the sample, and not the reference.
    assert float((made - y).std()) > 0.1


def test_what_does_not_come_together_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gamut, "MAX_ITERATIONS", 0)
    y = to_tensor(from_tensor(torch.full((1, 1, 16, 16), 0.9)))
    x = y + torch.randn((1, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    made = project_to_low_band(x, y, 4)
    _, down = low_pass_factors(16, 4)
    assert float((down @ (eight_bits(made) - y.double()) @ down.mT).abs().max()) <= 1 / 127.5
    assert float(made.abs().max()) <= 1


def test_low_band_is_kept_by_moving_no_more_than_it_takes() -> None:
    """On a black and white reference the detail stays: a sample in the set already is near its projection."""
    generator = torch.Generator().manual_seed(0)
    y = torch.where(torch.randn((1, 1, 32, 32), generator=generator) > 0, 1.0, -1.0)
    y = torch.kron(y[..., :8, :8], torch.ones(4, 4))
    x = y + 0.6 * torch.randn((1, 1, 32, 32), generator=generator)
    made = project_to_low_band(x, y, 4)
    kept = made - LowPassFilter((32, 32), 4, orthogonal=True)(made - y)
    assert float((made - y).std()) > 0.05  # and not the reference itself
    assert float((kept.clamp(-1, 1) - made).abs().max()) < 0.1


@pytest.mark.parametrize("preset", ["fast", "draft", "ilvr_adm"])
def test_exact_low_band_of_a_run(preset: str) -> None:
    from ilvr_lightning.diffusion.plan import SamplingPlan

    y = to_tensor(from_tensor(2 * torch.rand((2, 3, 16, 32), generator=torch.Generator().manual_seed(0)) - 1))
    mask = torch.ones(1, 1, 16, 32)
    mask[..., :8] = 0.5
    plan = SamplingPlan.preset(preset, num_steps=5, factor=(4, 8), exact_low_band=True)
    x = generate(PIXELS, SCHEDULE, plan, seeds=[0, 1], shape=(3, 16, 32), reference=y, mask=mask)
    for i, factor in enumerate((4, 8)):
        down_h, down_w = (low_pass_factors(side, factor)[1] for side in (16, 32))
        off = (down_h @ (eight_bits(x[i]) - y[i].double()) @ down_w.mT)[..., 8 // factor :]
        assert float(off.abs().max()) <= 1 / 127.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "ideal"}, "sampling.exact_low_band needs a kernel that downsamples: got sampling.kernel=ideal"),
        (
            {"condition_to": 5},
            "sampling.exact_low_band keeps the reference to the end and needs ranges that end at 0",
        ),
    ],
)
def test_exact_low_band_does_not_go_with(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(exact_low_band=True, **changes)


def test_what_has_no_low_band_to_keep() -> None:
    y = torch.zeros(1, 3, 12, 12)
    with pytest.raises(ValueError, match=r"the kernel must be one that downsamples, cubic, .*: got 'ideal'"):
        project_to_low_band(y, y, 4, "ideal")
    with pytest.raises(ValueError, match="must divide the image size: got factor=5"):
        project_to_low_band(y, y, 5)
    assert project_to_low_band(y[:0], y[:0], 4).shape == (0, 3, 12, 12)
    assert project_to_low_band(y.repeat(2, 1, 1, 1), y, 4).shape == (2, 3, 12, 12)


def test_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"the low-pass filter is for images of \(16, 32\): got \(32, 32\)"):
        LowPassFilter((16, 32), 4).cell_means(torch.ones(1, 1, 32, 32))
