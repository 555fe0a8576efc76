"""The ranks of a run as forked processes: started in a tenth of a second, with the environment that torchrun sets.

A fork server imports torch, Lightning and the commands once; each rank is a fork of it.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "lightning.pytorch", "datasets", "train", "sample", "ilvr_lightning.training"])
Command = Literal["train", "sample", "ilvr_lightning.evaluation.__main__"]
"""The module that has the command's main()."""
SECONDS = 240
"""A run may take this long."""


@dataclass(frozen=True)
class Ended:
    """What became of a rank."""

    status: int | None
    """Its exit status; negative for a signal."""
    out: str
    error: str


def run_ranks(command: Command, world_size: int, *argv: object) -> list[Ended]:
    """Run a command on several ranks of one machine, as torchrun would start them, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in argv]
    with TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(target=_rank, args=(command, words, rank, world_size, port, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, *((Path(folder) / f"{rank}.{name}").read_text() for name in ("out", "error")))
            for rank, process in enumerate(ranks)
        ]


def _rank(command: str, argv: Sequence[str], rank: int, world_size: int, port: int, folder: str) -> None:
    """What a rank does after the fork."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [f"{command}.py", *argv]
    import torch

    torch.set_num_threads(1)
    main = importlib.import_module(command).main
    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
