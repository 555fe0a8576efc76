"""The processes of a run: who has died, and what is left of the memory for each."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ilvr_lightning.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from ilvr_lightning.runtime.command import launched_by_lightning

GRACE_SECONDS = 3.0
"""Seconds in which a process whose fellow has died may still end by itself, and say why."""


class RankWatch(Callback):
    """Ends this process where another that Lightning started beside it has died; a collective might wait for it.

    torchrun's agent and `srun --kill-on-bad-exit` do the same for theirs.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        started: Sequence[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", ())
        if started:
            for thread in threading.enumerate():  # Lightning's own kills this process without a word
                if thread.name == "child-process-observer":
                    thread._child_processes = []  # type: ignore[attr-defined]
            threading.Thread(target=_watch_children, args=(started,), daemon=True).start()
        elif launched_by_lightning() and trainer.local_rank > 0:
            threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_children(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    while not any(process.poll() for process in processes):
        time.sleep(0.5)
    rank, status = next((rank, p.returncode) for rank, p in enumerate(processes, start=1) if p.returncode)
    how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
    more = "; out of memory, perhaps" if status == -signal.SIGKILL else ""
    print(
        f"\nrank {rank} {how}{more}; the run ends; the same command goes on (train.py with resume=auto)",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(GRACE_SECONDS)
    for process in processes:
        process.kill()
    os._exit(status if status in (EXIT_REQUEUE, EXIT_INTERRUPTED) else 1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
