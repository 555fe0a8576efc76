"""The commands in README.md and docs/: programs, flags, settings and files that there are."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ilvr_lightning.config.load import load_config
from ilvr_lightning.sampling.arguments import parse_arguments
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
LOOK = ("--look", "--print-config", "--help", "--help-all", "...", "[key=value", "...]")
"""Arguments of train.py that are no settings, and what stands for more of them."""


def commands(page: Path) -> list[str]:
    """The indented lines of a page that start a program, each with the lines that continue it."""
    code = re.sub(r"\\\n\s*", "", page.read_text())
    return re.findall(r"^    ((?:python|torchrun|MASTER_ADDR|sbatch) ?.*)$", code, re.MULTILINE)


@pytest.mark.parametrize(
    "command", [pytest.param(each, id=f"{page.name}:{each[:80]}") for page in PAGES for each in commands(page)]
)
def test_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    program = next((word for word in words if word.endswith((".py", ".sh")) and "=" not in word), None)
    arguments = words[words.index(program) + 1 :] if program else []
    if program == "sample.py":
        parse_arguments([word for word in arguments if word not in ("-h", "--help", "...")] or ["--unconditional"])
    elif program == "train.py" or (program or "").endswith(".sh"):
        load_config([word for word in arguments if word not in LOOK and word != "CONFIG.yaml"])
    elif program:
        assert Path(program).is_file()
    elif "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
