"""Which N a reference fits at, for sample.py: what --check prints and --factor auto takes."""

from collections.abc import Sequence

import torch

from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.errors import UserError
from ilvr_lightning.metrics.fit import Fit, check_reference, recommend
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.hardware import choose_device

HOW = "python -m ilvr_lightning.checkpoints export CKPT --to safetensors OUT --check-images HELD_OUT_IMAGES"
"""The command that gives a checkpoint the scores that it lacks."""


class Checker:
    """check_reference for References, on a device.

    Args:
        denoiser: with the scores of its calibration.
        device: auto, cpu, cuda or mps.
        factors: N; None takes all that were calibrated.

    Raises:
        UserError: it has no scores, or this machine has no such device.
    """

    def __init__(self, denoiser: LoadedDenoiser, device: str, factors: Sequence[int] | None = None) -> None:
        if not denoiser.fit_scores:
            raise UserError(f"the checkpoint holds no scores of held-out images to compare with; {HOW} adds them")
        self._device = torch.device(choose_device(device))
        denoiser.network.to(self._device)
        self._denoiser: Denoiser = denoiser.fastest()
        self._factors = factors

    def __call__(self, reference: Reference) -> list[Fit]:
        """Whether a reference fits, for each factor. A mask does not count: all of the reference is checked.

        Raises:
            UserError: there are no scores for these factors or this size of images.
        """
        try:
            return check_reference(self._denoiser, reference.tensor[None].to(self._device), self._factors)
        except ValueError as error:
            raise UserError(f"{error}; {HOW} adds scores") from None


def choose_factors(denoiser: LoadedDenoiser, references: Sequence[Reference], device: str, otherwise: int) -> list[int]:
    """--factor auto: the N that is advised for each reference, said in a line each.

    Args:
        denoiser: with the scores of its calibration.
        references: fitted.
        device: auto, cpu, cuda or mps.
        otherwise: the N of a reference that is followed in parts alone, which cannot be checked.

    Raises:
        UserError: the checkpoint holds no scores, or scores of another size of images.
    """
    checker, chosen = Checker(denoiser, device), []
    for reference in references:
        if reference.mask is not None:
            chosen.append(otherwise)
            say(f"factor       {reference.name}: N={otherwise}; it has a mask, and only whole references are checked")
            continue
        factor, words = recommend(checker(reference), (reference.tensor.shape[1], reference.tensor.shape[2]))
        chosen.append(factor)
        say(f"factor       {reference.name}: {words}")
    return chosen
