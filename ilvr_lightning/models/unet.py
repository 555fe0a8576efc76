"""One U-Net for Ho et al. 2020, improved-diffusion and ADM (Dhariwal and Nichol 2021)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilvr_lightning.models.blocks import (
    Attention,
    Downsample,
    Resample,
    ResBlock,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_,
)
from ilvr_lightning.models.config import UNetConfig


class Stage(nn.Module):
    """What lies between two skip connections: a residual block, attention perhaps, a resampling perhaps."""

    def __init__(
        self, block: nn.Module, attention: nn.Module | None = None, resampler: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.resampler = resampler

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C', H', W')."""
        if isinstance(self.block, ResBlock):
            x = self.block(x, embedding)
        else:
            x = self.block(x)
        if self.attention is not None:
            x = self.attention(x)
        if isinstance(self.resampler, ResBlock):
            x = self.resampler(x, embedding)
        elif self.resampler is not None:
            x = self.resampler(x)
        return x


class UNet(nn.Module):
    """The denoising network.

    Args:
        config: the architecture.
        image_size: height and width in pixels that it is trained at; says where attention goes. Other sizes that
            its levels divide run too.
        image_channels: 3, or 1 for greyscale.

    Raises:
        ValueError: the levels do not divide the size, or the heads do not divide the channels.
    """

    def __init__(self, config: UNetConfig, image_size: tuple[int, int], image_channels: int = 3) -> None:
        super().__init__()
        config.check_size(*image_size)
        self.config = config
        self.image_size = image_size
        self.image_channels = image_channels
        self.out_channels = image_channels * (2 if config.learn_sigma else 1)
        self._embedding_channels = 4 * config.channels
        self._norm = functools.partial(group_norm, num_groups=config.norm_num_groups, eps=config.norm_eps)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.channels, self._embedding_channels),
            nn.SiLU(),
            nn.Linear(self._embedding_channels, self._embedding_channels),
        )

        height = image_size[0]
        widths = [config.channels * mult for mult in config.channel_mult]
        channels = widths[0]
        self.encoder = nn.ModuleList([Stage(nn.Conv2d(image_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.encoder.append(Stage(self._res(channels, width), self._attention(width, height)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.encoder.append(Stage(self._resampler(channels, "down")))
                skips.append(channels)
                height //= 2
        self.middle = nn.ModuleList(
            [Stage(self._res(channels, channels), self._heads(channels)), Stage(self._res(channels, channels))]
        )
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                up = level > 0 and i == config.num_res_blocks
                self.decoder.append(
                    Stage(
                        self._res(channels + skips.pop(), width),
                        self._attention(width, height),
                        self._resampler(width, "up") if up else None,
                    )
                )
                channels = width
            height *= 2
        self.norm = self._norm(channels)
        self.out = zero_(nn.Conv2d(channels, self.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, H, W), 0-based timesteps t (B,) -> (B, C, H, W), or (B, 2C, H, W) with a learned variance."""
        embedding = self.time_embedding(self._sinusoids(t).to(x.dtype))
        h = x
        skips = []
        for stage in self.encoder:
            h = stage(h, embedding)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        output: Tensor = self.out(F.silu(self.norm(h)))
        return output

    def _sinusoids(self, t: Tensor) -> Tensor:
        c = self.config
        scaled = t if c.timestep_scale == 1 else t * c.timestep_scale
        return timestep_embedding(scaled, c.channels, c.flip_sin_to_cos, c.freq_shift)

    def _res(self, channels: int, out_channels: int, mode: Resample = None) -> ResBlock:
        return ResBlock(
            channels,
            out_channels,
            self._embedding_channels,
            dropout=self.config.dropout,
            scale_shift=self.config.use_scale_shift_norm,
            mode=mode,
            norm=self._norm,
        )

    def _resampler(self, channels: int, mode: Resample) -> nn.Module:
        if self.config.resblock_updown:
            return self._res(channels, channels, mode)
        return Downsample(channels, self.config.downsample_padding) if mode == "down" else Upsample(channels)

    def _attention(self, channels: int, height: int) -> Attention | None:
        return self._heads(channels) if height in self.config.attention_resolutions else None

    def _heads(self, channels: int) -> Attention:
        config = self.config
        return Attention(channels, config.heads(channels), config.use_new_attention_order, self._norm)
