"""SaveCheckpoints out: safetensors with a model card, ADM's state dict, a diffusers folder."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ilvr_lightning.checkpoints.card import model_card
from ilvr_lightning.checkpoints.families import adm, diffusers, diffusers_scheduler
from ilvr_lightning.checkpoints.families import native as own
from ilvr_lightning.checkpoints.files import first_line
from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.blocks import Attention
from ilvr_lightning.models.unet import UNet


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an export may be told."""

    half: bool = False
    """Weights in float16: half the size, rounded to 11 bits."""
    notes: str = ""
    """Markdown for the model card: training images and their licence, what the model can do and cannot."""
    pictures: tuple[Path, ...] = ()
    """Copied beside the card and shown in it."""


def export(loaded: LoadedDenoiser, kind: str, out: Path, options: Options | None = None) -> list[Path]:
    """Write a denoiser in another format.

    Args:
        loaded: what load_denoiser gave.
        kind: a key of EXPORTS.
        out: a folder, or a .safetensors file, for safetensors; a file for adm; a folder for diffusers.
        options: of the weights, and of a safetensors folder's card.

    Returns:
        The files written.

    Raises:
        UserError: the format cannot hold this network, or the target is taken.
    """
    check_target(out)
    return EXPORTS[kind](loaded, out, options or Options())


def _weights(loaded: LoadedDenoiser, options: Options) -> dict[str, Tensor]:
    """The state dict in the precision asked for."""
    dtype = torch.float16 if options.half else torch.float32
    state = {name: value.to(dtype).contiguous() for name, value in loaded.network.state_dict().items()}
    if options.half and not all(value.isfinite().all() for value in state.values()):
        raise UserError("--half: a weight lies beyond what float16 holds; export without it")
    return state


def check_target(out: Path) -> None:
    """Raise a UserError if something would be overwritten."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; give another name")


def _safetensors(loaded: LoadedDenoiser, out: Path, options: Options) -> list[Path]:
    metadata = own.to_metadata(loaded.description)
    state = _weights(loaded, options)
    if out.suffix == ".safetensors":
        return _write(out, lambda path: _save(state, path, metadata))
    names = [picture.name for picture in options.pictures]
    if len(set(names)) < len(names) or {"model.safetensors", "README.md"} & set(names):
        raise UserError(f"--picture: {', '.join(names)} would overwrite one another or the model; rename them")
    card = model_card(loaded.description, options.notes, names)
    return _write_folder(
        out,
        {
            "model.safetensors": lambda path: _save(state, path, metadata),
            "README.md": _text(card),
            **{picture.name: functools.partial(shutil.copyfile, picture) for picture in options.pictures},
        },
    )


def _adm(loaded: LoadedDenoiser, out: Path, options: Options) -> list[Path]:
    if reason := adm.refusal(loaded.description):
        raise UserError(f"--to adm: {reason}; --to safetensors holds everything")
    if out.is_dir() or not out.suffix:
        raise UserError(f"--to adm writes a file: give a name such as {out}.pt")
    network = loaded.network
    state: dict[str, Tensor] = {}
    ours = _weights(loaded, options)
    for name, (theirs,) in adm.names(ours, network.config).items():
        value = ours[name]
        # ADM writes attention's linear layers as 1-d convolutions.
        state[theirs] = value[..., None] if name.endswith(("attention.qkv.weight", "attention.out.weight")) else value
    return _write(out, lambda path: torch.save(state, path))


def note_on_reading(loaded: LoadedDenoiser, kind: str) -> str | None:
    """What must be given beside an exported file so that it is read as this network, or None."""
    if kind != "adm":
        return None
    shapes = {
        theirs: tuple(loaded.network.state_dict()[name].shape)
        for name, (theirs,) in adm.names(loaded.network.state_dict(), loaded.network.config).items()
    }
    needed = adm.needed_overrides(loaded.description, shapes)
    if not needed:
        return None
    return "read it with " + " ".join(f"--override {name}={value}" for name, value in needed.items())


def _diffusers(loaded: LoadedDenoiser, out: Path, options: Options) -> list[Path]:
    description = loaded.description
    if reason := diffusers.refusal(description):
        raise UserError(f"--to diffusers: {reason}; --to safetensors holds everything")
    ours = _in_new_order(loaded.network, _weights(loaded, options))
    state: dict[str, Tensor] = {}
    for name, theirs in diffusers.names(ours, loaded.network.config).items():
        for part, value in zip(theirs, ours[name].chunk(len(theirs)), strict=True):
            state[part] = value.contiguous()
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    texts = {
        "unet/config.json": diffusers.unet_config(description),
        "scheduler/scheduler_config.json": diffusers_scheduler.scheduler_config(description),
        "model_index.json": index,
    }
    return _write_folder(
        out,
        {
            f"unet/{diffusers.WEIGHT_FILES[0]}": lambda path: _save(state, path, {"format": "pt"}),
            **{name: _text(json.dumps(values, indent=2) + "\n") for name, values in texts.items()},
        },
    )


def _in_new_order(network: UNet, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with queries, keys and values stacked before the heads, whatever order the network has."""
    state = dict(weights)
    for name, module in network.named_modules():
        if isinstance(module, Attention) and not module.new_order:
            for parameter in ("weight", "bias"):
                key = f"{name}.qkv.{parameter}"
                value = state[key]
                by_head = value.reshape(module.num_heads, 3, -1, *value.shape[1:])
                state[key] = by_head.transpose(0, 1).reshape(value.shape)
    return state


EXPORTS: dict[str, Callable[[LoadedDenoiser, Path, Options], list[Path]]] = {
    "safetensors": _safetensors,
    "adm": _adm,
    "diffusers": _diffusers,
}


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file(state, path, metadata)
    path.chmod(0o644)  # it makes them private


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _write(out: Path, write: Callable[[Path], object]) -> list[Path]:
    """A file, whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    with _partial(out) as partial:
        write(partial)
    return [out]


def _write_folder(out: Path, files: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """A folder, whole or not at all; an empty one may be there."""
    with _partial(out) as partial:
        for name, write in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write(partial / name)
    return [out / name for name in files]


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A temporary neighbour that takes the name when all is written, and is gone if anything fails."""
    partial = out.with_name(f".{out.name[:200]}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, out)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(f"{out} cannot be written: {getattr(error, 'strerror', None) or first_line(error)}") from None
