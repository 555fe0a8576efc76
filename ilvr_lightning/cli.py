"""How commands end: one line for a mistake, what to change for a fault."""

import errno
import functools
import sys
from collections.abc import Callable, Sequence

from ilvr_lightning.errors import UserError

Main = Callable[[Sequence[str]], int]


def command(main: Main) -> Main:
    """Wrap main(argv): a UserError gives status 2 and one line on standard error, a fault 1 and what to change."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except UserError as error:
            return _fail(str(error), 2)
        except FloatingPointError as error:
            return _fail(str(error), 1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return _fail(
                    "the disk is full: free some space, or write elsewhere (--out, trainer.default_root_dir)", 1
                )
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
                return _fail(f"cannot write or read {error.filename}: {error.strerror}", 2)
            raise
        except RuntimeError as error:
            # torch.OutOfMemoryError is a RuntimeError, and torch need not be loaded to catch it.
            if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
                return _fail("out of memory: lower data.batch_size (train.py) or --batch-size (sample.py)", 1)
            raise
        except Exception as error:
            if type(error).__name__ == "MisconfigurationException":
                return _fail(f"the Trainer refuses its settings (trainer.*): {_one_line(error)}", 2)
            raise

    return guarded


def _fail(message: str, status: int) -> int:
    print(f"{_program()}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _program() -> str:
    return sys.argv[0].rpartition("/")[2] or "ilvr_lightning"


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
