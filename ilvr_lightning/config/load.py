"""Configs from YAML files, key=value overrides and checkpoints. Only this file imports OmegaConf."""

import functools
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ilvr_lightning.config.describe import all_keys, describe
from ilvr_lightning.config.schema import Config, is_folder_name
from ilvr_lightning.errors import OTHER_NAMES, UserError, did_you_mean, first_line

RETIRED = {
    "checkpoint.on_full_disk", "trainer.min_epochs", "trainer.min_steps", "trainer.limit_test_batches",
    "trainer.limit_predict_batches", "trainer.overfit_batches", "trainer.val_check_interval", "trainer.barebones",
    "trainer.sync_batchnorm", "data.batch_size=auto", "data.on_broken", "sampling.factor",
    "model.patch_size=1", "model.pixel_channels=0",
}  # fmt: skip
"""Keys of earlier versions, some of them with one value only, which are ignored with a note."""
REMOVED = {
    "model.patch_size": "networks that work on patches are no longer supported; train one without, as configs/ do",
    "model.pixel_channels": "it went with patches, which are no longer supported; leave it out",
}
"""Keys of earlier versions that cannot be ignored, and why."""
DEFAULTS_OF_OLD_CHECKPOINTS: dict[str, Any] = {
    "diffusion": {"schedule": "linear", "prediction": "eps"},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0},
    "ema": {"decay": 0.9999},
}
"""What a key that a stored config lacks meant when it was stored, where the default has changed since."""
MAX_YAML_BYTES = 200_000
"""A config or an override may be this long; 4000 explicit betas take a third of it."""
MAX_VALUES = 20_000
"""A stored config may hold this many values; nested references to one list can stand for billions."""
READ_ERRORS = (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError, OSError)
"""What reading YAML may raise."""
T = TypeVar("T")
Say = Callable[[str], object]


def note(line: str) -> None:
    """Print a line beside the output, so that what --print-config prints can be kept in a file."""
    print(line, file=sys.stderr)


def load_config(arguments: Sequence[str], default: str | Path | None = None, say: Say = note) -> Config:
    """Build the config from an optional YAML file and key=value overrides.

    Args:
        arguments: at most one path that ends in .yaml or .yml, and key=value pairs.
        default: the file to read where the arguments name none.
        say: is told of keys that are ignored.

    Raises:
        UserError: a file is missing, a key unknown, a value of the wrong type or out of its range.
    """
    files = [a for a in arguments if "=" not in a]
    for argument in files:
        if not argument.endswith((".yaml", ".yml")):
            named = Path("configs", f"{argument[:200]}.yaml")
            if argument.isidentifier() and named.is_file():
                hint = f"did you mean {named}?"
            elif argument.lstrip("-") in (*all_keys(), *OTHER_NAMES) or argument in OTHER_NAMES:
                hint = did_you_mean(argument, list(all_keys()), "--help-all")
            else:
                hint = "see --help"
            raise UserError(f"{argument!r} is neither a config (CONFIG.yaml) nor key=value without spaces; {hint}")
    if len(files) > 1:
        raise UserError(f"give one config: got {' and '.join(files)}")
    path = Path(files[0]) if files else Path(default) if default else None
    layers = []
    if path is not None:
        if not is_folder_name(path.stem):
            raise UserError(f"{str(path)[:300]!r}: the file's name is also that of a folder; rename it")
        layers += [OmegaConf.create({"name": path.stem}), _without_replaced_limit(_read_yaml(path), arguments)]
    layers += [_read_override(argument) for argument in arguments if "=" in argument]
    return _build(layers, say)


def config_from_dict(values: Mapping[str, Any], say: Say | None = None) -> Config:
    """The config that `Config.plain` gave, as a checkpoint holds it. A key that it lacks means what it meant then.

    Args:
        values: nested dicts.
        say: is told of keys of earlier versions, which are ignored.

    Raises:
        UserError: it holds keys or values that this version does not know.
    """
    try:
        layers = [OmegaConf.create(DEFAULTS_OF_OLD_CHECKPOINTS), _create(values)]
    except READ_ERRORS as error:
        raise UserError(f"this is not a config: {first_line(error)}") from None
    return _build(layers, say)


def from_dict(cls: type[T], values: Mapping[str, Any], section: str | None = None) -> T:
    """A dataclass from plain values, its types and keys checked.

    Args:
        cls: the dataclass.
        values: its fields.
        section: the section of a config that it is, whose keys of earlier versions are handled as in a config.

    Raises:
        UserError: a key is unknown, or a value of another type or out of its range.
    """
    try:
        layer = _create(values)
        if section is not None:
            whole = OmegaConf.create({section: layer})
            _drop_retired(whole, None)
            _check_keys(OmegaConf.to_container(whole), list(all_keys()))
            layer = whole[section]
        _check_values(OmegaConf.to_container(layer))
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), layer)))
    except READ_ERRORS as error:
        raise UserError(first_line(error)) from None


