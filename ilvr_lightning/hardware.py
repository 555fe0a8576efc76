"""What the hardware does best: precision, memory format, compilation. docs/speed.md has the figures behind it."""

import os
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ilvr_lightning.cli import announce
from ilvr_lightning.models.unet import UNet

Compile = Literal["auto", True, False]
COMPILE_SECONDS = 120.0
"""What compiling a network takes on a CPU, at most, on two cores."""
COMPILE_SAVES = 0.25
"""The least share of a sampling run on a CPU that a compiled network saves."""


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    supported: bool = False
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        supported = torch.cpu._is_avx512_bf16_supported()
    return supported


def training_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """The Trainer's precision unless one is given: bf16-mixed where bfloat16 is fast, else 32-true."""
    kinds = {"gpu": ("cuda", "mps"), "auto": ("cuda", "mps", "cpu")}.get(accelerator, (accelerator,))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next((kind for kind in kinds if there.get(kind)), "cpu")
    return "bf16-mixed" if fast_bf16(torch.device(kind)) else "32-true"


def for_training(network: UNet, device: torch.device) -> None:
    """Give the weights the memory format that training is fastest in, before they are moved or wrapped."""
    if device.type == "cuda":  # on a CPU the backward pass of the normalisation is four times slower in it
        network.to(memory_format=torch.channels_last)


def for_sampling(network: UNet, bf16: bool) -> None:
    """Cast the weights once, so that no evaluation casts them, in the memory format that goes with it."""
    if bf16:
        network.to(torch.bfloat16).to(memory_format=torch.channels_last)


def should_compile(asked: Compile, device: torch.device, seconds: Callable[[], float] = lambda: 0.0) -> bool:
    """Whether to compile.

    Args:
        asked: true, false, or auto: on a GPU, and on a CPU that has a compiler and work enough to win the time back.
        device: where the network runs.
        seconds: tells how long a CPU would sample without.
    """
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return has_compiler() and seconds() * COMPILE_SAVES > COMPILE_SECONDS
    return device.type == "cuda"


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile calls on a CPU is there."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def sampling_seconds(
    network: UNet, shape: tuple[int, int, int], batch_size: int, bf16: bool, evaluations: int
) -> float:
    """How long so many evaluations of a batch will take on a CPU, from the second of two.

    0 for fewer than 100: measuring costs two, and compiling would not pay unless each took seconds.
    """
    if evaluations < 100:
        return 0.0
    x = torch.zeros(batch_size, *shape, dtype=torch.bfloat16 if bf16 else torch.float32)
    for_sampling(network, bf16)
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            network(x, torch.zeros(batch_size, dtype=torch.int64))
    return (time.perf_counter() - start) * evaluations


class Compiled:
    """A network's forward pass, compiled for the first shape that it sees; other shapes run as they are.

    The module itself is left alone, so that its state dict keeps its names. Where compiling fails, one line says so and
    everything runs as it is.

    Args:
        network: what to compile; in evaluation a GPU replays it as a CUDA graph.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._compiled: Callable[..., Any] | None = None
        self._shape: torch.Size | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network gives for x (B, C, H, W) and 0-based timesteps t (B,)."""
        if self._shape is None:
            self._shape = x.shape
            self._compile(x, t)
        output: Tensor
        if self._compiled is None or x.shape != self._shape:
            output = self.network(x, t)
        else:
            output = self._compiled(x, t)
            if not torch.is_grad_enabled():
                output = output.clone()  # a CUDA graph writes its next result in the same place
        return output

    def _compile(self, x: Tensor, t: Tensor) -> None:
        training = torch.is_grad_enabled()
        graphs = x.device.type == "cuda" and not training
        compiled = torch.compile(self.network.forward, dynamic=False, mode="reduce-overhead" if graphs else None)
        try:
            trial = compiled(x, t)
            if training:  # the backward pass is compiled apart; DDP's hooks are not called by this
                torch.autograd.grad(trial.sum(), list(self.network.parameters()))
            self._compiled = compiled
        except Exception as error:  # of a compiler any
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            announce(f"note         torch.compile failed ({reason}); goes on without it, compile=false never tries")
