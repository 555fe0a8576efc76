"""Configurations from YAML and key=value; the only place that imports OmegaConf."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ilvr_lightning.config import Config, SamplingChanges
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError, did_you_mean
from ilvr_lightning.trainer_keys import TRAINER_KEYS


def load_config(arguments: Sequence[str], default: str | Path | None = None) -> tuple[Config, str]:
    """Build the configuration from an optional YAML file and key=value overrides.

    Args:
        arguments: one path that ends in .yaml or .yml at most, and key=value pairs.
        default: the file to read where the arguments name none.

    Returns:
        The configuration and its name (the file's stem).

    Raises:
        UserError: a file is missing, a key unknown, a value of the wrong type or out of its range.
    """
    files = [a for a in arguments if "=" not in a]
    for argument in files:
        if not argument.endswith((".yaml", ".yml")):
            raise UserError(f"{argument!r} is neither a recipe (CONFIG.yaml) nor key=value; see --help")
    if len(files) > 1:
        raise UserError(f"give one recipe: got {' and '.join(files)}")
    path = Path(files[0]) if files else Path(default) if default else None
    layers = []
    if path is not None:
        layers.append(_read_yaml(path))
    for argument in arguments:
        if "=" in argument:
            layers.append(_read_override(argument))
    return _build(layers), path.stem if path else "default"


def config_from_plain(values: dict[str, Any]) -> Config:
    """The configuration that `Config.plain` gave, as a checkpoint holds it.

    Raises:
        UserError: it holds keys or values that this version does not know.
    """
    try:
        layer = OmegaConf.create(values)
    except (OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"no configuration: {_first_line(error)}") from None
    return _build([layer])


def to_yaml(config: Config) -> str:
    """The resolved configuration as a recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(config.plain()))


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}; the ready ones are in configs/") from None
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is no readable YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values")
    return loaded


def _read_override(argument: str) -> DictConfig:
    key = argument.partition("=")[0]
    if not key.strip():
        raise UserError(f"{argument!r} has no key; give key=value")
    try:
        layer = OmegaConf.from_dotlist([argument])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{key} could not be read: got {argument!r} ({_first_line(error)})") from None
    # Merging appends nothing and names nothing: an unknown key must be reported as it was typed.
    return layer


def _build(layers: Sequence[DictConfig]) -> Config:
    merged = OmegaConf.structured(Config)
    known = list(all_keys())
    for layer in layers:
        _check_layer(OmegaConf.to_container(layer), known)
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, layers)) from None
    except (ValueError, TypeError) as error:
        raise UserError(_first_line(error)) from None


def _check_layer(node: Any, known: list[str], key: str = "") -> None:
    """Unknown keys, named with the nearest; values that are missing or reach outside the configuration."""
    sections = {"", *(k.partition(".")[0] for k in known if "." in k)}
    if isinstance(node, dict):
        for name, value in node.items():
            full = f"{key}.{name}".lstrip(".")
            if key in sections and full not in known and full not in sections:
                raise UserError(f"unknown key {full}: {did_you_mean(full, known)}")
            _check_layer(value, known, full)
    elif key in sections:
        raise UserError(f"{key} is a section; set {key}.KEY=VALUE")
    elif isinstance(node, list):
        for value in node:
            _check_layer(value, known, key)
    elif node == "???":
        raise UserError(f"{key} has no value; give one")
    elif isinstance(node, str) and _calls_a_resolver(node):
        raise UserError(f"{key} may refer to other keys alone, not to the environment or files: {node!r}")


def _calls_a_resolver(text: str) -> bool:
    """Whether a ${name:...} is in it, its name perhaps put together from other keys."""
    while (without_keys := re.sub(r"\$\{[^{}:]*\}", "", text)) != text:
        text = without_keys
    return re.search(r"\$\{[^}]*:", text) is not None


def _explain(error: OmegaConfBaseException, layers: Sequence[DictConfig]) -> str:
    key = getattr(error, "full_key", None) or _culprit(layers)
    wanted, meaning = next(((kind, doc) for name, kind, doc, _ in describe() if name == key), ("", ""))
    hint = f"; it wants {wanted}" if wanted else ""
    return f"{key}: {_first_line(error)}{hint}" + (f" ({meaning})" if meaning else "")


def _culprit(layers: Sequence[DictConfig]) -> str:
    """The key that cannot be merged, where OmegaConf does not say which."""
    for layer in layers:
        for key, value in flatten(cast(dict[str, Any], OmegaConf.to_container(layer))):
            alone = OmegaConf.create({})
            OmegaConf.update(alone, key, value)
            try:
                OmegaConf.merge(OmegaConf.structured(Config), alone)
            except OmegaConfBaseException:
                return key
    return "a key"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def all_keys() -> Iterator[str]:
    """Every key that a recipe may set, dotted."""
    for name, *_ in describe():
        yield name


def describe() -> Iterator[tuple[str, str, str, Any]]:
    """(key, type, one line of meaning, default) of every setting, from the dataclasses themselves."""
    yield from _describe(Config, Config(), "")


def _describe(cls: type, values: Any, prefix: str) -> Iterator[tuple[str, str, str, Any]]:
    hints = typing.get_type_hints(cls)
    docs = field_docs(SamplingPlan if cls is SamplingChanges else cls)
    for f in dataclasses.fields(cls):
        value = getattr(values, f.name)
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _describe(cast(type, hints[f.name]), value, f"{prefix}{f.name}.")
        elif f.name == "trainer" and not prefix:
            for key in TRAINER_KEYS:
                yield f"trainer.{key}", "", "The Lightning Trainer's own.", value.get(key, "its own default")
        else:
            yield f"{prefix}{f.name}", type_name(hints[f.name]), docs.get(f.name, ""), value


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
    """A type as a user reads it: `number or none`, `linear|cosine`."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Literal:
        return "|".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is tuple:
        return "list"
    return {int: "whole number", float: "number", str: "text", bool: "true|false", type(None): "none"}.get(hint, "")