def to_yaml(plain: Mapping[str, Any]) -> str:
    """A plain config as YAML, which load_config reads."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _create(values: Mapping[str, Any]) -> DictConfig:
    """OmegaConf's form of plain values.

    Raises:
        ValueError: there are more than MAX_VALUES.
    """
    waiting: list[Any] = [values]
    for _ in range(MAX_VALUES):
        if not waiting:
            return OmegaConf.create(dict(values))
        node = waiting.pop()
        waiting += node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    raise ValueError(f"it holds more than {MAX_VALUES} values")


def _read_yaml(path: Path) -> DictConfig:
    if not path.exists():
        raise UserError(f"there is no config {path}; the ready ones are in configs/")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a config, like those in configs/")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise UserError(f"{path} is too long for a config: it has {size} bytes, and at most {MAX_YAML_BYTES} are read")
    try:
        loaded = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values")
    return loaded


def _read_override(argument: str) -> DictConfig:
    key = argument.partition("=")[0]
    if not key.strip():
        raise UserError(f"{argument[:100]!r} has no key; give key=value")
    if key.startswith("-"):
        raise UserError(f"unknown flag {key[:100]}; {did_you_mean(key[:100], list(all_keys()), '--help-all')}")
    if len(argument) > MAX_YAML_BYTES or len(key) > 200:
        raise UserError(f"{key[:100]} could not be read: it is too long")
    try:
        return OmegaConf.from_dotlist([argument])
    except READ_ERRORS as error:
        raise UserError(f"{key} could not be read: got {argument[:200]!r} ({first_line(error)})") from None


def _build(layers: Sequence[DictConfig], say: Say | None) -> Config:
    known = list(all_keys())
    try:
        for layer in layers:
            _drop_retired(layer, say)
            plain = OmegaConf.to_container(layer)
            _check_values(plain)
            _check_keys(plain, known)
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(_structured(), *layers)))
    except UserError:
        raise
    except (OmegaConfBaseException, TypeError) as error:  # a TypeError: keys where a list belongs
        raise UserError(_explain(error, layers)) from None
    except ValueError as error:
        raise UserError(first_line(error, 1000)) from None
    except (ArithmeticError, AttributeError, RecursionError) as error:
        raise UserError(f"the config could not be read: {first_line(error)}") from None


@functools.cache
def _structured() -> DictConfig:
    return cast(DictConfig, OmegaConf.structured(Config))


def _without_replaced_limit(layer: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """A file's settings without the limit of the run that the command line gives in the other unit."""
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    limits = ("trainer.max_steps", "trainer.max_epochs")
    for limit, other in (limits, limits[::-1]):
        if given.get(limit, "-1") not in ("-1", "null", "") and other not in given:
            _drop(layer, other)
    return layer


def _drop_retired(layer: DictConfig, say: Say | None) -> None:
    for retired in RETIRED:
        key, _, only = retired.partition("=")
        if _drop(layer, key, only) and say is not None:
            instead = f"; use {OTHER_NAMES[key]}" if key in OTHER_NAMES else ""
            say(f"note         {retired} is no longer a setting and is ignored{instead}")


def _drop(layer: DictConfig, key: str, only: str = "") -> bool:
    """Remove a key (section.name) from a layer, if it is there and has the only value given; tells whether it was."""
    section, _, name = key.partition(".")
    values = OmegaConf.to_container(layer).get(section)  # type: ignore[union-attr]
    found = isinstance(values, dict) and name in values and only in ("", str(values[name]))
    if found:
        del layer[section][name]
    return found


def _check_values(node: Any, key: str = "") -> None:
    """Raise a UserError for a value that refers to others, which might be secrets, and for one that is too large."""
    if isinstance(node, dict):
        for name, value in node.items():
            _check_values(value, f"{key}.{name}".lstrip(".")[:100])
    elif isinstance(node, list | tuple):
        for value in node:
            _check_values(value, key)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"{key} must be a plain value; ${{...}} is not resolved: got {node[:100]!r}")
    elif node == "???":
        raise UserError(f"{key} has no value; give one")
    elif isinstance(node, int) and abs(node) >= 2**63:
        raise UserError(f"{key} must be an integer below 2^63")


def _check_keys(node: Any, known: list[str], key: str = "") -> None:
    """Raise a UserError for an unknown key, with the one that it may have meant."""
    sections = {"", *(k.partition(".")[0] for k in known if "." in k)}
    if key in sections and not isinstance(node, dict):
        raise UserError(f"{key} is a section; set {key}.KEY=VALUE")
    for name, value in node.items() if isinstance(node, dict) and key in sections else ():
        full = f"{key}.{name}".lstrip(".")
        if full in REMOVED:
            raise UserError(f"{full}={str(value)[:20]}: {REMOVED[full]}")
        if full not in known and full not in sections:
            raise UserError(f"unknown key {full[:100]}; {did_you_mean(full[:100], known, '--help-all')}")
        _check_keys(value, known, full)


def _explain(error: Exception, layers: Sequence[DictConfig]) -> str:
    key = getattr(error, "full_key", None) or _key_that_fails(layers)
    wanted, meaning = next(((kind, doc) for name, kind, doc, _ in describe() if name == key), ("", ""))
    hint = f"; it must be {wanted}" if wanted else ""
    return f"{key}: {first_line(error)}{hint}" + (f" ({meaning})" if meaning else "")


def _key_that_fails(layers: Sequence[DictConfig]) -> str:
    """The key whose value OmegaConf refuses, which not all of its errors name."""
    for layer in layers:
        for key, value in flatten(cast(dict[str, Any], OmegaConf.to_container(layer))):
            alone = OmegaConf.create({})
            OmegaConf.update(alone, key, value)
            try:
                OmegaConf.merge(_structured(), alone)
            except (OmegaConfBaseException, TypeError):
                return key if not isinstance(value, dict) and key in all_keys() else key.rpartition(".")[0] or key
    return "the config"
