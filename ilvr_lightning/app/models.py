"""The checkpoints that the page lets one choose from, loaded when they are first used."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ilvr_lightning.checkpoints.find import DEFAULT_MODEL, bundled_models, find_checkpoint, newest_checkpoint
from ilvr_lightning.checkpoints.load import LoadedDenoiser, identify, load_denoiser
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.hardware import choose_device, fast_bf16
from ilvr_lightning.sampling.module import ILVRSampler

MAX_LOADED = 3
"""So many models are kept in memory; of more, the one that was used longest ago is loaded again."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded checkpoint."""

    denoiser: LoadedDenoiser
    sampler: ILVRSampler
    shape: tuple[int, int, int]
    """(C, H, W) of its images."""
    sha256: str

    @property
    def timesteps(self) -> int:
        """T, the number of its timesteps."""
        return self.denoiser.schedule.num_timesteps

    @property
    def factors(self) -> list[int]:
        """The values of N that its image size allows, ascending, without 1, which copies the reference."""
        _, height, width = self.shape
        return [n for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0] or [1]


class Models:
    """The checkpoints by the names that the page shows.

    Args:
        given: checkpoints as --ckpt takes them; none for the newest run's and the bundled ones.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: one of them does not load, there is none, or there is no such device.
    """

    def __init__(self, given: Sequence[str], device: str = "auto") -> None:
        names = list(dict.fromkeys(given)) or _default_names()
        self._paths = {name: find_checkpoint(name) for name in names}
        for path in self._paths.values():
            identify(path)
        self._device = _device(device)
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._hashes: dict[str, str] = {}
        self._lock = threading.RLock()
        self.load(self.names[0])

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were given."""
        return list(self._paths)

    def load(self, name: str) -> Model:
        """A model by its name.

        Raises:
            UserError: there is none of the name, or its file has changed and no longer loads.
        """
        with self._lock:
            if name not in self._paths:
                raise UserError(f"there is no model {name!r:.100} here; choose one of the list")
            model = self._loaded.pop(name, None) or self._load(name)
            self._loaded[name] = model
            if len(self._loaded) > MAX_LOADED:
                self._loaded.popitem(last=False)
            return model

    def sha256(self, name: str) -> str:
        """The hash of a model's checkpoint."""
        with self._lock:
            if name not in self._hashes:
                self._hashes[name] = identify(self._paths[name]).sha256
            return self._hashes[name]

    def _load(self, name: str) -> Model:
        denoiser = load_denoiser(self._paths[name], say=None)
        precision = "bf16" if fast_bf16(self._device) else "32"
        # A compiler would take longer than all that a visitor draws.
        sampler = ILVRSampler(denoiser, denoiser.image_shape, precision, False, self._device)
        return Model(
            denoiser=denoiser,
            sampler=sampler.to(self._device),
            shape=denoiser.image_shape,
            sha256=self.sha256(name),
        )


def _default_names() -> list[str]:
    newest = newest_checkpoint(Path("runs"))
    bundled = sorted(bundled_models(), key=lambda name: name != DEFAULT_MODEL)
    names = [str(newest)] * (newest is not None) + bundled
    if not names:
        raise UserError("--ckpt is missing, and there is no run under runs/: give a checkpoint, or train a model")
    return names


def _device(kind: str) -> torch.device:
    device = torch.device(choose_device(kind))
    torch.backends.cudnn.allow_tf32 = False  # as sample.py has it
    return device
