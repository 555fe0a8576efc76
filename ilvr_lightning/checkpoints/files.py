"""Files of weights: opened without executing anything, read by memory map, never held twice."""

import functools
import io
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

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


Identity = tuple[int, int, int, int]


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
    identity: Identity | None = field(default=None, repr=False)
    """The file's, when its names were read."""

    def pieces(self) -> Iterator[dict[str, Tensor]]:
        """The tensors, some at a time: a mapping's pages stay in memory as long as it does, so each part has its own.

        Files from before PyTorch 1.6, which cannot be mapped, come whole.

        Raises:
            UserError: the file is damaged, or another one by now (a run that goes on has saved again).
        """
        mapped = is_safetensors(self.path) or zipfile.is_zipfile(self.path)
        _check_sums(self.path)
        for names in _parts(self.shapes, PIECES if mapped else 1):
            content = read_content(self.path)
            self.check_unchanged()
            for key in self.keys:
                content = content[key]
            yield {name: content[self.prefix + name] for name in names}
            del content

    def check_unchanged(self) -> None:
        """Raise a UserError if the file is another one by now."""
        if self.identity is not None and identity_of(self.path) != self.identity:
            raise UserError(f"{self.path} was changed while it was read (a run saves there?); try again")


def identity_of(path: Path) -> Identity:
    """What changes when a file is replaced or written again."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_sums(path: Path) -> None:
    """Raise a UserError for a zip file with a flipped bit; mapping it would not notice."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
        except READ_ERRORS as error:
            broken = first_line(error)
        if broken is not None:
            raise UserError(
                f"{path} is no checkpoint, or a damaged one (a checksum is wrong: {broken}); fetch it again"
            )


def is_intact(path: Path) -> bool:
    """Whether every byte of a checkpoint is as its checksums say."""
    if not path.is_file():  # a pipe may never end
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError):
        return False


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
    try:
        if not path.is_file():  # nor a pipe or a device, which may never end
            raise FileNotFoundError
        with path.open("rb") as file:
            start = file.read(32)
    except (OSError, ValueError):
        raise UserError(f"there is no checkpoint {str(path)[:300]!r}; give a file or a folder of weights") from None
    zipped = start.startswith(ZIP) and zipfile.is_zipfile(path)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is no checkpoint but a Git LFS pointer to one; fetch the file itself (git lfs pull)")
    if start.startswith(ZIP) and not zipped:
        raise UserError(f"{path} is no checkpoint, or a truncated one: the end of the file is missing; fetch it again")
    try:
        if is_safetensors(path):
            return load_file(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                    raise ValueError("a compressed archive, which torch does not write")
                if sum(entry.file_size for entry in entries) > path.stat().st_size:
                    raise ValueError("an archive whose entries lie over one another")
                if any(e.filename.endswith("data.pkl") and e.file_size > MOST_PICKLED for e in entries):
                    raise ValueError(f"more than {MOST_PICKLED} bytes beside its tensors")
        elif OLD_MAGIC not in start:
            raise ValueError("of no format that torch or safetensors write")
        _check_pickles(path, identity_of(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused
            # By its content: torch goes by the suffix, and takes every .safetensors for one.
            with path.open("rb") as file:
                return torch.load(
                    path if zipped and path.suffix != ".safetensors" else file,
                    map_location="cpu", weights_only=True, mmap=zipped and path.suffix != ".safetensors",
                )  # fmt: skip
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
        raise UserError(f"{path} is no checkpoint, or a damaged one ({first_line(error)})") from None


@functools.lru_cache(maxsize=4)
def _check_pickles(path: Path, identity: Identity) -> None:
    """Raise a ValueError for tuples that hold each other so often that to hash them, as keys, would never end.

    Args:
        path: of a checkpoint of torch's, old or new.
        identity: a file that has changed is looked through again.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith("data.pkl")]
            for pickled in pickles:
                _check_pickle(pickled)
    else:
        with path.open("rb") as file:
            for _ in range(4):  # magic number, version, system, content
                _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    stack: list[int] = []
    """How many items each value holds, those of its tuples' tuples among them; 0 is a mark."""
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(file):
        before = [kind.name for kind in code.stack_before] if code.name != "MEMOIZE" else []
        if "mark" in before:
            at = marks.pop()
            held = stack[at + 1 :]
            del stack[at - before.index("mark") :]
        else:
            at = len(stack) - len(before)
            held = stack[at:]
            del stack[at:]
        if code.name.startswith("TUPLE"):
            stack.append(1 + sum(held))
        elif code.name == "DUP":
            stack += held * 2
        elif "GET" in code.name:
            stack.append(memo[argument])
        elif code.name != "MEMOIZE":
            marks += [len(stack)] if code.name == "MARK" else []
            stack += [0 if kind.name == "mark" else 1 for kind in code.stack_after]
        while marks and marks[-1] >= len(stack):
            marks.pop()
        if "PUT" in code.name or code.name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        if stack and stack[-1] > MOST_ITEMS:
            raise ValueError("a tuple of tuples without end")


MOST_PICKLED = 4_000_000
"""Bytes of names and values in a checkpoint; a thousand weights and an optimizer's take a tenth of it."""


MOST_ITEMS = 1_000_000
"""Of a tuple, with those of the tuples in it."""


READ_ERRORS = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
    AssertionError, RecursionError, SafetensorError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a file may raise that is not what it should be."""


ZIP = b"PK\x03\x04"


OLD_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""In the first bytes of files from before PyTorch 1.6."""


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and not start.startswith(ZIP)


def state_dict_of(path: Path, content: Any, weights: Weights) -> StateDict:
    """The state dict of a file's content: bare, under one of WRAPPERS, or first (ema: last) in a list.

    Raises:
        UserError: there is none, or not the one asked for.
    """
    state = _find(path, content, weights)
    names = list(state.shapes)
    prefix = ""
    for _ in range(4):
        prefix += next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in names)), "")
    return StateDict(
        path=path,
        keys=state.keys,
        prefix=prefix,
        shapes={name.removeprefix(prefix): shape for name, shape in state.shapes.items()},
        metadata=state.metadata,
        has_ema=state.has_ema,
        identity=identity_of(path),
    )


