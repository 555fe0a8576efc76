"""app.py as a process: it writes into one temporary folder alone, and removes it when it ends."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio (pip install -e '.[app]')")
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
           **{name: str(folders[name]) for name in ("HOME", "TMPDIR")}}  # fmt: skip
    command = [sys.executable, str(ROOT / "app.py"), "--ckpt", "toon64", "--device", "cpu"]
    with subprocess.Popen(command, cwd=folders["cwd"], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        with urllib.request.urlopen(address, timeout=60) as answer:
            page = answer.read().decode()
        assert page.count("download=") >= 4
        assert [folder.name.startswith("ilvr_app_") for folder in folders["TMPDIR"].iterdir()].count(True) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) in (0, 130)  # as after Control-C
    left = [path for folder in folders.values() for path in folder.rglob("*")]
    assert [path for path in left if "torchinductor" not in path.parts[-1]] == []  # an empty folder that torch makes


def test_a_mistake_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "app.py"), "--ckpt", "absent.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "absent.ckpt" in done.stderr
