"""Run the mutants: python -m tests.mutation. Exits with 1 if a mutation survives, or there are fewer than 30."""

import sys
import time

import pytest

from tests.mutation.mutants import MUTANTS
from tests.mutation.mutation import mutated

FEWEST = 46


class Outcome:
    """A pytest plugin that keeps whether a test ran, and why it failed."""

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
    for test in sorted({mutant.killed_by for mutant in MUTANTS}):
        if reason := run(test):
            print(f"{test} fails without any mutation: {reason}")
            return 1
    for mutant in MUTANTS:
        with mutated(mutant.edits):
            reason = run(mutant.killed_by)
        survivors += reason is None
        print(f"{mutant.name}\n    seen in    {mutant.seen_in}")
        print(f"    killed by  {mutant.killed_by}: {reason[:100]}" if reason else "    SURVIVED", flush=True)
    killed = len(MUTANTS) - survivors
    print(f"\n{killed} of {len(MUTANTS)} killed in {time.perf_counter() - start:.0f} s")
    if len(MUTANTS) < FEWEST:
        print(f"there are {len(MUTANTS)} mutants; there must be at least {FEWEST}")
    return int(survivors > 0 or len(MUTANTS) < FEWEST)


if __name__ == "__main__":
    sys.exit(main())
