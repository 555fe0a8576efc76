"""Mutations at run time: a function gets the code of its own source with a few words replaced."""

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

from tests.mutation.mutants import Edit


@contextmanager
def mutated(edits: Sequence[Edit]) -> Iterator[None]:
    """The functions with their edits made; everyone who holds them sees it, and afterwards they are as before.

    Raises:
        LookupError: the text to replace does not occur once: the code has moved on, and the mutant must follow.
    """
    changed = [(function := find(edit.function), mutated_code(function, edit)) for edit in edits]
    originals = [function.__code__ for function, _ in changed]
    try:
        for function, code in changed:
            function.__code__ = code
        clear_caches()
        yield
    finally:
        for (function, _), original in zip(changed, originals, strict=True):
            function.__code__ = original
        clear_caches()


def find(name: str) -> FunctionType:
    """The plain function behind module:qualified.name, through decorators, properties and classmethods."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType)
    return function


def mutated_code(function: FunctionType, edit: Edit) -> CodeType:
    """The function's code with the edit made in its source."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(edit.old) != 1:
        raise LookupError(f"{edit.function} holds {edit.old!r} {source.count(edit.old)} times; it must be once")
    # Within a class, so that super() finds its cell.
    body = ast.parse("class Holder:\n" + textwrap.indent(source.replace(edit.old, edit.new), "    ")).body
    node = next(n for n in ast.walk(body[0]) if isinstance(n, ast.FunctionDef))
    node.decorator_list = []
    names: dict[str, Any] = {}
    exec(compile(ast.Module(body, []), inspect.getfile(function), "exec"), dict(function.__globals__), names)
    made = names["Holder"].__dict__[node.name]
    assert isinstance(made, FunctionType)
    return made.__code__


def clear_caches() -> None:
    """Of every cached function of the project and its tests: what they hold was made by other code."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("ilvr_lightning", "tests"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
