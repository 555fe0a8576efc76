"""Where the noise of a run comes from: one seed per image, a stream per use, never the global generator."""

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Stream = Literal["x_T", "sampler", "reference", "candidate"]


class NoiseSource(Protocol):
    """Gives standard normal noise; tests replay recorded noise through it."""

    def draw(self, stream: Stream, like: Tensor) -> Tensor:
        """The stream's next noise, with the shape, dtype and device of like (B, C, H, W)."""


class PerImageNoise:
    """Each image draws from generators of its own, so that it does not depend on the other images of its batch.

    x_T is drawn on the CPU, so that deterministic samplers start equally everywhere; what is drawn later, on the
    device that uses it.

    Args:
        seeds: one per image.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self._generators: dict[Stream, list[torch.Generator]] = {}

    def draw(self, stream: Stream, like: Tensor) -> Tensor:
        """Standard normal noise for every image, from its own generator.

        Raises:
            ValueError: the batch and the seeds differ in number.
        """
        if len(like) != len(self.seeds):
            raise ValueError(f"one seed per image is needed: got {len(self.seeds)} seeds for {len(like)} images")
        device = torch.device("cpu") if stream == "x_T" else like.device
        if stream not in self._generators:
            self._generators[stream] = [
                torch.Generator(device=device).manual_seed(derive_seed(seed, stream)) for seed in self.seeds
            ]
        shape = like.shape[1:]
        drawn = [torch.randn(shape, generator=g, device=device, dtype=like.dtype) for g in self._generators[stream]]
        return torch.stack(drawn).to(like.device)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed made from numbers and words: the same everywhere, unrelated for unequal parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def image_seed(run_seed: int, reference_sha256: str | None, sample: int) -> int:
    """The seed of one sample. Equal references give equal samples; unconditional samples use their index.

    Args:
        run_seed: the run's.
        reference_sha256: of the fitted 8-bit reference as the model sees it, or None without one.
        sample: the sample's number.
    """
    return derive_seed(run_seed, reference_sha256 or "unconditional", sample)
