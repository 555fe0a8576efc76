"""torch.compile with the compiler that is there."""

import shutil
import warnings

import pytest
import torch

from ilvr_lightning.runtime.hardware import CompiledForward
from tests.support.oracles import small_unet


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_compiled_output_equals_the_plain_one() -> None:
    made, x, t = small_unet().eval(), torch.randn(2, 3, 8, 8), torch.tensor([0, 5])
    compiled = CompiledForward(made)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x, t), made(x, t), rtol=0, atol=1e-5)
    assert compiled._compiled is not None
