import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilvr_lightning.diffusion.low_pass import KERNELS, LowPassFilter, dct_basis, low_pass_matrix, resize_matrix
from tests.support import golden
from tests.support.oracles import nesting_error

ALL_KERNELS = [*KERNELS, "ideal"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in golden.names("lowpass/") if not name.endswith("/x")])
def test_matches_the_reference_implementation(name: str) -> None:
    _, size, kernel, factor = name.split("/")
    x = golden.array(f"lowpass/{size}/x")
    filtered = LowPassFilter((x.shape[-2], x.shape[-1]), int(factor), kernel)(x)
    assert filtered.dtype == torch.float32
    torch.testing.assert_close(filtered, golden.array(name), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_orthogonal_is_an_orthogonal_projection(kernel: str, factor: int) -> None:
    P = low_pass_matrix(48, factor, kernel, orthogonal=True)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-12)
    torch.testing.assert_close(P, P.mT, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(P) == 48 // factor


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_plain_cubic_is_no_projection(factor: int) -> None:
    A = low_pass_matrix(64, factor)
    mismatch = torch.linalg.matrix_norm(A @ A - A, 2) / torch.linalg.matrix_norm(A, 2)
    # measured by the first implementation: about 0.25.
    assert 0.2 < mismatch < 0.3


@pytest.mark.parametrize("kernel", ["cubic", "linear", "box"])
def test_orthogonal_keeps_what_the_filter_makes(kernel: str) -> None:
    x = noise(2, 3, 16, 32)
    made = LowPassFilter((16, 32), 4, kernel)(x)
    torch.testing.assert_close(LowPassFilter((16, 32), 4, kernel, orthogonal=True)(made), made, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["lanczos2", "lanczos3"])
def test_orthogonal_lanczos_keeps_what_downsampling_sees(kernel: str) -> None:
    D = resize_matrix(32, 8, kernel)
    torch.testing.assert_close(D @ low_pass_matrix(32, 4, kernel, orthogonal=True), D, rtol=0, atol=1e-12)


def test_ideal_keeps_the_lowest_frequencies_alone() -> None:
    basis = dct_basis(32)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)
    kept = basis @ low_pass_matrix(32, 4, "ideal") @ basis.mT
    torch.testing.assert_close(kept, torch.diag((torch.arange(32) < 8).to(torch.float64)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 12), (1, 6)])
def test_ideal_filters_nest(n: int, m: int) -> None:
    finer, coarser = low_pass_matrix(48, n, "ideal"), low_pass_matrix(48, m, "ideal")
    torch.testing.assert_close(finer @ coarser, coarser, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "orthogonal", "largest", "smallest"),
    [
        ("cubic", True, 0.079, 0.017),  # known figures
        ("cubic", False, 0.069, 0.027),
        ("linear", True, 0.201, 0.090),
        ("lanczos3", True, 0.011, 0.003),
        ("box", False, 0.0, 0.0),
        ("ideal", False, 0.0, 0.0),
    ],
)
def test_how_nearly_filters_nest(kernel: str, orthogonal: bool, largest: float, smallest: float) -> None:
    figures = [nesting_error(64, n, m, kernel, orthogonal) for n, m in ((2, 4), (4, 8), (8, 16), (16, 32))]
    assert max(figures) == pytest.approx(largest, abs=6e-4)
    assert min(figures) == pytest.approx(smallest, abs=6e-4)


