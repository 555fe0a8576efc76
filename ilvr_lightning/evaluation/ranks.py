"""The processes that share an evaluation under torchrun."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed

T = TypeVar("T")
BATCH = 64
"""So many images are read and described at once. It is fixed, so that figures are the same on any number of ranks."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    size: int = 1

    def over_batches(self, count: int, compute: Callable[[Sequence[int]], T], batch: int = BATCH) -> list[T]:
        """What `compute` returns for the rows of each batch of `count`, in order; all ranks get the results of all."""
        batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        own = [compute(rows) for rows in batches[self.rank :: self.size]]
        if self.size == 1:
            return own
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, own)
        return [every[i % self.size][i // self.size] for i in range(len(batches))]


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
