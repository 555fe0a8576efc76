"""UserError: a mistake that the person at the keyboard can mend."""


class UserError(ValueError):
    """One line that names the setting, what was given, and what to give; commands print it and exit with 2."""


def did_you_mean(given: str, known: list[str]) -> str:
    """A hint that names the nearest of the known words, or lists them."""
    import difflib

    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"known are {', '.join(known)}" if len(known) < 12 else "--help lists them all"


REQUEUE = 75
"""Exit status of a run that a signal ended (EX_TEMPFAIL of sysexits.h): start the same command again."""
INTERRUPTED = 130
"""Exit status after Control-C, the shells' own."""


class Stopped(BaseException):
    """A run was asked to stop; it saves and ends with this status.

    Args:
        status: for the shell.
        everywhere: every rank has agreed on it.
    """

    def __init__(self, status: int, everywhere: bool = False) -> None:
        super().__init__(status)
        self.status = status
        self.everywhere = everywhere