def test_box_is_the_mean_of_blocks() -> None:
    x = noise(1, 1, 8, 12)
    means = x.reshape(1, 1, 2, 4, 3, 4).mean((3, 5))
    expected = means.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(LowPassFilter((8, 12), 4, "box")(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_factor_one_is_the_identity(kernel: str, orthogonal: bool) -> None:
    x = noise(2, 1, 5, 7)
    assert torch.equal(LowPassFilter((5, 7), 1, kernel, orthogonal)(x), x)


def test_side_of_length_one_is_left_alone() -> None:
    line = noise(2, 3, 1, 16)
    expected = line @ low_pass_matrix(16, 4).mT
    torch.testing.assert_close(LowPassFilter((1, 16), 4)(line), expected, rtol=0, atol=1e-12)


def test_factor_an_image_equals_single_factors() -> None:
    x = noise(3, 2, 16, 32)
    together = LowPassFilter((16, 32), (2, 4, 8), orthogonal=True)(x)
    for i, factor in enumerate((2, 4, 8)):
        alone = LowPassFilter((16, 32), factor, orthogonal=True)(x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_inputs(dtype: torch.dtype) -> None:
    low_pass = LowPassFilter((16, 16), 4)
    x = noise(1, 1, 16, 16)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    # Both dtypes through one filter: its cache must not hand out the other's matrices.
    low_pass(x.float())
    expected = low_pass_matrix(16, 4) @ x @ low_pass_matrix(16, 4).mT
    filtered = low_pass(x.to(dtype))
    assert filtered.dtype == dtype
    torch.testing.assert_close(filtered.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "factor", "message"),
    [
        (
            (256, 256),
            12,
            "sampling.factor must divide the image size: got factor=12 for 256 px; the nearest that do are 8 and 16",
        ),
        (
            (24, 36),
            8,
            "sampling.factor must divide the image size: got factor=8 for 24x36 px; the nearest that do are 6 and 12",
        ),
        (
            (32, 32),
            64,
            "sampling.factor must divide the image size: got factor=64 for 32 px; the nearest that does is 32",
        ),
        (
            (32, 32),
            0,
            "sampling.factor must divide the image size: got factor=0 for 32 px; the nearest that does is 1",
        ),
    ],
)
def test_factor_that_does_not_divide(size: tuple[int, int], factor: int, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        LowPassFilter(size, factor)
    assert str(error.value) == message


def test_every_factor_of_a_batch_is_checked() -> None:
    with pytest.raises(ValueError, match="got factor=12 for 256 px"):
        LowPassFilter((256, 256), (8, 12))


def test_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"images of \(16, 32\): got \(32, 16\)"):
        LowPassFilter((16, 32), 4)(torch.zeros(1, 3, 32, 16))


def test_wrong_kernel() -> None:
    with pytest.raises(ValueError, match=r"sampling\.kernel must be one of cubic, .*ideal: got 'bicubic'"):
        LowPassFilter((16, 16), 4, "bicubic")


@settings(max_examples=80, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    factor=st.integers(1, 6),
    kernel=st.sampled_from(ALL_KERNELS),
    orthogonal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_laws(cells: tuple[int, int], factor: int, kernel: str, orthogonal: bool, seed: int) -> None:
    height, width = cells[0] * factor, cells[1] * factor
    low_pass = LowPassFilter((height, width), factor, kernel, orthogonal)
    x, y = noise(2, 1, 2, height, width, seed=seed)
    rows, columns = (low_pass_matrix(side, factor, kernel, orthogonal) for side in (height, width))
    expected = torch.einsum("ij,bcjk,lk->bcil", rows, x, columns)
    torch.testing.assert_close(low_pass(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(low_pass(2 * x - 3 * y), 2 * low_pass(x) - 3 * low_pass(y), rtol=0, atol=1e-11)
    constant = torch.full_like(x, math.pi)
    # D^+ D of Lanczos keeps no constant exactly: D's pseudo-inverse spans another space than U.
    if not (orthogonal and kernel.startswith("lanczos")):
        torch.testing.assert_close(low_pass(constant), constant, rtol=0, atol=1e-11)
    if orthogonal or kernel == "ideal":
        torch.testing.assert_close(low_pass(low_pass(x)), low_pass(x), rtol=0, atol=1e-11)
    # Mirrored borders treat both ends alike.
    torch.testing.assert_close(low_pass(x.flip(-1)), low_pass(x).flip(-1), rtol=0, atol=1e-11)
