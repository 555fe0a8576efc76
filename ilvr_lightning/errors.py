"""The errors that end a command, its exit statuses, and hints for words that are not known."""

import difflib
from collections.abc import Sequence

EXIT_REQUEUE = 75
"""Exit status of a run that a signal ended (EX_TEMPFAIL of sysexits.h): the same command resumes it."""
EXIT_INTERRUPTED = 130
"""Exit status after Control-C, as shells have it."""


class UserError(ValueError):
    """A mistake that the user can correct: one line that says what happened and what to do. The exit status is 2."""


class StopRequested(BaseException):
    """A signal asked the run to stop. A run saves a checkpoint and ends with this status.

    Args:
        status: the exit status.
        all_ranks: every rank has agreed to stop here.
    """

    def __init__(self, status: int, all_ranks: bool = False) -> None:
        super().__init__(status)
        self.status = status
        self.all_ranks = all_ranks


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0][:length] or type(error).__name__


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """A hint that names the nearest of the known words, or lists them where they are few."""
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"known are {', '.join(known)}" if len(known) < 12 else "--help lists them all"
