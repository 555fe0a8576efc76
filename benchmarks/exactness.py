"""How exactly the project computes what others compute: the largest deviations in the tests that compare.

    python -m benchmarks.exactness

Runs those tests and watches torch.testing.assert_close: a line a test, its largest absolute difference and, where the
figure is relative, the largest difference over the size of the expected value.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

TESTS = {
    "four U-Nets, from files in ADM's key names": "models/test_unet.py::test_matches_the_reference_implementation",
    "the filter: kernels, factors, sizes": "diffusion/test_low_pass.py::test_matches_the_reference_implementation",
    "ILVR as released, each step by itself": "diffusion/test_samplers.py::test_every_step_of_the_released_code",
    "ILVR as released, whole runs from x_T": "diffusion/test_samplers.py::test_whole_runs_of_the_released_code",
    "simple and hybrid loss, bound (relative)": "diffusion/test_loss.py::test_matches_the_reference_implementation",
    "bound of an image, term by term (relative)": "diffusion/test_loss.py::test_variational_bound_of_an_image",
    "diffusers UNet2DModel, three sizes": "checkpoints/test_diffusers.py::test_diffusers_folder",
    "DDIM authors' layout, oracle diffusers": "checkpoints/test_ddim.py::test_ddim_layout_is_ho_et_als_network",
    "four U-Nets exported to diffusers": "checkpoints/test_export.py::test_ours_to_diffusers_runs_in_its_pipeline",
    "diffusers DDPMScheduler": "diffusion/test_diffusers_samplers.py::test_ddpm",
    "diffusers DDIMScheduler": "diffusion/test_diffusers_samplers.py::test_ddim",
    "diffusers DPMSolverMultistepScheduler": "diffusion/test_diffusers_samplers.py::test_dpm_solver",
}


class Watch:
    """A pytest plugin that replaces assert_close by one that keeps the largest differences."""

    def __init__(self) -> None:
        self.absolute = self.relative = 0.0
        self.failed = False
        self._assert_close: Callable[..., None] = torch.testing.assert_close

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_runtest_setup(self) -> None:
        torch.testing.assert_close = self.compare

    def pytest_runtest_teardown(self) -> None:
        torch.testing.assert_close = self._assert_close

    def compare(self, actual: Any, expected: Any, **tolerances: Any) -> None:
        """As assert_close, and remember."""
        difference = (actual.double() - expected.double()).abs()
        self.absolute = max(self.absolute, float(difference.max()))
        self.relative = max(self.relative, float((difference / expected.double().abs()).max()))
        self._assert_close(actual, expected, **tolerances)


def main() -> int:
    """Print a line a comparison; returns 1 if one fails."""
    failed = False
    print("| what | largest difference |\n|---|---|")
    for what, test in TESTS.items():
        watch = Watch()
        quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
        pytest.main([*quiet, f"tests/{test}"], plugins=[watch])
        failed |= watch.failed
        figure = watch.relative if "(relative)" in what else watch.absolute
        print(f"| {what} | {figure:.1e}{' FAILED' if watch.failed else ''} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
