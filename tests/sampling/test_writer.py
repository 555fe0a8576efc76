"""SampleWriter: the progress bar, the estimate of time, and what a stop says."""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ilvr_lightning.errors import EXIT_REQUEUE, StopRequested
from ilvr_lightning.sampling.folder import SampleFolder
from ilvr_lightning.sampling.requests import SampleRequest
from ilvr_lightning.sampling.writer import Progress, time_estimate
from tests.support.samples import images, listed

Run = Callable[..., Path]


class Stream(io.StringIO):
    """A stream that is a terminal, or is none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    """A clock that each step moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def progress_of(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds_per_step: float, images: int, world_size: int = 1
) -> tuple[str, str]:
    """What the bar, and standard output, show of a run of batches of 2 with 4 steps."""
    said, out, clock = Stream(terminal), io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(time, "perf_counter", clock)
    progress = Progress(4, images, 2, world_size, True)
    monkeypatch.setattr(progress._bar, "_time", clock)
    progress._bar.start_t = progress._bar.last_print_t = clock.now
    for _ in range(4 * images // (2 * world_size)):
        clock.now += seconds_per_step
        progress.step(2)
    progress.close()
    return said.getvalue(), out.getvalue()


def test_a_bar_in_a_file_writes_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = progress_of(monkeypatch, terminal=False, seconds_per_step=1, images=100)  # 200 s
    lines = [line for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    assert 3 <= len(lines) <= 5
    assert "100/100" in lines[-1]


def test_a_short_run_writes_nothing_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = progress_of(monkeypatch, terminal=False, seconds_per_step=0.25, images=100)
    assert shown == ""


def test_a_bar_on_a_terminal_moves_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = progress_of(monkeypatch, terminal=True, seconds_per_step=1, images=4)
    counts = [line.partition("|")[2].partition("| ")[2].partition("/")[0] for line in shown.split("\r")]
    assert [count for count in counts if count][:3] == ["0", "1", "2"]  # halves are rounded
    assert "4/4" in shown


def test_rank_0_takes_the_others_to_be_as_far_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = progress_of(monkeypatch, terminal=True, seconds_per_step=1, images=12, world_size=3)
    assert "6/12" in shown and "12/12" in shown


def test_a_long_run_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = progress_of(monkeypatch, terminal=False, seconds_per_step=2, images=100)
    assert out == "this will take about 7 min\n"
    _, out = progress_of(monkeypatch, terminal=False, seconds_per_step=0.01, images=100)
    assert out == ""


@pytest.mark.parametrize(
    ("seconds", "evaluations", "text"),
    [
        (80, 5, "this will take about 80 s"),
        (600, 20, "this will take about 10 min; --preset draft would take about 5 min"),
        (36_000, 1000, "this will take about 10.0 h; --preset draft would take about 6 min"),
    ],
)
def test_time_estimate(seconds: float, evaluations: int, text: str) -> None:
    assert time_estimate(seconds, evaluations) == text


def test_what_was_made_before_a_stop_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--unconditional", "--num-samples", 6, "--batch-size", 2)
    write = SampleFolder.write

    def stopped(self: SampleFolder, request: SampleRequest, *rest: Any) -> Path:
        if request.index == 3:
            raise StopRequested(EXIT_REQUEUE)
        return write(self, request, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", stopped)
        out = run(*asked, status=EXIT_REQUEUE)
    assert "stopped; run the same command again to continue" in capsys.readouterr().err
    assert len(list(out.glob("*.png"))) == 3
    run(*asked)
    assert "3 to make, 3 already there" in capsys.readouterr().out
    assert len(listed(out)) == len(images(out)) == 6
