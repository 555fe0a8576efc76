"""Configurations from YAML and key=value; the only place that imports OmegaConf."""

import ast
import dataclasses
import functools
import inspect
import io
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

from ilvr_lightning.config.schema import Config, SamplingChanges
from ilvr_lightning.config.trainer_keys import TRAINER_KEYS
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError, did_you_mean


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
            recipe = Path("configs", f"{argument[:200]}.yaml")
            hint = f"did you mean {recipe}?" if argument.isidentifier() and recipe.is_file() else "see --help"
            raise UserError(f"{argument!r} is neither a recipe (CONFIG.yaml) nor key=value without spaces; {hint}")
    if len(files) > 1:
        raise UserError(f"give one recipe: got {' and '.join(files)}")
    path = Path(files[0]) if files else Path(default) if default else None
    layers = []
    if path is not None:
        if path.stem in (".", "..") or not path.stem.isprintable() or len(path.stem.encode()) > 200:
            raise UserError(f"{str(path)[:300]!r}: a recipe's name is that of its runs' folder; give it a plain one")
        layers.append(_read_yaml(path))
    for argument in arguments:
        if "=" in argument:
            layers.append(_read_override(argument))
    return _build(layers), path.stem if path else "default"


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration that `Config.plain` gave, as a checkpoint holds it.

    Raises:
        UserError: it holds keys or values that this version does not know.
    """
    try:
        check_plain(values)
        layer = OmegaConf.create(values)
    except (OmegaConfBaseException, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise UserError(f"no configuration: {_first_line(error)}") from None
    return _build([layer])


MOST_NODES, MOST_LEVELS, LONGEST_TEXT = 20_000, 20, 10_000
"""Of a configuration; a file of somebody else's may be made to fill the memory."""


def check_plain(values: Any) -> None:
    """Raise a UserError for nested dicts and lists that hold too much, or themselves, to be a file's settings."""
    left: list[tuple[str, int, Any]] = [("", 0, values)]
    count = 0
    while left:
        key, level, node = left.pop()
        name = key[1:100] or "the configuration"
        count += len(node) if isinstance(node, dict | list | tuple) else 0
        if count > MOST_NODES or level > MOST_LEVELS:
            raise UserError(f"{name} is nested too deeply, or has too many values")
        if isinstance(node, dict):
            if not all(isinstance(child, str | int) for child in node):
                raise UserError(f"{name} has a key that is neither text nor a whole number")
            left += [(f"{key[:100]}.{str(child)[:100]}", level + 1, value) for child, value in node.items()]
        elif isinstance(node, list | tuple):
            left += [(key, level + 1, value) for value in node]
        elif isinstance(node, str) and len(node) > LONGEST_TEXT:
            raise UserError(f"{name} must be of at most {LONGEST_TEXT} characters: got {len(node)}")
        elif type(node) is int and abs(node) >= 2**63:
            raise UserError(f"{name} must be a whole number below 2^63 in size")


def to_yaml(plain: dict[str, Any]) -> str:
    """A plain configuration as a recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> DictConfig:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file; give a recipe, as those in configs/")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"{path} is no recipe: it is of {path.stat().st_size} bytes, and at most {MOST_BYTES} are read"
            )
        loaded = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}; the ready ones are in configs/") from None
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is no readable YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values")
    return loaded


MOST_BYTES = 200_000
"""Of a recipe or an override; 4000 explicit betas take a third of it."""


def _read_override(argument: str) -> DictConfig:
    key = argument.partition("=")[0]
    if not key.strip():
        raise UserError(f"{argument[:100]!r} has no key; give key=value")
    if len(argument) > MOST_BYTES or len(key) > 200:
        raise UserError(f"{key[:100]} could not be read: it is too long")
    try:
        layer = OmegaConf.from_dotlist([argument])
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{key} could not be read: got {argument[:200]!r} ({_first_line(error)[:200]})") from None
    # Merging appends nothing and names nothing: an unknown key must be reported as it was typed.
    return layer


def _build(layers: Sequence[DictConfig]) -> Config:
    known = list(all_keys())
    references = 0
    for layer in layers:
        plain = OmegaConf.to_container(layer)
        check_plain(plain)
        _check_layer(plain, known)
        references += str(plain).count("${")
    if references > MOST_REFERENCES:
        raise UserError(f"more than {MOST_REFERENCES} references to other keys (${{KEY}}): got {references}")
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(_structured(), *layers)))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, layers)) from None
    except ValueError as error:
        raise UserError(_first_line(error)) from None
    except (TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise UserError(f"{_culprit(layers)} could not be read: {_first_line(error)}") from None


MOST_REFERENCES = 24
"""Each may stand for others: so many make no text of more than some megabytes."""


@functools.cache
def _structured() -> DictConfig:
    return cast(DictConfig, OmegaConf.structured(Config))


def _check_layer(node: Any, known: list[str], key: str = "") -> None:
    """Unknown keys, named with the nearest; values that are missing or reach outside the configuration."""
    sections = {"", *(k.partition(".")[0] for k in known if "." in k)}
    if isinstance(node, dict):
        for name, value in node.items():
            full = f"{key}.{name}".lstrip(".")
            if key in sections and full not in known and full not in sections:
                raise UserError(f"unknown key {full[:100]}: {did_you_mean(full[:100], known)}")
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
                OmegaConf.to_object(OmegaConf.merge(_structured(), alone))
            except (OmegaConfBaseException, TypeError, ArithmeticError, AttributeError, RecursionError):
                return key
            except ValueError:
                continue  # of settings that do not fit each other
    return "a setting"


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
