"""A handful of bad inputs by the real command line."""

from pathlib import Path

from tests.fuzz.inputs import KINDS, case
from tests.fuzz.run import Sandbox


def test_by_the_real_command_line(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.measure_idle()
    for kind in ("images", "configs", "checkpoints", "reproduce"):
        assert sandbox.run(case(sandbox.valid, 0, list(KINDS).index(kind)), by_command=True).faults == ()
