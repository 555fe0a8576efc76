"""A page that is served in this process, with a small trained model, and Chromium to look at it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ilvr_lightning.app.arguments import parse_arguments
from ilvr_lightning.app.models import Models
from ilvr_lightning.app.server import serve, temporary_folder
from tests.support.browser import Page


@pytest.fixture(scope="session")
def models(trained: Path) -> Models:
    """One small model, of 8 by 8 pixels and 25 timesteps."""
    return Models([str(trained / "checkpoints" / "last.ckpt")], "cpu")


@pytest.fixture(scope="session")
def served(trained: Path) -> Iterator[Any]:
    """A gradio.Blocks that is served; its attribute local_url says where."""
    pytest.importorskip("gradio", reason="needs gradio (pip install -e '.[app]')")
    before = dict(os.environ)
    with temporary_folder() as folder:
        args = parse_arguments(["--ckpt", str(trained / "checkpoints" / "last.ckpt"), "toon64", "--device", "cpu"])
        page = serve(args, folder, prevent_thread_lock=True, quiet=True)
        page.folder, page.names = folder, args.ckpt
        yield page
        page.close(verbose=False)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def look(browser: Any, served: Any) -> Iterator[Any]:
    """Opens the page at a width. The test fails where it reports an error or asks for anything but the server."""
    faults: list[str] = []
    own = (served.local_url, "data:", "blob:")

    def opened(width: int = 1400) -> Page:
        page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.extend([message.text] * (message.type == "error")))
        page.on("request", lambda asked: faults.extend([asked.url] * (not asked.url.startswith(own))))
        page.goto(served.local_url)
        page.wait_for_selector(".samples img")
        return page

    yield opened
    for context in browser.contexts:
        context.close()
    assert faults == []
