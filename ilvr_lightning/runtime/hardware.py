"""Precision, memory format and compilation by the hardware. docs/speed.md has the measurements behind each choice."""

import copy
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.command import say

Compile = Literal["auto", True, False]
CHANNELS_LAST_FROM = 128
"""From this width on (model.channels), training on a CPU is faster in the memory format channels_last."""


def number_of_devices() -> dict[str, int]:
    """How many devices of each kind this machine has, the fastest kind first."""
    return {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}


def choose_device(asked: str, kinds: Sequence[str] = ("cuda", "mps", "cpu")) -> str:
    """The kind of device for --device.

    Args:
        asked: auto, cpu, cuda or mps.
        kinds: what auto may choose, the first that this machine has.

    Raises:
        UserError: this machine has none of the kind.
    """
    there = number_of_devices()
    if asked == "auto":
        return next((kind for kind in kinds if there.get(kind)), "cpu")
    if not there[asked]:
        raise UserError(f"--device {asked}: this machine has none; give --device cpu")
    return asked


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32: on GPUs since Ampere, and on CPUs with AVX512-BF16 or AMX."""
    supported: bool = False
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        supported = torch.cpu._is_avx512_bf16_supported()
    return supported


def training_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """The precision of a training run unless one is given: bf16-mixed where bfloat16 is fast, else 32-true."""
    kinds = {"gpu": ("cuda", "mps"), "auto": ("cuda", "mps", "cpu")}.get(accelerator, (accelerator,))
    return "bf16-mixed" if fast_bf16(torch.device(choose_device("auto", kinds))) else "32-true"


def sampling_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether the network samples in bfloat16; auto means on a GPU where bfloat16 is fast."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and fast_bf16(device))


def peak_memory(device: torch.device) -> int:
    """The most bytes that were allocated on a GPU of NVIDIA; elsewhere the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def use_channels_last(network: UNet, device: torch.device) -> None:
    """Give the weights the memory format in which training is fastest, before they are moved or wrapped."""
    # On a CPU the backward pass of the normalisation is slower in it and that of the convolutions faster.
    if device.type == "cuda" or (device.type == "cpu" and network.config.channels >= CHANNELS_LAST_FROM):
        network.to(memory_format=torch.channels_last)


def cast_for_sampling(network: UNet, bf16: bool) -> None:
    """Cast the weights once, so that no evaluation casts them, in the memory format that goes with bfloat16."""
    if bf16:
        network.to(torch.bfloat16).to(memory_format=torch.channels_last)


def fastest_copy(network: UNet, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The forward pass of a network that is on a device, of a copy in bfloat16 where that is faster."""
    if not fast_bf16(device):
        return network
    copied = copy.deepcopy(network)
    cast_for_sampling(copied, bf16=True)

    def forward(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = copied(x.to(torch.bfloat16), t)
        return output

    return forward


def restore_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments of a loaded optimizer the memory format of their weights: fused steps silently rely on it."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


WORTH_COMPILING = 5000
"""On a GPU compilation takes 20 to 100 s, and saves about 10 ms per pass (docs/speed.md)."""


def should_compile(asked: Compile, device: torch.device, passes: float) -> bool:
    """Whether to compile the network: as asked; auto means on a GPU, in a run of so many passes that it pays."""
    return device.type == "cuda" and passes >= WORTH_COMPILING if asked == "auto" else asked


class CompiledForward:
    """A network's forward pass, compiled for the first shape that it is given; other shapes run uncompiled.

    The module itself stays as it is, so that its state dict keeps its names. Where torch.compile fails, one line says
    so and everything runs uncompiled.

    Args:
        network: what to compile.
        cuda_graphs: replay the pass as a CUDA graph, which only inference can do.
    """

    def __init__(self, network: nn.Module, cuda_graphs: bool = False) -> None:
        self.network = network
        self.shape: torch.Size | None = None
        """(B, C, H, W) that the pass is compiled for; None before the first call."""
        mode = "reduce-overhead" if cuda_graphs else None
        self._compiled: Callable[..., Any] | None = torch.compile(network.forward, dynamic=False, mode=mode)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output for x (B, C, H, W) and 0-based timesteps t (B,)."""
        self.shape = self.shape or x.shape
        if self._compiled is not None and self.runs_compiled(x.shape):
            try:
                output: Tensor = self._compiled(x, t)
                # A CUDA graph writes its next result into the same memory.
                return output if torch.is_grad_enabled() else output.clone()
            except Exception as error:  # a compiler may raise anything
                say(f"note         torch.compile failed ({first_line(error)}), and the run continues without it. "
                    "compile=false (--compile false) skips the attempt")  # fmt: skip
                self._compiled = None
        output = self.network(x, t)
        return output

    def runs_compiled(self, shape: tuple[int, ...]) -> bool:
        """Whether a batch of this shape (B, C, H, W) runs through the compiled pass."""
        return self._compiled is not None and self.shape is not None and tuple(shape) == tuple(self.shape)
