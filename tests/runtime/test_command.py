"""What every command shares."""

import subprocess
import sys

from tests.support.paths import ROOT


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `python train.py --help-all | head -1`."""
    command = [sys.executable, "train.py", "--help-all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
