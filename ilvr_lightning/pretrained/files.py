"""Files of weights: opened without executing anything, read by memory map, never held twice."""

import json
import math
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ilvr_lightning.errors import UserError

Weights = Literal["ema", "raw"]
Shape = tuple[int, ...]

WRAPPERS: dict[Weights, tuple[str, ...]] = {
    "ema": ("ema", "ema_state_dict", "state_dict", "model"),
    "raw": ("model", "current_model_state", "state_dict"),
}
"""Names under which files keep a state dict, the preferred first."""
PREFIXES = ("module.", "network.", "model.", "_orig_mod.")
"""What training code puts before every key."""
PIECES = 16
"""A file is read in so many parts, so that what is mapped beside the network stays small."""


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """One state dict of a file: names and shapes now, tensors when asked for."""

    path: Path
    keys: tuple[str | int, ...] = ()
    """The way to it within the file's content."""
    prefix: str = ""
    """Taken off every name."""
    shapes: Mapping[str, Shape] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of a safetensors file."""
    has_ema: bool | None = None
    """Whether the file has an average; None: it does not tell."""

    def pieces(self) -> Iterator[dict[str, Tensor]]:
        """The tensors, some at a time: a mapping's pages stay in memory as long as it does, so each part has its own.

        Files from before PyTorch 1.6, which cannot be mapped, come whole.
        """
        mapped = is_safetensors(self.path) or zipfile.is_zipfile(self.path)
        _check_sums(self.path)
        for names in _parts(self.shapes, PIECES if mapped else 1):
            state = self.within(read_content(self.path))
            yield {name: state[self.prefix + name] for name in names}
            del state

    def within(self, content: Any) -> Any:
        """The state dict within the file's content."""
        for key in self.keys:
            content = content[key]
        return content


def _check_sums(path: Path) -> None:
    """Raise a UserError for a zip file with a flipped bit; mapping it would not notice."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, zlib.error, NotImplementedError) as error:
            broken = _first_line(error)
        if broken is not None:
            raise UserError(
                f"{path} is no checkpoint, or a damaged one (a checksum is wrong: {broken}); fetch it again"
            )


def _parts(shapes: Mapping[str, Shape], count: int) -> list[list[str]]:
    """Names in parts of about equal size."""
    whole = sum(math.prod(shape) for shape in shapes.values())
    parts: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size * count >= whole * len(parts):
            parts.append([])
        parts[-1].append(name)
        size += math.prod(shape)
    return parts


def read_content(path: Path) -> Any:
    """What a file holds, its tensors mapped where the format allows.

    Raises:
        UserError: the file is missing, damaged, or would execute something.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is a damaged safetensors file ({_first_line(error)})") from None
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint, or a truncated one: the end of the file is missing; fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|global (\S+) was not|class (\S+) was not", str(error))
        what = f" ({named[1] or named[2] or named[3]})" if named else ""
        raise UserError(
            f"{path} is no checkpoint that can be opened safely: it holds other things than tensors and plain "
            f"values{what}, or is damaged"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no checkpoint, or a damaged one ({_first_line(error)})") from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK"


def state_dict_of(path: Path, content: Any, weights: Weights) -> StateDict:
    """The state dict of a file's content: bare, under one of WRAPPERS, or first (ema: last) in a list.

    Raises:
        UserError: there is none, or not the one asked for.
    """
    state = _find(path, content, weights)
    names = list(state.shapes)
    prefix = ""
    while stripped := next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in names)), None):
        prefix += stripped
    return StateDict(
        path=path,
        keys=state.keys,
        prefix=prefix,
        shapes={name.removeprefix(prefix): shape for name, shape in state.shapes.items()},
        metadata=state.metadata,
        has_ema=state.has_ema,
    )


def _find(path: Path, content: Any, weights: Weights) -> StateDict:
    if is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return StateDict(path=path, shapes=_shapes(content), metadata=metadata)
    if is_state(content):
        return StateDict(path=path, shapes=_shapes(content))
    if isinstance(content, dict):
        averages = [name for name in ("ema", "ema_state_dict") if name in content]
        for name in averages:
            if not is_state(content[name]) and weights == "ema":
                raise UserError(f"{path}: its {name} is no plain state dict; give --weights raw to take the others")
        for name in WRAPPERS[weights]:
            if is_state(content.get(name)):
                return StateDict(path=path, keys=(name,), shapes=_shapes(content[name]), has_ema=bool(averages))
        if any(is_state(value) for value in content.values()):
            raise UserError(f"{path} holds no {weights} weights, but {', '.join(map(str, content))[:200]}")
    if isinstance(content, list | tuple) and content and is_state(content[0]):
        # The DDIM authors' training states: model, optimizer, epoch, step and, perhaps, the average.
        last = len(content) - 1
        has_ema = last > 0 and is_state(content[last])
        chosen = last if weights == "ema" and has_ema else 0
        return StateDict(path=path, keys=(chosen,), shapes=_shapes(content[chosen]), has_ema=has_ema)
    found = f"the keys {', '.join(map(str, content))[:120]}" if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{path} is no checkpoint that loads: found {found}; {WHAT_LOADS}")


WHAT_LOADS = (
    "what loads is a checkpoint or safetensors of this project, a state dict of ADM, guided-diffusion, "
    "improved-diffusion, ilvr_adm, P2-weighting or the DDIM authors, or a diffusers folder with a UNet2DModel"
)


def is_state(value: Any) -> bool:
    """Whether something is a dict of names and tensors."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def fill(network: nn.Module, weights: StateDict, names: Mapping[str, tuple[str, ...]]) -> None:
    """Copy weights into a network, in its dtype.

    Args:
        network: with parameters allocated.
        weights: what to read.
        names: the file's name of each parameter; three, stacked, where a parameter holds queries, keys and values.

    Raises:
        UserError: missing, unexpected, misshapen (the first five are listed) or non-finite weights.
    """
    ours = network.state_dict()
    places = {theirs: (name, part, len(all_)) for name, all_ in names.items() for part, theirs in enumerate(all_)}
    targets = {theirs: ours[name].chunk(count)[part] for theirs, (name, part, count) in places.items()}
    faults = [f"{k} is missing" for k in targets if k not in weights.shapes]
    faults += [f"{k} is unexpected" for k in weights.shapes if k not in targets]
    faults += [
        f"{k} is {weights.shapes[k]}, not {tuple(v.shape)}"
        for k, v in targets.items()
        if k in weights.shapes and not _fits(weights.shapes[k], tuple(v.shape))
    ]
    if faults:
        raise UserError(
            f"{weights.path} does not fit the network ({len(faults)} faults): {'; '.join(faults[:5])}"
            + ("; ..." if len(faults) > 5 else "")
        )
    with torch.no_grad():
        for piece in weights.pieces():
            for name, value in piece.items():
                targets[name].copy_(value.reshape(targets[name].shape))
                del value
            del piece
    broken = [name for name, value in ours.items() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(
            f"{weights.path} holds weights that are not finite ({len(broken)} tensors, {broken[0]} first); "
            "give an earlier one"
        )


def _fits(shape: Shape, target: Shape) -> bool:
    """Equal, or a linear layer written as a convolution of size 1."""
    return shape == target or (len(target) == 2 and shape[:2] == target and set(shape[2:]) == {1})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        UserError: the file is missing or holds none.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings")
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__
