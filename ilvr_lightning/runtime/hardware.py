"""What the hardware does best: precision, memory format, compilation. docs/speed.md has the figures behind it."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.command import say

Compile = Literal["auto", True, False]


COMPILE_SECONDS = 120.0
"""What compiling a network takes on a CPU, at most, on two cores."""


COMPILE_SAVES = 0.1
"""The least share of a sampling run on a CPU that a compiled network saves."""


CHANNELS_LAST_FROM = 128
"""The width, model.channels, from which training on a CPU is faster in channels_last."""


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


def use_channels_last(network: UNet, device: torch.device) -> None:
    """Give the weights the memory format that training is fastest in, before they are moved or wrapped."""
    # On a CPU the normalisation's backward pass is slower in it, the convolutions' faster: narrow networks lose.
    if device.type == "cuda" or (device.type == "cpu" and network.config.channels >= CHANNELS_LAST_FROM):
        network.to(memory_format=torch.channels_last)


def cast_for_sampling(network: UNet, bf16: bool) -> None:
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


def sampling_seconds(network: nn.Module, batch: tuple[int, int, int, int], evaluations: int) -> float:
    """How long a CPU will take for so many evaluations of a batch (B, C, H, W), by the second of two.

    0 for fewer than 200, where measuring would cost more than 1%.
    """
    if evaluations < 200:
        return 0.0
    x = torch.zeros(batch, dtype=next(network.parameters()).dtype)
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            network(x, torch.zeros(len(x), dtype=torch.int64))
    return (time.perf_counter() - start) * evaluations


def restore_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give restored moments the memory format of their weights: fused steps take it for granted, and go wrong."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


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
        if self._compiled is None or not self.runs(x.shape):
            output = self.network(x, t)
        else:
            output = self._compiled(x, t)
            if not torch.is_grad_enabled():
                output = output.clone()  # a CUDA graph writes its next result in the same place
        return output

    def runs(self, shape: Sequence[int]) -> bool:
        """Whether a batch of this shape goes through what is compiled."""
        return self._shape is None or (self._compiled is not None and tuple(shape) == tuple(self._shape))

    def _compile(self, x: Tensor, t: Tensor) -> None:
        training = torch.is_grad_enabled()
        graphs = x.device.type == "cuda" and not training
        compiled = torch.compile(self.network.forward, dynamic=False, mode="reduce-overhead" if graphs else None)
        try:
            for _ in range(3 if graphs else 1):  # a graph is recorded at the second call and replayed at the third
                trial = compiled(x, t)
            if training:  # the backward pass is compiled apart; DDP's hooks are not called by this
                torch.autograd.grad(trial.sum(), list(self.network.parameters()))
            self._compiled = compiled
        except Exception as error:  # of a compiler any
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            say(f"note         torch.compile failed ({reason}); goes on without it, compile=false never tries")
