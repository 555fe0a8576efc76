"""The tint of unconditional samples: how far their mean colour is from that of the training images."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ilvr_lightning.metrics.intervals import Figure

CHANNELS = {1: ("grey",), 3: ("red", "green", "blue")}
LEVELS = 127.5
"""Values in [-1, 1] times this are levels of 8 bits."""
ENOUGH = 10_000
"""The colours of so many training images are averaged."""
CERTAIN = 2.0
"""A difference of more than so many half-widths of its 95% interval is taken to be no chance."""


@dataclass(frozen=True)
class Tint:
    """Mean colour of samples minus that of the training images, in levels of 255 by channel."""

    channels: dict[str, Figure]

    @property
    def size(self) -> float:
        """Root mean square over the channels."""
        return math.sqrt(sum(each.value**2 for each in self.channels.values()) / len(self.channels))

    @property
    def is_certain(self) -> bool:
        """Whether a channel's difference is more than chance."""
        return any(abs(each.value) > CERTAIN * each.margin for each in self.channels.values())

    def metrics(self) -> dict[str, float]:
        """What is logged: the size, and for each channel the difference and the half-width of its 95% interval."""
        found = {"samples/tint": self.size}
        for name, each in self.channels.items():
            found |= {f"samples/tint_{name}": each.value, f"samples/tint_{name}_interval": each.margin}
        return found

    def __str__(self) -> str:
        return ", ".join(f"{name} {each.value:+.0f} ±{each.margin:.0f}" for name, each in self.channels.items())


class ColourMeans:
    """The mean colour of training images, of the first ENOUGH that pass by."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None  # (2, C): of the images' means and of their squares

    def add(self, batch: Any) -> None:
        """Count the images of a training batch, batch["image"] (B, C, H, W) in [-1, 1]; other batches are ignored."""
        images = batch.get("image") if isinstance(batch, dict) and self._count < ENOUGH else None
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in CHANNELS:
            return
        means = images.detach().float().mean((2, 3))
        sums = torch.stack([means.sum(0), means.square().sum(0)])
        self._sums, self._count = sums if self._sums is None else self._sums + sums, self._count + len(images)

    def tint(self, samples: Tensor) -> Tint | None:
        """The tint of samples (B, C, H, W) in [-1, 1]; None of fewer than two images."""
        if self._sums is None or min(self._count, len(samples)) < 2 or samples.shape[1] != self._sums.shape[1]:
            return None
        mean, square = self._sums.cpu().double() / self._count
        means = samples.cpu().double().mean((2, 3))
        variance = means.var(0) / len(means) + (square - mean.square()).clamp(min=0) / self._count
        difference, error = (means.mean(0) - mean) * LEVELS, variance.sqrt() * LEVELS
        return Tint(
            {
                name: Figure(value=float(d), error=float(e), degrees=len(means) - 1)
                for name, d, e in zip(CHANNELS[len(difference)], difference, error, strict=True)
            }
        )
