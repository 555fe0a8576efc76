"""The documents: their commands, read by the parsers of the programs; every page and every public name is listed."""

import glob
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator

import pytest

from ilvr_lightning import __all__ as public_names
from ilvr_lightning.checkpoints.__main__ import make_parser as checkpoints_parser
from ilvr_lightning.config.load import load_config
from ilvr_lightning.evaluation.__main__ import make_parser as evaluation_parser
from ilvr_lightning.sampling.arguments import make_parser as sample_parser
from ilvr_lightning.sampling.arguments import parse_arguments
from tests.support.paths import ROOT

PROGRAMS = ("python", "python3", "torchrun", "make", "sbatch", "pip", "git", "tensorboard", "hf", "wandb")
ELSEWHERE = ("git", "cd", "hf", "wandb", "tensorboard", "source")
"""Programs of others; their lines need the network, or a run."""


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each command in a block of the README, of docs/ and of data/README.md."""
    pages = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for block in re.findall(r"^(?:    .*\n|```\n(?:.*\n)+?```\n)+", page.read_text(), re.MULTILINE):
            for line in re.sub(r"\\\n\s*", "", textwrap.dedent(block)).splitlines():
                if line.partition(" ")[0] in PROGRAMS or line.startswith("MASTER_ADDR="):
                    for part in re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line).split(" && "):
                        yield page.name, shlex.split(part, comments=True)


def check_files(words: list[str]) -> None:
    """Files of the project that a command names are there."""
    for word in words:
        path = word.partition("=")[2] or word
        if path.startswith(("data/", "configs/", "docs/", "benchmarks/")) and not set("[{") & set(path):
            assert glob.glob(str(ROOT / path.partition(":")[0])), path


def check_command(words: list[str]) -> None:
    """A command's words are known to its parser, or else its flags to its source."""
    program, *rest = words
    if any("|" in word or word.startswith("[--") or word == "..." for word in rest):
        return  # how a command is used, not a command
    check_files(rest)
    if program == "torchrun":
        rest = rest[rest.index("train.py") :]
    elif program == "sbatch":
        rest[0] = "train.py"
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
        return
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", " ".join(rest))) <= set(extras)
        return
    elif program in ELSEWHERE or rest[:2] == ["-m", "venv"]:
        return
    name, argv = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    if name == "train.py":
        argv = ["configs/toon64.yaml" if word == "CONFIG.yaml" else word for word in argv]
        load_config([word for word in argv if word not in ("--look", "--print-config", "--help", "--help-all")])
    elif name == "sample.py":
        parse_arguments(argv)
    elif name == "ilvr_lightning.checkpoints":
        checkpoints_parser().parse_args(argv)
    elif name == "ilvr_lightning.evaluation":
        args, others = evaluation_parser().parse_known_args(argv)
        if others:  # translation takes the flags of sample.py
            assert argv[0] == "translation"
            sample_parser().parse_args([*others, "--ref", str(args.sources)])
    else:
        file = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
        file = file if file.is_file() else file.with_suffix("") / "__main__.py"
        known = set(re.findall(r"--[\w-]+", file.read_text() + sample_parser().format_help()))
        assert {word for word in argv if word.startswith("--") and len(word) > 2} <= known, file


def name_of(value: str | list[str]) -> str:
    """A page or a command in the name of a test."""
    return (value if isinstance(value, str) else " ".join(value))[:60].replace("/", "_")


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=name_of)
def test_command(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(words)


def test_the_commands_are_found() -> None:
    assert len(list(commands())) > 90


def test_every_public_name_has_its_entry() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"auto(?:class|function):: (\w+)", text)) == set(public_names)


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    listed = re.findall(r"```{toctree}.*?\n\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    assert {page for part in listed for page in part.split()} - {"gallery/index"} == pages
