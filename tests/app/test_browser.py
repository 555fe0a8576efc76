"""The page in Chromium: what a visitor sees, with the mouse, the keyboard and on a phone."""

import re
from collections.abc import Callable
from pathlib import Path

from tests.support.browser import Page

Look = Callable[..., Page]
DONE = """old => {
  const drawn = document.querySelectorAll('.samples a'), n = document.querySelector('#sliders output').textContent;
  const kept = document.querySelector('.given').textContent;
  return drawn.length == 4 && drawn[0].href != old && kept.endsWith(`N=${n}`);
}"""
"""A slider that is dragged asks for the samples of every stop on its way; those of the last stop are waited for."""


def samples(page: Page) -> list[str]:
    """The addresses of the samples."""
    found: list[str] = page.eval_on_selector_all(".samples a", "links => links.map(link => link.href)")
    return found


def redrawn(page: Page, old: list[str]) -> list[str]:
    """The samples once they are others and complete."""
    page.wait_for_function(DONE, arg=old[0], timeout=120_000)
    return samples(page)


def said(page: Page, words: str) -> None:
    """Wait until the page says something of the reference."""
    page.locator("#remarks", has_text=re.compile(words)).wait_for(timeout=60_000)


def test_look_drag_download_and_drop_back(look: Look, tmp_path: Path, images: Path) -> None:
    page = look()
    assert page.locator(".given img").count() == 2 and page.locator("#examples button").count() == 12
    first = samples(page)
    assert len(set(first)) == 4
    slider = page.locator("#sliders input").first
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 3, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    assert page.locator("#sliders output").first.inner_text() == "2"
    closer = redrawn(page, first)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download Sample 3 as a PNG").click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    slider.focus()
    page.keyboard.press("End")
    far = redrawn(page, closer)
    page.locator("#picture input[type=file]").set_input_files(tmp_path / download.value.suggested_filename)
    said(page, "restored, and model and reference are the same")
    assert redrawn(page, far) == closer
    assert page.locator("#sliders output").first.inner_text() == "2"
    page.locator("#picture input[type=file]").set_input_files(images / "00.png")
    said(page, "10x9 pixels")
    redrawn(page, closer)
    page.locator("#picture input[type=file]").set_input_files(
        {"name": "x.png", "mimeType": "image/png", "buffer": b"hello"}
    )
    said(page, "cannot be read as an image")


def test_examples_settings_and_the_sheet_with_the_keyboard(look: Look) -> None:
    page = look()
    first = samples(page)
    page.locator("#examples button").nth(3).focus()
    page.keyboard.press("Enter")
    second = redrawn(page, first)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    seed = page.get_by_label("Seed")
    seed.fill("5")
    seed.press("Enter")
    third = redrawn(page, second)
    assert not set(third) & set(second)
    compared = page.locator("#compare img").last.get_attribute("src")
    page.locator(".samples button").nth(2).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("old => [...document.querySelectorAll('#compare img')].at(-1).src != old", arg=compared)
    page.get_by_role("button", name="Draw a sheet").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".sheet td a", timeout=60_000)
    assert page.locator(".sheet th[scope=col]").count() == 6


def test_a_drawing(look: Look) -> None:
    page = look()
    first = samples(page)
    page.get_by_role("tab", name="Draw").click()
    page.locator("#editor button[aria-label=Brush]").click()
    box = page.locator("#editor canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.45)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=8)
    page.mouse.up()
    uploads: list[str] = []
    page.on("request", lambda asked: uploads.extend([asked.url] * ("upload" in asked.url)))
    page.get_by_role("button", name="Use this drawing").click()
    said(page, "512x512 pixels")
    redrawn(page, first)
    assert len(uploads) <= 4  # not again at every step


def test_a_phone(look: Look) -> None:
    page = look(390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    first = samples(page)
    page.locator("#sliders input").first.fill("0")
    redrawn(page, first)
    for name in ("#picture", "#sliders", ".samples", "#compare"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name
