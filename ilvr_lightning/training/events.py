"""TensorBoard's event files over crashes: no half record, nothing twice, and a full disk ends no run by itself."""

import errno
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

EVENTS = "events.out.tfevents.*"


ROOM = 2**16
"""Bytes that must be free before a disk that was full is tried again."""


class Events(TensorBoardLogger):
    """A run's events, one file a start.

    Args:
        folder: the run's.
        resumed_step: the step that the run goes on from, None from its beginning; what was logged past it is purged,
            since it comes again.
        on_full_disk: what events that cannot be written do: end the run, or be lost with a warning.
    """

    def __init__(
        self, folder: Path, resumed_step: int | None = None, on_full_disk: Literal["stop", "continue"] = "stop"
    ) -> None:
        # TensorBoard drops what stands at the step given and after it.
        purge: dict[str, Any] = {}
        if any(Path(folder).glob(EVENTS)):
            purge = {"purge_step": 0 if resumed_step is None else resumed_step + 1}
        super().__init__(folder, name="", version="", default_hp_metric=False, **purge)
        self.first_step = resumed_step or 0
        self.on_full_disk = on_full_disk
        self._is_full = False
        threading.excepthook = _without_writers

    @rank_zero_only
    def write(self, add: Callable[[SummaryWriter], object]) -> None:
        """Let add(writer) log something; on a disk that was full, once there is room.

        Raises:
            OSError: the disk refuses, and this is to end the run.
        """
        if self._is_full and shutil.disk_usage(self.root_dir).free < ROOM:
            return
        self._is_full = False
        try:
            add(self.experiment)
        except OSError as error:  # of the writer's thread, which has ended by it
            self._experiment = None
            self._kwargs.pop("purge_step", None)
            if self.on_full_disk == "stop":
                raise
            self._is_full = True
            reason = f"events could not be written ({error.strerror}); they go on in a new file when there is room"
            warnings.warn(reason, stacklevel=2)

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """A file that the run can do without: a full disk is warned of, where it is not to end the run."""
        try:
            yield
        except OSError as error:
            if self.on_full_disk == "stop" or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            warnings.warn(f"{what} could not be written ({error.strerror})", stacklevel=3)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.write(lambda writer, tag=tag, value=value: writer.add_scalar(tag, value, step))  # type: ignore[misc]

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Nothing: TrainingLog adds them, with the metric that they are judged by."""

    @rank_zero_only
    def save(self) -> None:
        """Flush; the settings stand in config.yaml."""
        self.write(lambda writer: writer.flush())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush and close."""
        if self._experiment is not None:
            self.write(lambda writer: writer.close())


def _without_writers(args: threading.ExceptHookArgs) -> None:
    """What goes wrong in TensorBoard's thread is raised again where something is logged."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


def mend_events(folder: Path) -> None:
    """Cut off the record that a killed process was writing: readers stop at it, and would pass over what follows.

    A record is its length (8 bytes), a checksum (4), the event, a checksum (4).
    """
    for path in folder.glob(EVENTS):
        size, end = path.stat().st_size, 0
        with path.open("r+b") as file:
            while len(header := file.read(12)) == 12:
                after = end + 16 + struct.unpack("<Q", header[:8])[0]
                if after > size:
                    break
                file.seek(end := after)
            if end < size:
                file.truncate(end)
