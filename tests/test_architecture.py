"""The packages of ilvr_lightning: which may import which. docs/contributing.md has the same picture."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "ilvr_lightning"
LAYERS = {
    "errors": 1, "diffusion": 1, "models": 1,
    "atomic": 2, "config": 2, "runtime": 2, "metrics": 2,
    "data": 3,
    "visual": 4, "checkpoints": 4,
    "training": 5, "sampling": 5,
    "app": 6, "evaluation": 6,
}  # fmt: skip
"""A package imports packages of lower layers only; train.py, sample.py and app.py are above them all."""
TORCH_FREE = ("config", "errors", "atomic", "runtime/command.py", "sampling/arguments.py", "checkpoints/__main__.py",
              "evaluation/__main__.py", "app/arguments.py")  # fmt: skip
"""What the commands load before they know that there is work to do: no file of it imports torch at its top."""
FILES_OVER_300_LINES = {"config/schema.py"}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Full names of the modules that a file imports; at its top alone if asked."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
    return found


@cache
def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def violations(paths: list[Path]) -> list[str]:
    """Imports of a package of the same layer or a higher one."""
    found = []
    for path in paths:
        package = package_of(path)
        for name in imports(path):
            target = name.removeprefix("ilvr_lightning.").partition(".")[0]
            if name.startswith("ilvr_lightning.") and target != package and LAYERS[target] >= LAYERS[package]:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_packages_import_lower_layers_only() -> None:
    assert violations(sources()) == []
    assert max(LAYERS.values()) + 1 <= 7


def test_a_wrong_import_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "ilvr_lightning")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    wrong = tmp_path / "ilvr_lightning" / "training" / "module.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("def f() -> None:\n    from ilvr_lightning.sampling.folder import SampleFolder\n")
    assert violations([wrong]) == ["ilvr_lightning/training/module.py imports ilvr_lightning.sampling.folder"]


def test_no_circle() -> None:
    """Between files, too, and between imports that only type checkers or functions see."""
    graph: dict[str, set[str]] = {}
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imports(path) if name.startswith("ilvr_lightning.")} - {
            module
        }  # a package names its own modules
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_tests_share_through_support_alone() -> None:
    """conftest files hold fixtures; what is imported lies in tests/support."""
    shared = {name for path in (ROOT / "tests").rglob("*.py") for name in imports(path) if name.endswith("conftest")}
    assert shared == set()


def test_no_package_is_forgotten() -> None:
    assert {package_of(path) for path in sources()} == set(LAYERS)


@pytest.mark.parametrize("package", ["diffusion", "models"])
def test_the_mathematics_imports_torch_alone(package: str) -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    for path in (PACKAGE / package).glob("*.py"):
        for name in imports(path):
            assert name.startswith(f"ilvr_lightning.{package}.") or name.partition(".")[0] in allowed, (path, name)


def test_what_answers_at_once_loads_no_torch() -> None:
    modules = []
    for part in TORCH_FREE:
        path = PACKAGE / part if part.endswith(".py") else PACKAGE / f"{part}.py"
        paths = [path] if path.is_file() else sorted((PACKAGE / part).glob("*.py"))
        modules += [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    code = f"import sys, train, sample, app, {', '.join(modules)}\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & {"torch", "numpy", "lightning", "datasets", "PIL", "torchvision", "gradio"}


def test_omegaconf_is_imported_in_one_file() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in sources() for name in imports(path)
             if name.partition(".")[0] == "omegaconf"}  # fmt: skip
    assert users == {"config/load.py"}


def test_files_are_short() -> None:
    long = {path.relative_to(PACKAGE).as_posix() for path in sources() if len(path.read_text().splitlines()) > 300}
    assert long <= FILES_OVER_300_LINES
    for command in ("train.py", "sample.py", "app.py"):
        assert len((ROOT / command).read_text().splitlines()) <= 65, command
