"""How commands end: one line for a mistake, what to change for a fault."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from ilvr_lightning.errors import UserError

LONGEST = 1500
"""Characters of a message: a file may hold a name of any length."""
Main = Callable[[Sequence[str]], int]


def command(main: Main) -> Main:
    """Wrap main(argv): a UserError gives status 2 and one line on standard error, a fault 1 and what to change."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except UserError as error:
            message = str(error).strip()
            if "Original Traceback" in message:  # raised in a DataLoader's worker: its last line says what
                message = message.rpartition("\n")[2].partition("Error: ")[2]
            return _fail(message, 2)
        except FloatingPointError as error:
            return _fail(str(error), 1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return _fail(
                    "the disk is full: free some space, or write elsewhere (--out, trainer.default_root_dir)", 1
                )
            if error.filename is not None and error.errno is not None:
                return _fail(f"cannot write or read {str(error.filename)[:200]!r}: {error.strerror}", 2)
            raise
        except MemoryError:
            return _fail("out of memory: lower data.batch_size or data.image_size (--batch-size, --image-size)", 1)
        except RuntimeError as error:
            # torch.OutOfMemoryError is a RuntimeError, and torch need not be loaded to catch it.
            if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
                return _fail("out of memory: lower the batch size, the image size or the network's width", 1)
            raise
        except Exception as error:
            if type(error).__name__ == "MisconfigurationException":
                return _fail(f"the Trainer refuses its settings (trainer.*): {_one_line(error)}", 2)
            raise

    return guarded


def _fail(message: str, status: int) -> int:
    announce(f"{_program()}: {' '.join(message.split())[:LONGEST]}", file=sys.stderr)
    return status


def announce(line: str, file: TextIO | None = None) -> None:
    """Print a line once: Lightning starts the script again for each process, and the first one speaks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=file, flush=True)


def _program() -> str:
    return sys.argv[0].rpartition("/")[2] or "ilvr_lightning"


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
