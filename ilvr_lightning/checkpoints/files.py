"""Reading checkpoint files: each is opened once, memory-mapped, and nothing in it is executed."""

import math
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ilvr_lightning.errors import UserError, first_line

Weights = Literal["ema", "raw"]
Shape = tuple[int, ...]
FileVersion = tuple[int, int, int, int]

AVERAGES = ("ema", "ema_state_dict")
"""Third-party files keep the average of the weights under these names, beside the raw weights."""

WRAPPERS: dict[Weights, tuple[str, ...]] = {
    "ema": ("state_dict", "model"),
    "raw": ("model", "current_model_state", "state_dict"),
}
"""Files keep a state dict under these names, the preferred one first. Lightning's WeightAveraging puts the average
under state_dict and the raw weights under current_model_state."""

PREFIXES = ("module.", "network.", "model.", "_orig_mod.")
"""Training code puts these before every name; they are removed."""

READ_ERRORS = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
    AssertionError, RecursionError, SafetensorError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Damaged or hostile files make their readers raise these errors."""

WHAT_LOADS_HINT = "python -m ilvr_lightning.checkpoints inspect --help lists what loads"
"""Messages end with this where a file is of no known kind."""

ZIP_START = b"PK\x03\x04"
"""A zip file, and so a checkpoint of torch since 1.6, begins with these bytes."""

OLD_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""Checkpoints from before torch 1.6 have this number within their first bytes."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """The weights of one checkpoint file, and what else the file says."""

    path: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
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
    def shapes(self) -> dict[str, Shape]:
        """The shape of each weight."""
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def check_unchanged(self) -> None:
        """Raise a UserError if the file was replaced or written since it was opened."""
        if self.version is not None and file_version(self.path) != self.version:
            raise UserError(f"{self.path} changed while it was read (is a run saving there?); try again")


def read_weights(path: Path, weights: Weights = "ema") -> StateDict:
    """Open a checkpoint of torch or safetensors, recognised by its content, and find its state dict.

    Tensors are mapped: no weight is in memory before it is used. (Files from before torch 1.6 cannot be mapped.)

    Args:
        path: the file.
        weights: the average or the raw weights, where the file holds both.

    Raises:
        UserError: the file is missing, damaged, would execute something, holds no such weights, or holds weights that
            are no plain floating-point tensors.
    """
    version = file_version(path)
    content, metadata = _open(path)
    tensors, has_ema = _find_state_dict(path, content, weights)
    _check_tensors(path, tensors)
    return StateDict(
        path=path,
        tensors=_without_prefix(tensors),
        has_ema=has_ema,
        content=content if isinstance(content, dict) else {},
        metadata=metadata,
        version=version,
    )


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


def is_intact(path: Path) -> bool:
    """Whether a file is a complete checkpoint of torch 1.6 or later, each byte as its checksums say."""
    try:
        if not path.is_file():  # a pipe may never end
            return False
        with zipfile.ZipFile(path) as file:
            # What is compressed cannot be mapped, and torch does not write it.
            return all(e.compress_type == zipfile.ZIP_STORED for e in file.infolist()) and file.testzip() is None
    except READ_ERRORS:
        return False


def _open(path: Path) -> tuple[Any, dict[str, str]]:
    """The content of a file, and the metadata of safetensors."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles, which are refused
            start = file.read(32)
            file.seek(0)
            if start.startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a Git LFS pointer to a checkpoint; fetch the file itself with git lfs pull")
            if start.startswith(ZIP_START):
                if not zipfile.is_zipfile(path):
                    raise UserError(f"{path} is no checkpoint, or a truncated one: its end is missing; fetch it again")
                if not is_intact(path):
                    raise UserError(f"{path} is no checkpoint, or a damaged one: a checksum is wrong; fetch it again")
                # torch.load maps files that it opens by itself, and takes every .safetensors for one.
                if path.suffix != ".safetensors":
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True), {}
            elif start[8:9] == b"{":  # the length of a JSON header, and the header
                with safe_open(path, framework="pt") as opened:
                    return load_file(path), opened.metadata() or {}
            elif OLD_TORCH_MAGIC not in start:
                raise ValueError("its format is neither torch's nor safetensors'")
            return torch.load(file, map_location="cpu", weights_only=True), {}
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|global (\S+) was not|class (\S+) was not", str(error))
        what = f" ({named[1] or named[2] or named[3]})" if named else ""
        raise UserError(
            f"{path} is no checkpoint that can be opened safely: it holds other things than tensors and plain "
            f"values{what}, or is damaged"
        ) from None
    except MemoryError:
        raise UserError(
            f"{path} is no checkpoint, or a damaged one: it asks for more memory than this machine has"
        ) from None
    except Exception as error:  # torch's unpickler raises anything on damaged files
        raise UserError(f"{path} is no checkpoint, or a damaged one ({first_line(error, 120)})") from None


def _find_state_dict(path: Path, content: Any, weights: Weights) -> tuple[dict[str, Tensor], bool | None]:
    """The state dict of a file, and whether it holds an average (None: unknown).

    It is all of the content, lies under a name of AVERAGES or WRAPPERS, or is the first (ema: the last) of a list.
    """
    if _is_state_dict(content):
        return content, None
    found = type(content).__name__
    if isinstance(content, dict):
        found = f"the keys {', '.join(map(str, content))[:120]}"
        averages = [name for name in AVERAGES if name in content]
        has_ema = bool(averages) or "current_model_state" in content
        for name in averages if averages and weights == "ema" else WRAPPERS[weights]:
            if _is_state_dict(state := content.get(name)):
                return state, has_ema
        if any(_is_state_dict(value) for value in content.values()):
            other = "raw" if weights == "ema" else "ema"
            raise UserError(f"{path} holds no {weights} weights that load: found {found}; give --weights {other}")
    if isinstance(content, list | tuple) and content and _is_state_dict(content[0]):
        # The training states of the DDIM repository: model, optimizer, epoch, step and, perhaps, the average.
        has_ema = len(content) > 1 and _is_state_dict(content[-1])
        return content[-1 if weights == "ema" and has_ema else 0], has_ema
    raise UserError(f"{path} is no checkpoint that loads: found {found}; {WHAT_LOADS_HINT}")


def _is_state_dict(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether something is a dict of names and tensors."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise a UserError for weights of another kind, or that claim more numbers than the file holds."""
    for name, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or not value.is_floating_point():
            kind = "on no device" if value.is_meta else f"{value.layout}, {value.dtype}".replace("torch.", "")
            raise UserError(f"{path}: the weight {name[:100]} is {kind}; plain floating-point weights load")
    claimed = sum(math.prod(value.shape) * value.element_size() for value in state.values())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if claimed > sum(storages.values()):
        raise UserError(
            f"{path}: the weights claim {claimed:,} bytes, but the file holds {sum(storages.values()):,} for them"
        )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what training code puts before every name."""
    # A LightningModule of this project has its network under this name, whatever else it holds.
    state = {name: value for name, value in state.items() if name.startswith("network.")} or state
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