def _find(path: Path, content: Any, weights: Weights) -> StateDict:
    if is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return StateDict(path=path, shapes=shapes_of(path, content), metadata=metadata)
    if is_state(content):
        return StateDict(path=path, shapes=shapes_of(path, content))
    if isinstance(content, dict):
        averages = [name for name in ("ema", "ema_state_dict") if name in content]
        for name in averages:
            if not is_state(content[name]) and weights == "ema":
                raise UserError(f"{path}: its {name} is no plain state dict; give --weights raw to take the others")
        for name in WRAPPERS[weights]:
            if is_state(content.get(name)):
                return StateDict(path=path, keys=(name,), shapes=shapes_of(path, content[name]), has_ema=bool(averages))
        if any(is_state(value) for value in content.values()):
            raise UserError(f"{path} holds no {weights} weights, but {', '.join(map(str, content))[:200]}")
    if isinstance(content, list | tuple) and content and is_state(content[0]):
        # The DDIM authors' training states: model, optimizer, epoch, step and, perhaps, the average.
        last = len(content) - 1
        has_ema = last > 0 and is_state(content[last])
        chosen = last if weights == "ema" and has_ema else 0
        return StateDict(path=path, keys=(chosen,), shapes=shapes_of(path, content[chosen]), has_ema=has_ema)
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


def shapes_of(path: Path, state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shape of each weight of a file.

    Raises:
        UserError: one is no plain tensor, or they claim more numbers than there are.
    """
    for name, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or not value.is_floating_point():
            kind = "on no device" if value.is_meta else f"{value.layout}, {value.dtype}".replace("torch.", "")
            raise UserError(f"{path}: the weight {name[:100]} is {kind}; plain floating-point weights load")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    claimed = sum(math.prod(shapes[name]) * value.element_size() for name, value in state.items())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if claimed > sum(storages.values()):
        raise UserError(
            f"{path}: the weights claim {claimed:,} bytes, and it holds {sum(storages.values()):,} for them"
        )
    return shapes


def check_names(network: nn.Module, weights: StateDict, names: Mapping[str, tuple[str, ...]]) -> None:
    """Raise a UserError that lists missing, unexpected and misshapen weights, if there are any.

    Args:
        network: perhaps without memory (on the meta device).
        weights: what is to be read.
        names: the file's name of each parameter; three, stacked, where a parameter holds queries, keys and values.
    """
    targets = _targets(network, names)
    faults = [f"{k} is missing" for k in targets if k not in weights.shapes]
    faults += [f"{k[:100]} is unexpected" for k in weights.shapes if k not in targets]
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


def fill(network: nn.Module, weights: StateDict, names: Mapping[str, tuple[str, ...]]) -> None:
    """Copy weights that fit (check_names) into a network, in its dtype.

    Raises:
        UserError: a weight is not finite, or the file cannot be read.
    """
    targets = _targets(network, names)
    with torch.no_grad():
        for piece in weights.pieces():
            for name, value in piece.items():
                targets[name].copy_(value.reshape(targets[name].shape))
                del value
            del piece
    broken = [name for name, value in network.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(
            f"{weights.path} holds weights that are not finite ({len(broken)} tensors, {broken[0]} first); "
            "give an earlier one"
        )


def _targets(network: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Where each of the file's names goes: a parameter, or a third of one."""
    ours = network.state_dict()
    return {
        theirs: ours[name].chunk(len(all_))[part] for name, all_ in names.items() for part, theirs in enumerate(all_)
    }


def _fits(shape: Shape, target: Shape) -> bool:
    """Equal, or a linear layer written as a convolution of size 1."""
    return shape == target or (len(target) == 2 and shape[:2] == target and set(shape[2:]) == {1})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        UserError: the file is missing or holds none.
    """
    try:
        if (size := path.stat().st_size) > LONGEST_JSON:
            raise ValueError(f"it is of {size} bytes; settings are of at most {LONGEST_JSON}")
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings")
    return values


LONGEST_JSON = 4_000_000
"""Bytes of a settings file; 100,000 explicit betas are half of it."""


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__
