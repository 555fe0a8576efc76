"""Run the museum: python -m tests.museum. Exits with 1 if a mutation survives, or fewer than 15 are on show."""

import sys
import time

import pytest

from tests.museum.exhibits import EXHIBITS
from tests.museum.mutation import mutated

FEWEST = 15


class Outcome:
    """A pytest plugin that keeps what became of a test."""

    def __init__(self) -> None:
        self.ran = 0
        self.reason: str | None = None
        """Of the first failure."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and self.reason is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reason = crash.message.partition("\n")[0] if crash else str(report.longrepr)


def run(test: str) -> str | None:
    """Why a test fails, or None.

    Raises:
        RuntimeError: there is no such test.
    """
    outcome = Outcome()
    pytest.main(["-x", "-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", test], plugins=[outcome])
    if not outcome.ran and outcome.reason is None:
        raise RuntimeError(f"{test} cannot be run")
    return outcome.reason


def main() -> int:
    """Run all; print what killed what."""
    start, survivors = time.perf_counter(), 0
    for test in sorted({exhibit.killed_by for exhibit in EXHIBITS}):
        if reason := run(test):
            print(f"{test} fails without any mutation: {reason}")
            return 1
    for exhibit in EXHIBITS:
        with mutated(exhibit.edits):
            reason = run(exhibit.killed_by)
        survivors += reason is None
        print(f"{exhibit.name}\n    seen in    {exhibit.seen_in}")
        print(f"    killed by  {exhibit.killed_by}: {reason[:100]}" if reason else "    SURVIVED", flush=True)
    killed = len(EXHIBITS) - survivors
    print(f"\n{killed} of {len(EXHIBITS)} killed in {time.perf_counter() - start:.0f} s")
    if len(EXHIBITS) < FEWEST:
        print(f"{len(EXHIBITS)} are on show; at least {FEWEST} must be")
    return int(survivors > 0 or len(EXHIBITS) < FEWEST)


if __name__ == "__main__":
    sys.exit(main())
