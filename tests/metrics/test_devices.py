"""What is computed in float64 is on the CPU: devices such as Apple's MPS have no float64."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_band import radial_spectrum
from ilvr_lightning.metrics.bands import energy_scores, octave_energies
from ilvr_lightning.training.tint import ColourMeans


class OnDevice(Tensor):
    """A tensor that stands for one on such a device, until it is moved to the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not Tensor.double, "".join(traceback.format_stack(limit=4))
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


def tint(x: Tensor) -> None:
    means = ColourMeans()
    means.add({"image": x})
    assert means.tint(x) is not None


@pytest.mark.parametrize(
    "compute",
    [tint, radial_spectrum, lambda x: octave_energies(x, x, 2), lambda x: energy_scores(torch.stack([x, x], 1), x, 2)],
)
def test_nothing_is_doubled_on_the_device(compute: Callable[[Tensor], object]) -> None:
    x = torch.rand((4, 3, 8, 8)).as_subclass(OnDevice)
    compute(x)
