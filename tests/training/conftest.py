"""Finished runs that the tests of training compare with."""

from pathlib import Path

import pytest

from tests.support.runs import GRIDS, TrainRun


@pytest.fixture(scope="session")
def straight(train_run: TrainRun) -> Path:
    """Three epochs of four steps, without grids."""
    return train_run("straight", "trainer.max_epochs=3")


@pytest.fixture(scope="session")
def with_grids(train_run: TrainRun) -> Path:
    """The same with grids at steps 3, 4, 6, 8, 9 and 12."""
    return train_run("with_grids", *GRIDS)


@pytest.fixture(scope="session")
def accumulated(train_run: TrainRun) -> Path:
    return train_run("accumulated", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2")
