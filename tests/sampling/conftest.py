"""A trained network's checkpoint, reference images, and sample.py run with four steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import samples

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png, b.png and other/a.png, all different."""
    folder = tmp_path_factory.mktemp("references")
    (folder / "other").mkdir()
    random = np.random.default_rng(1)
    for name in ("a.png", "b.png", "other/a.png"):
        Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Run:
    """Sample into tmp_path/out, or where out says; returns the folder."""

    def run(*argv: object, out: str = "out", status: int = 0) -> Path:
        return samples.sample_into(checkpoint, tmp_path / out, *argv, status=status)

    return run
