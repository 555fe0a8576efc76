"""What --help says of every setting, from the dataclasses themselves."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, cast

from ilvr_lightning.config.schema import Config, SamplingChanges
from ilvr_lightning.diffusion.plan import SamplingPlan

USAGE = """usage: python train.py CONFIG.yaml [key=value ...] [--look | --print-config | --help | --help-all]

Trains an unconditional diffusion model. Ready configs are in configs/; own_images.yaml and own_images_gpu.yaml are
for your own images, on a CPU or a GPU. --look trains nothing: it draws a sheet of training images as the network will
see them, with their values and what is left out. --print-config prints the resolved config and ends.
"""
FIRST_KEYS = (
    "data.path", "data.image_size", "data.batch_size", "data.flip", "optim.lr", "trainer.max_steps",
    "trainer.max_epochs", "trainer.devices", "trainer.accumulate_grad_batches", "resume", "init_from", "run.name",
    "grid.references", "grid.factors",
)  # fmt: skip
"""The keys that a newcomer needs, which --help explains; --help-all explains every key."""


def settings_help(every_key: bool = False) -> str:
    """The text of --help or --help-all."""
    heading = "Every key, its default and its meaning:" if every_key else "The most important keys (--help-all: all):"
    lines = [USAGE, heading]
    for key, kind, meaning, default in describe():
        if every_key or key in FIRST_KEYS:
            lines += [f"  {key}={_written(default)}", f"      {meaning} ({kind})"]
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def all_keys() -> Iterator[str]:
    """Every key that a config may set, dotted."""
    for key, *_ in describe():
        yield key


@functools.cache
def describe() -> list[tuple[str, str, str, Any]]:
    """(key, type, meaning, default) of every setting."""
    return list(_describe(Config, Config(), ""))


def _describe(cls: type, values: Any, prefix: str) -> Iterator[tuple[str, str, str, Any]]:
    hints = typing.get_type_hints(cls)
    docs = field_docs(SamplingPlan if cls is SamplingChanges else cls)
    for f in dataclasses.fields(cls):
        value = getattr(values, f.name)
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _describe(cast(type, hints[f.name]), value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", type_name(hints[f.name]), docs.get(f.name, ""), value


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def type_name(hint: Any) -> str:
    """A type as a user reads it: `number or null`, `linear|cosine`."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Literal:
        return "|".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is tuple:
        return "list"
    return {int: "integer", float: "number", str: "text", bool: "true|false", type(None): "null"}.get(hint, "")
