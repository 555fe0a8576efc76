"""What the tests share: a folder of small images, a config that trains in a second, a finished run."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tests.support.browser import Page, chromium
from tests.support.runs import TINY_CONFIG, TrainRun

torch.set_num_threads(1)  # networks this small are slower on more


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pictures of 9 by 10 pixels: 18 to train on, 3 to validate on."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(21):
        pixels = random.integers(0, 256, (9, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """tiny.yaml: one epoch of four steps at 8 px; its runs lie beside it under runs/tiny."""
    folder = tmp_path_factory.mktemp("tiny_config")
    path = folder / "tiny.yaml"
    path.write_text(TINY_CONFIG.format(data=images, root=folder / "runs"))
    return path


@pytest.fixture(scope="session")
def train_run(tiny_config: Path) -> TrainRun:
    """Train the tiny config under a name, with key=value overrides; gives the run's folder."""

    def run(name: str, *overrides: str) -> Path:
        if not any(override.startswith("resume=") for override in overrides):  # a module's fixture may be made twice
            shutil.rmtree(tiny_config.parent / "runs" / "tiny" / name, ignore_errors=True)
        assert train.main([str(tiny_config), f"run.name={name}", *overrides]) == 0
        return tiny_config.parent / "runs" / "tiny" / name

    return run


@pytest.fixture(scope="session")
def trained(train_run: TrainRun) -> Path:
    """The folder of a finished run: two epochs, a grid after each."""
    return train_run("trained", "trainer.max_epochs=2", "grid.every_n_epochs=1")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page in Chromium. The test fails where it reports an error, opens a dialog, or asks for anything but files."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda asked: faults.extend([asked.url] * (not asked.url.startswith(("file:", "data:")))))
    page.on("requestfailed", lambda asked: faults.append(f"{asked.url}: {asked.failure}"))
    yield page
    context.close()
    assert faults == []
