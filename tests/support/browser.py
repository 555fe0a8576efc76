"""Chromium for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

Page = Any
"""A playwright.sync_api.Page; playwright may be missing."""
REQUIRED = "ILVR_BROWSER_REQUIRED"
"""Where this variable is set, tests fail without a browser. Otherwise they are skipped."""


@contextmanager
def chromium() -> Iterator[Any]:
    """The Chromium that the system has, started through playwright."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        message = "needs playwright (pip install playwright) and Chromium (apt-get install chromium)"
        assert REQUIRED not in os.environ, message
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # a container has none
        yield browser
        browser.close()
