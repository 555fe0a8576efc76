"""Pictures as HTML: everything is in the text itself, so that no file is written and nothing is asked for."""

import base64
import functools
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from ilvr_lightning.data.images import Pixels, fit_image, read_image, to_image, to_pixels

SMALL = 128
"""Pictures with fewer pixels per side are enlarged pixel by pixel, larger ones smoothly."""

THUMBNAIL = 96
"""Pixels per side of an example."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with what is said of it."""

    pixels: Pixels
    """(H, W, C)."""
    caption: str
    file: str = ""
    """The name under which it is downloaded; empty where it cannot be."""
    recipe: PngInfo | None = None
    """The recipe, which the PNG holds."""
    is_quiet: bool = False
    """Whether it is a prediction that the next one replaces: then it is compressed with loss, to be sent quickly."""

    @functools.cached_property
    def address(self) -> str:
        """The picture as a data: address."""
        file, kind = io.BytesIO(), "WEBP" if self.is_quiet else "PNG"
        to_image(self.pixels).save(file, kind, **({"quality": 80} if self.is_quiet else {"pnginfo": self.recipe}))
        return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"

    def image(self) -> str:
        """The picture alone."""
        small = ' class="small"' if min(self.pixels.shape[:2]) <= SMALL else ""
        return f'<img src="{self.address}" alt="{html.escape(self.caption)}"{small}>'

    def button(self, number: int, label: str) -> str:
        """The picture as a button."""
        label = html.escape(label)
        return (
            f'<button type="button" data-number="{number}" aria-label="{label}" title="{label}">{self.image()}</button>'
        )

    def html(self, number: int | None = None) -> str:
        """The picture, a button where it has a number, with its caption and its link."""
        caption, link = html.escape(self.caption), ""
        image = self.image() if number is None else self.button(number, f"Compare {self.caption}")
        if self.file and not self.is_quiet:
            title = f'download="{html.escape(self.file)}" aria-label="Download {caption} as a PNG"'
            link = f'<a href="{self.address}" {title}>PNG</a>'
        return f"<figure>{image}<figcaption><span>{caption}</span>{link}</figcaption></figure>"


def thumbnails(paths: Sequence[str]) -> str:
    """Buttons with small pictures of files."""
    buttons = []
    for number, path in enumerate(paths):
        pixels = to_pixels(fit_image(read_image(Path(path)), (THUMBNAIL, THUMBNAIL)))
        name = Path(path).stem.replace("_", " ")
        buttons.append(Picture(pixels=pixels, caption=name, is_quiet=True).button(number, f"Take {name}"))
    return f'<div class="thumbnails">{"".join(buttons)}</div>' if buttons else ""


def strip(given: Sequence[Picture], samples: Sequence[Picture]) -> str:
    """What is given and what is drawn of it, in two groups."""
    left = "".join(picture.html() for picture in given)
    right = "".join(picture.html(number) for number, picture in enumerate(samples))
    return f'<div class="strip"><div class="given">{left}</div><div class="samples">{right}</div></div>'


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Picture, Sequence[Picture | None]]]) -> str:
    """A table: per row a heading, what is given, and a picture per column, None where it is still to be drawn."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in ("", "low-pass image", *columns))
    lines = []
    for heading, given, pictures in rows:
        cells = "".join(f"<td>{picture.html() if picture else ''}</td>" for picture in (given, *pictures))
        lines.append(f'<tr><th scope="row">{html.escape(heading)}</th>{cells}</tr>')
    return f'<div class="sheet"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def sentences(texts: Sequence[str]) -> str:
    """Sentences as paragraphs; their words may come from anyone."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)
