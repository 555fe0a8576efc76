"""Every command of docs/tutorial.md runs at a small size, in order, in one folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

SMALL = {
    "train.py": "data.batch_size=2 model.channels=32 model.channel_mult=[1,1,1,1] calibration.images=2 "
    "trainer.limit_val_batches=1 trainer.enable_progress_bar=false grid.every_n_steps=2 grid.factors=[8] "
    "trainer.max_steps=",
    "sample.py": "--preset draft --num-samples 1",
    "ilvr_lightning.evaluation": "--features pixels",
}
"""What is added to the commands of each program."""


def test_every_command_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    commands = [shlex.split(c)[1:] for c in re.findall(r"^    (python .*)$", text, re.MULTILINE)]
    assert len(commands) >= 8
    for name in ("train.py", "sample.py", "configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number, command in enumerate(commands, 1):
        program = command[1] if command[0] == "-m" else command[0]
        small = SMALL.get(program, "").split()
        if program == "train.py":
            small[-1] += str(2 * number)  # a run that is resumed goes on
        done = subprocess.run(
            [sys.executable, *command, *small],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert len(list(tmp_path.glob("runs/relief64/*/grids/*.png"))) >= 2
    assert (tmp_path / "relief.safetensors").exists()
