"""The interface of a checkpoint family: what loading, exporting and the help ask of it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.models.config import UNetConfig

if TYPE_CHECKING:  # the help lists the families, and must not wait for torch
    from torch import Tensor

    from ilvr_lightning.checkpoints.files import StateDict

TensorDict: TypeAlias = "dict[str, Tensor]"
"""Weights by name."""

FileContent: TypeAlias = "str | tuple[TensorDict, dict[str, str]]"
"""The content of an exported file: its text, or weights and the metadata that a .safetensors file has beside them."""

ParameterNames = dict[str, tuple[str, ...]]
"""For each parameter of UNet its name in the file; three names where UNet stacks queries, keys and values."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A format that `export --to` writes."""

    name: str
    """The word after --to."""
    writes: str
    """What OUT becomes, for the help."""
    refusal: Callable[[ModelDescription], str | None]
    """The reason why the format cannot express a network; None if it can."""
    files: Callable[[ModelDescription, TensorDict, Path], dict[Path, FileContent]]
    """The files to write, given the description, the weights under UNet's names, and OUT."""
    note: Callable[[ModelDescription, TensorDict], str | None] = lambda description, weights: None
    """What must be known to read the exported file; None if nothing."""
    keeps_gains: bool = False
    """Whether the format keeps the octave_gains of a calibration."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One layout of checkpoints. Only unconditional networks that UNet can be are described; others are refused."""

    name: str
    """The family's key in FAMILIES."""
    loads: str
    """What it loads, for the help and for refusals."""
    recognises: Callable[["StateDict"], bool]
    """Whether a file belongs to the family, by its names and metadata alone."""
    describe: Callable[["StateDict", Overrides], ModelDescription]
    """The hyper-parameters, from the file and the overrides. Raises a UserError for a network that UNet cannot be."""
    parameter_names: Callable[[Iterable[str], UNetConfig, Collection[str]], ParameterNames]
    """The file's names, given UNet's names, the architecture, and every name in the file (for families with several
    spellings)."""
    overridable: Mapping[str, type] = field(default_factory=dict)
    """The settings that its files do not contain, under ADM's flag names, with their types."""
    weights_in: Callable[[Path], Path | None] = lambda folder: None
    """The file of weights in a folder of this family; None for other folders."""
    settings_files: Callable[[Path], tuple[Path, ...]] = lambda path: ()
    """The files beside the weights that describe() reads."""
    export: Export | None = None
    """How it is written; None if it is not."""
