"""What every command shares: errors in one line, the exit status, the rank, and the parser."""

import argparse
import errno
import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from ilvr_lightning.errors import EXIT_INTERRUPTED, StopRequested, UserError, did_you_mean, first_line

MAX_MESSAGE_CHARS = 1500
"""A message is cut after this many characters: a file name in it may have any length."""
PEER_LOST_PATTERN = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|NCCL (communicator|timeout)"
)
"""Matches what a collective operation reports when the process at the other end has died."""
Main = Callable[[Sequence[str]], int]


def command(main: Main) -> Main:
    """Wrap main(argv): a UserError gives one line on standard error and status 2, a fault of the machine status 1."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the encoding cannot
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except UserError as error:
            message = str(error).strip()
            if "Original Traceback" in message:  # raised in a DataLoader's worker: the last line is the message
                message = message.rpartition("\n")[2].partition("Error: ")[2]
            return _fail(message, 2)
        except StopRequested as stopped:
            if stopped.all_ranks and process_rank() and launched_by_lightning():
                return 0  # for another status Lightning's launcher would kill the other ranks
            return stopped.status
        except KeyboardInterrupt:  # before there was anything to save
            return EXIT_INTERRUPTED
        except FloatingPointError as error:
            return _fail(str(error), 1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = "" if error.strerror == os.strerror(error.errno) else f" ({error.strerror})"
                return _fail(
                    f"the disk is full{what}; free some space or write to another disk (train.py: "
                    "trainer.default_root_dir, sample.py: --out)",
                    1,
                )
            if error.filename is not None and error.errno is not None:
                return _fail(f"cannot read or write {str(error.filename)[:200]!r}: {error.strerror}", 2)
            raise
        except MemoryError:
            return _fail(OUT_OF_MEMORY, 1)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return _fail(OUT_OF_MEMORY, 1)
            if PEER_LOST_PATTERN.search(str(error)):
                time.sleep(2)  # the rank that knows the reason reports it first
                return _fail(f"another process of this run has ended ({first_line(error)})", 1)
            raise
        except Exception as error:
            if type(error).__name__ == "MisconfigurationException":
                return _fail(f"invalid trainer.* setting: {first_line(error)}", 2)
            raise

    return guarded


OUT_OF_MEMORY = (
    "out of memory; train.py: trainer.accumulate_grad_batches=2 (or 4, ...) gives the same training with less memory, "
    "or lower data.image_size or model.channels; sample.py: lower --batch-size"
)


NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""One of these is in what torch raises as a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory or the CPU's ran out; torch need not be loaded to tell."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in NO_MEMORY))
    )


_every_rank_reports = False


def report_errors_on_every_rank() -> None:
    """From now on each rank reports its own errors: it may be the only one that has them."""
    global _every_rank_reports
    _every_rank_reports = True


def _fail(message: str, status: int) -> int:
    if not process_rank() or _every_rank_reports:
        who = f"{_program()}: rank {process_rank()}" if process_rank() else _program()
        line = " ".join(message.split())[:MAX_MESSAGE_CHARS]
        printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(f"{who}: {printable}", file=sys.stderr, flush=True)
    return status


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line on the first rank alone."""
    if not process_rank():
        print(line, file=file, flush=True)


def process_rank() -> int:
    """This process's rank, from the environment that torchrun, SLURM or Lightning sets; 0 without one."""
    values = (os.environ.get(name, "") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
    return next((int(value) for value in values if value.isdecimal() and value != "0"), 0)


def launched_by_lightning() -> bool:
    """Whether Lightning's own launcher started this process, rather than torchrun, SLURM or the user."""
    return "LOCAL_RANK" in os.environ and "RANK" not in os.environ and os.environ.get("SLURM_PROCID", "0") == "0"


def _program() -> str:
    """train.py, or ilvr_lightning.checkpoints where that is run by python -m."""
    parts = sys.argv[0].split("/")
    return ".".join(parts[-3:-1]) if parts[-1] == "__main__.py" else parts[-1] or "ilvr_lightning"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the flag that an unknown one may have meant.

    Args:
        stray: what to say of an argument that belongs to no flag.
    """

    def __init__(self, *args: object, stray: str = "--help lists the arguments", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.stray = stray

    def error(self, message: str) -> NoReturn:
        """Raise a UserError in place of the usage and an exit."""
        _, found, arguments = message.partition("unrecognized arguments: ")
        if not found:
            raise UserError(f"{message}; --help explains the flags")
        unknown = (arguments.split() or [repr(arguments)])[0]
        if not unknown.startswith("-"):
            raise UserError(f"unknown argument {unknown[:100]}; {self.stray}")
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        raise UserError(f"unknown flag {unknown[:100]}; {did_you_mean(unknown.partition('=')[0][:100], known)}")
