"""Pages for a browser."""

import tomllib

from ilvr_lightning.visual import pages
from tests.support.paths import ROOT


def test_an_installed_package_has_the_templates() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["ilvr_lightning"]
    package = ROOT / "ilvr_lightning"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in package.rglob("*") if path.suffix in (".css", ".html")} <= installed
    assert package / "visual" / "samples.html" in installed
    assert pages.MARK in (package / "visual" / "samples.html").read_bytes()[:1000]
    assert pages.MARK in (package / "visual" / "grids.html").read_bytes()[:1000]
