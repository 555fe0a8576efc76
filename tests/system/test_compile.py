"""torch.compile with the compiler that is there."""

import shutil
import warnings

import pytest
import torch
from torch import nn

from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.hardware import CompiledForward


def network() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(8,), num_head_channels=8
    )
    made = UNet(config, (8, 8))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_compiled_output_equals_the_plain_one() -> None:
    made, x, t = network().eval(), torch.randn(2, 3, 8, 8), torch.tensor([0, 5])
    compiled = CompiledForward(made)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x, t), made(x, t), rtol=0, atol=1e-5)
    assert compiled._compiled is not None
