"""Building blocks of the U-Net."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resample = Literal["down", "up"] | None
Norm = Callable[[int], nn.GroupNorm]


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, faster on a CPU for small maps in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        last = x.device.type == "cpu" and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if last and x.shape[2] * x.shape[3] < 1024:  # where torch takes another way, 50 times slower in bf16
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def group_norm(channels: int, num_groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """32 groups as in ADM, or as many as divide a narrower or odd width."""
    return GroupNorm(math.gcd(num_groups, channels), channels, eps)


def zero_(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, channels: int, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """(B, channels) sinusoids of the 0-based timesteps t (B,) (Vaswani et al. 2017).

    ADM has cosines first and divides by half the channels; Ho et al. 2020 have sines first and divide by one less.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - freq_shift, 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None]
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


def resample(x: Tensor, mode: Resample) -> Tensor:
    """Halve by average pooling, double by nearest neighbour, or leave alone."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    if mode == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class ResBlock(nn.Module):
    """Two convolutions, the timestep between them (Ho et al. 2020; with scale_shift, Dhariwal and Nichol 2021).

    Args:
        channels: of the input.
        out_channels: of the output.
        embedding_channels: of the timestep embedding.
        scale_shift: the embedding scales and shifts after the second normalisation, else it is added before it.
        mode: "down" or "up" also halves or doubles the size.
        norm: makes the normalisation of so many channels.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = False,
        mode: Resample = None,
        norm: Norm = group_norm,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.mode = mode
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, channels, H, W), embedding (B, embedding_channels) -> (B, out_channels, H', W')."""
        h = self.conv1(resample(F.silu(self.norm1(x)), self.mode))
        e = self.embedding(F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = self.conv2(self.dropout(F.silu(h)))
        output: Tensor = self.skip(resample(x, self.mode)) + h
        return output


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map.

    Args:
        channels: of input and output.
        num_heads: divides channels.
        new_order: queries, keys and values are split before the heads, else after (ADM's two orders).
        norm: makes the normalisation of so many channels.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool = False, norm: Norm = group_norm) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x).flatten(2).mT)
        dim = channels // self.num_heads
        if self.new_order:
            q, k, v = qkv.reshape(batch, -1, 3, self.num_heads, dim).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.reshape(batch, -1, self.num_heads, 3, dim).permute(3, 0, 2, 1, 4)
        h = attend(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        output: Tensor = x + self.out(h).mT.reshape(batch, channels, height, width)
        return output


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, heads, N, D) each (Vaswani et al. 2017)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # What torch 2.8 to 2.14 fuse is seven times slower than this where gradients are kept.
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """Halve the size by a strided convolution.

    Args:
        channels: of input and output.
        padding: 1 on every side, or 0 on the near sides and 1 on the far ones (TensorFlow's "same", in Ho et al. 2020).
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        output: Tensor = self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))
        return output


class Upsample(nn.Module):
    """Double the size by nearest neighbour and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        output: Tensor = self.conv(resample(x, "up"))
        return output
