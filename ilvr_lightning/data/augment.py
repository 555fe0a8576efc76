"""Augmentation: what each image of a training batch is changed by, from a seed of its own."""

from collections.abc import Iterable

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


def augment(images: Tensor, seeds: list[int], config: DataConfig) -> Tensor:
    """(B, C, H, W) images as the network is trained on them, each changed by what its seed says."""
    if not config.flip:
        return images
    flip = torch.tensor([derive_seed(seed, "flip") % 2 == 1 for seed in seeds], device=images.device)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)
