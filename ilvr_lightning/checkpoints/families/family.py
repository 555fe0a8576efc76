"""The interface of a checkpoint family: what loading, exporting and the help ask of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig

if TYPE_CHECKING:  # the help lists the families, and must not wait for torch
    from torch import Tensor

TensorDict: TypeAlias = "dict[str, Tensor]"
"""Weights by name."""

FileContent: TypeAlias = "str | tuple[TensorDict, dict[str, str]]"
"""The content of an exported file: its text, or weights and the metadata that a .safetensors file has beside them."""

FileVersion = tuple[int, int, int, int]
"""What file_version gives."""

ParameterNames = dict[str, tuple[str, ...]]
"""For each parameter of UNet its name in the file; three names where UNet stacks queries, keys and values."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """The weights of one checkpoint file, and what else the file says."""

    path: Path
    tensors: "Mapping[str, Tensor]" = field(repr=False)
    """The weights by name, mapped from the file where its format allows it."""
    has_ema: bool | None = None
    """Whether the file holds an average of the weights; None where it does not say."""
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Everything that a checkpoint of torch holds, where that is a dict."""
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The metadata of a safetensors file."""
    version: FileVersion | None = field(default=None, repr=False)
    """The version of the file that was read, as file_version gives it."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight."""
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def check_unchanged(self) -> None:
        """Raise a UserError if the file was replaced or written since it was opened."""
        if self.version is not None and file_version(self.path) != self.version:
            raise UserError(f"{self.path} changed while it was read (is a run saving there?); try again")


def file_version(path: Path) -> FileVersion:
    """(device, inode, size, time of the last change): one of them changes when a file is replaced or written again.

    Raises:
        UserError: there is no such file.
    """
    try:
        if not path.is_file():  # a pipe or a device may never end
            raise FileNotFoundError
        stat = path.stat()
    except (OSError, ValueError):
        raise UserError(f"there is no checkpoint {str(path)[:300]!r}; give a file or a folder of weights") from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class Family(ABC):
    """One layout of checkpoints. Only unconditional networks that UNet can be are described; others are refused."""

    name: str
    """The family's key in FAMILIES."""
    loads: str
    """What it loads, for the help and for refusals."""
    overridable: Mapping[str, type] = {}
    """The settings that its files do not contain, under ADM's flag names, with their types."""
    export_name: str | None = None
    """The word after `export --to`; None if the family is not written."""
    writes: str = ""
    """What OUT becomes, for the help of `export`."""

    @abstractmethod
    def recognises(self, state: StateDict) -> bool:
        """Whether a file belongs to the family, by its names and metadata alone."""

    @abstractmethod
    def describe(self, state: StateDict, overrides: Overrides) -> ModelDescription:
        """The hyper-parameters, from the file and the overrides.

        Raises:
            ValueError: UNet cannot be this network. (A damaged file may raise anything.)
        """

    def names(self, parameters: Iterable[str], config: UNetConfig, in_file: Collection[str] = ()) -> ParameterNames:
        """The file's names, given UNet's, the architecture, and, where spellings differ, every name in the file."""
        return {name: (name,) for name in parameters}

    def weights_in(self, folder: Path) -> Path | None:
        """The file of weights in a folder of this family; None for other folders."""
        return None

    def settings_files(self, path: Path) -> tuple[Path, ...]:
        """The files beside the weights that describe() reads."""
        return ()

    def exported_files(self, description: ModelDescription, weights: TensorDict, out: Path) -> dict[Path, FileContent]:
        """The files to write, given the weights under UNet's names, and OUT; for families with an export_name.

        Raises:
            UserError: the format cannot express this network.
        """
        raise NotImplementedError

    def overrides_for(self, description: ModelDescription, weights: TensorDict) -> dict[str, Any]:
        """The overrides without which an exported file would be read as another network."""
        return {}
