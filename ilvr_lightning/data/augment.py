"""Augmentation: what each image of a training batch is changed by, from a seed of its own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.diffusion.noise import derive_seed


def training_seeds(seed: int, step: int, indices: Iterable[int]) -> list[int]:
    """The seeds of some images of a step's global batch, from which timestep, noise and augmentation of each follow.

    Args:
        seed: the run's.
        step: the optimizer step.
        indices: which images of the global batch.
    """
    return [derive_seed(seed, "train", step, index) for index in indices]


def augment(images: Tensor, seeds: Sequence[int], config: DataConfig) -> Tensor:
    """The images (B, C, H, W), each mirrored and turned by its own seed, as data.flip and data.rotate90 say."""

    def chosen(name: str, ways: int, way: int) -> Tensor:
        drawn = [derive_seed(seed, name) % ways == way for seed in seeds]
        return torch.tensor(drawn, device=images.device)[:, None, None, None]

    if config.mirrors != "none":
        images = torch.where(chosen("flip", 2, 1), images.flip(-1), images)
    if config.mirrors == "both":
        images = torch.where(chosen("flip vertically", 2, 1), images.flip(-2), images)
    if config.rotate90:
        turned = [images.rot90(quarters, (-2, -1)) for quarters in range(4)]
        for quarters in (1, 2, 3):
            images = torch.where(chosen("quarter turns", 4, quarters), turned[quarters], images)
    return images
