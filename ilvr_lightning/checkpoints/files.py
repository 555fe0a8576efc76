"""Reading checkpoint files: each is opened once, memory-mapped, and nothing in it is executed."""

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ilvr_lightning.checkpoints.families.family import StateDict, file_version
from ilvr_lightning.errors import UserError, first_line

Weights = Literal["ema", "raw"]

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

ZIP_START = b"PK\x03\x04"
"""A zip file, and so a checkpoint of torch since 1.6, begins with these bytes."""

OLD_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""Checkpoints from before torch 1.6 have this number within their first bytes."""


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles, which are refused
            content, metadata = _open(path)
    except Exception as error:  # torch's unpickler raises anything on damaged files
        raise UserError(f"{path} is no checkpoint, or it is damaged: {_reason(error)}") from None
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


def is_intact(path: Path) -> bool:
    """Whether a file is a complete checkpoint of torch 1.6 or later, each byte as its checksums say."""
    try:
        if not path.is_file():  # a pipe may never end
            return False
        with zipfile.ZipFile(path) as file:
            # What is compressed cannot be mapped, and torch does not write it.
            return all(e.compress_type == zipfile.ZIP_STORED for e in file.infolist()) and file.testzip() is None
    except Exception:  # zipfile raises anything on damaged files
        return False


def _open(path: Path) -> tuple[Any, dict[str, str]]:
    """The content of a file, and the metadata of safetensors."""
    with path.open("rb") as file:
        start = file.read(32)
        file.seek(0)
        if start.startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer; get the file itself with git lfs pull")
        if start.startswith(ZIP_START):
            if not is_intact(path):
                raise ValueError("its end is missing, or a checksum is wrong; download it again")
            # torch.load maps files that it opens by itself, and takes every .safetensors for one.
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True), {}
        elif start[8:9] == b"{":  # the length of a JSON header, and the header
            with safe_open(path, framework="pt") as opened:
                return load_file(path), opened.metadata() or {}
        elif OLD_TORCH_MAGIC not in start:
            raise ValueError("its format is neither torch's nor safetensors'")
        return torch.load(file, map_location="cpu", weights_only=True), {}


def _reason(error: Exception) -> str:
    """Why a file could not be opened, in one line."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error, 120)
    named = re.search(r"GLOBAL (\S+)|global (\S+) was not|class (\S+) was not", str(error))
    what = f" ({named[1] or named[2] or named[3]})" if named else ""
    return f"it cannot be opened safely, as it holds other things than tensors and plain values{what}"


def _find_state_dict(path: Path, content: Any, weights: Weights) -> tuple[dict[str, Tensor], bool | None]:
    """The state dict of a file, and whether the file holds an average (None: unknown).

    It is all of the content, or lies under a name of AVERAGES or WRAPPERS.
    """
    if _is_state_dict(content):
        return content, None
    found = f"the keys {', '.join(map(str, content))[:120]}" if isinstance(content, dict) else type(content).__name__
    if isinstance(content, list | tuple) and content and _is_state_dict(content[0]):
        # The training states of the DDIM repository: model, optimizer, epoch, step and, perhaps, the average.
        average = {"ema": content[-1]} if len(content) > 1 and _is_state_dict(content[-1]) else {}
        content = {"model": content[0], **average}
    if isinstance(content, dict):
        averages = [name for name in AVERAGES if name in content]
        for name in averages if averages and weights == "ema" else WRAPPERS[weights]:
            if _is_state_dict(state := content.get(name)):
                return state, bool(averages) or "current_model_state" in content
        if any(_is_state_dict(value) for value in content.values()):
            other = "raw" if weights == "ema" else "ema"
            raise UserError(
                f"{path} holds no {weights} weights that can be loaded: found {found}; give --weights {other}"
            )
    raise UserError(
        f"{path} is no checkpoint that loads: found {found}; "
        "python -m ilvr_lightning.checkpoints inspect --help lists what loads"
    )


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
            raise UserError(
                f"{path}: the weight {name[:100]} is {kind}; only plain floating-point weights can be loaded"
            )
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
