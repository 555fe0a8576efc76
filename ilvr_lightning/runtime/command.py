"""How commands end: one line for a mistake, what to change for a fault."""

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

from ilvr_lightning.errors import EXIT_INTERRUPTED, StopRequested, UserError

MAX_MESSAGE_CHARS = 1500
"""Characters of a message: a file may hold a name of any length."""


Main = Callable[[Sequence[str]], int]


def command(main: Main) -> Main:
    """Wrap main(argv): a UserError gives status 2 and one line on standard error, a fault 1 and what to change."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what no encoding has
        try:
            return main(argv)
        except UserError as error:
            message = str(error).strip()
            if "Original Traceback" in message:  # raised in a DataLoader's worker: its last line says what
                message = message.rpartition("\n")[2].partition("Error: ")[2]
            return _fail(message, 2)
        except StopRequested as stopped:
            if stopped.all_ranks and process_rank() and launched_by_lightning():
                return 0  # its launcher would kill all the others for another status
            return stopped.status
        except KeyboardInterrupt:  # before there was anything to save
            return EXIT_INTERRUPTED
        except FloatingPointError as error:
            return _fail(str(error), 1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = "" if error.strerror == os.strerror(error.errno) else f" ({error.strerror})"
                return _fail(
                    f"the disk is full{what}: free some space, or write elsewhere (train.py: trainer.default_root_dir; "
                    "sample.py: --out)",
                    1,
                )
            if error.filename is not None and error.errno is not None:
                return _fail(f"cannot write or read {str(error.filename)[:200]!r}: {error.strerror}", 2)
            raise
        except MemoryError as error:
            return _fail(
                str(error) or "out of memory: lower data.batch_size or data.image_size (--batch-size, --image-size)", 1
            )
        except RuntimeError as error:
            # torch.OutOfMemoryError is a RuntimeError, and torch need not be loaded to catch it.
            if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
                return _fail("out of memory: lower the batch size, the image size or the network's width", 1)
            if PEER_LOST_PATTERN.search(str(error)):
                time.sleep(2)  # who knows why speaks first
                return _fail(f"another process of this run has ended ({_one_line(error)[:200]})", 1)
            raise
        except Exception as error:
            if type(error).__name__ == "MisconfigurationException":
                return _fail(f"the Trainer refuses its settings (trainer.*): {_one_line(error)}", 2)
            raise

    return guarded


PEER_LOST_PATTERN = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|NCCL (communicator|timeout)"
)
"""What a collective says where a process of the other side has died."""


_each_for_itself = False


def report_errors_on_every_rank() -> None:
    """From here on each rank says what goes wrong with it: it may be the only one that knows."""
    global _each_for_itself
    _each_for_itself = True


def _fail(message: str, status: int) -> int:
    if not process_rank() or _each_for_itself:
        who = f"{_program()}: rank {process_rank()}" if process_rank() else _program()
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split())[:MAX_MESSAGE_CHARS])
        print(f"{who}: {line}", file=sys.stderr, flush=True)
    return status


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line once: every process of a run comes by here, and the first one speaks for all."""
    if not process_rank():
        print(line, file=file, flush=True)


def process_rank() -> int:
    """Of this process by its environment: torchrun's, SLURM's or Lightning's."""
    given = (os.environ.get(name, "") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
    return next((int(value) for value in given if value.isdecimal() and value != "0"), 0)


def launched_by_lightning() -> bool:
    """Whether Lightning's launcher started this process."""
    return "LOCAL_RANK" in os.environ and "RANK" not in os.environ and os.environ.get("SLURM_PROCID", "0") == "0"


def _program() -> str:
    return sys.argv[0].rpartition("/")[2] or "ilvr_lightning"


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        of_no_flag = message.startswith("unrecognized arguments: ") and " -" not in message
        raise UserError(f"{message}; {'a picture is given by --ref' if of_no_flag else 'see --help'}")
