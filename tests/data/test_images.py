"""Pictures of every kind, read with known colours; 8 bits to [-1, 1] and back; grids."""

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ilvr_lightning.data import images
from ilvr_lightning.data.images import (
    BrokenImageError,
    fit_image,
    from_tensor,
    read_image,
    to_image,
    to_pixels,
    to_tensor,
)
from ilvr_lightning.data.references import find_images, fitted, read_references
from ilvr_lightning.errors import UserError
from ilvr_lightning.visual.grids import Column, draw_grid

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_palette_becomes_rgb() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    read = read_image(encoded(image))
    assert read.mode == "RGB"
    assert to_pixels(read).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_palette_with_transparency_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert to_pixels(read_image(encoded(image, transparency=0))).tolist() == [[[255] * 3, [200, 100, 50]]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_alpha_and_greyscale(mode: str, colour: Any, expected: tuple[int, int, int]) -> None:
    assert read_image(encoded(Image.new(mode, (1, 1), colour))).getpixel((0, 0)) == expected


@pytest.mark.parametrize(("highest", "expected"), [(65535, [0, 100, 255]), (257 * 120, [0, 100, 120])])
def test_greyscale_of_16_bits_is_scaled_not_clipped(highest: int, expected: list[int]) -> None:
    values = np.array([[0, 257 * 100, highest]], dtype=np.uint16)
    assert to_pixels(read_image(encoded(Image.fromarray(values))))[0, :, 0].tolist() == expected


def test_dark_picture_of_16_bits_stays_dark() -> None:
    assert to_pixels(read_image(encoded(Image.fromarray(np.full((1, 2), 200, dtype=np.uint16))))).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.2, 1.0]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0.0, np.nan, -np.inf, 1.0]], dtype=np.float32), [0, 0, 0, 255]),
        (np.array([[0x7FA00000, 0x3F800000]], dtype=np.uint32).view(np.float32), [0, 255]),  # a signalling NaN
        (np.array([[0, 51, 255]], dtype=np.int32), [0, 51, 255]),
        (np.array([[0, 13107, 65535]], dtype=np.int32), [0, 51, 255]),
    ],
)
def test_integers_and_floats(values: Any, expected: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_image(encoded(Image.fromarray(values), "TIFF"))
    assert to_pixels(read)[0, :, 1].tolist() == expected


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    pixels = to_pixels(read_image(encoded(image, "JPEG", quality=95))).reshape(-1, 3)
    assert np.abs(pixels.astype(int) - RED).max() <= 4


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    read = read_image(encoded(image, exif=exif))
    assert read.size == (1, 2)
    assert to_pixels(read)[:, 0].tolist() == [list(RED), list(BLUE)]


@pytest.mark.parametrize(("colour", "grey"), [((255, 255, 255), 255), ((0, 0, 0), 0), (RED, 76)])
def test_one_channel(colour: tuple[int, int, int], grey: int) -> None:
    reference = fitted("x", Image.new("RGB", (5, 7), colour), (4, 4), 1)
    assert reference.pixels.shape == (4, 4, 1)
    assert reference.tensor.shape == (1, 4, 4)
    assert (reference.pixels == grey).all()
    assert to_image(reference.pixels).mode == "L"


def halves() -> Image.Image:
    """32 by 16: red, then blue."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    return image


def test_crop_takes_the_centre() -> None:
    pixels = to_pixels(fit_image(halves(), (16, 16)))
    assert (pixels[:, :6] == RED).all()
    assert (pixels[:, 10:] == BLUE).all()
    assert to_pixels(fit_image(halves(), (8, 24))).shape == (8, 24, 3)


def test_pad_keeps_all_within_white_margins() -> None:
    pixels = to_pixels(fit_image(halves(), (16, 16), "pad"))
    assert (pixels[:4] == 255).all()
    assert (pixels[12:] == 255).all()
    assert (pixels[6:10, :5] == RED).all()
    assert (pixels[6:10, 11:] == BLUE).all()


def test_all_256_values_come_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    x = to_tensor(pixels)
    assert x.dtype == torch.float32
    assert x.shape == (1, 16, 16)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert (from_tensor(x) == pixels).all()
    assert from_tensor(torch.tensor([[[-3.0, 3.0]]])).ravel().tolist() == [0, 255]


@pytest.mark.parametrize("cut", [0, 30, 0.6])
def test_broken_files_are_named(tmp_path: Path, cut: float) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    path = tmp_path / "broken.png"
    path.write_bytes(data[: int(cut if cut > 1 else cut * len(data))])
    with pytest.raises(BrokenImageError, match=r"broken\.png cannot be read as an image"):
        read_image(path)


def test_what_is_no_picture_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zeros.png"):
        with pytest.raises(BrokenImageError, match=rf"{name} cannot be read as an image: it is no file"):
            read_image(tmp_path / name)
    with pytest.raises(BrokenImageError, match="another format than PNG"):
        read_image(encoded(Image.new("RGB", (4, 4)), "PPM"))


@pytest.mark.parametrize(("kind", "side"), [("PNG", 9500), ("WEBP", 5100), ("TIFF", 7000)])
def test_pictures_that_would_fill_the_memory(kind: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (side, 1)), kind)
    monkeypatch.setattr(Image.Image, "height", property(lambda image: side))
    with pytest.raises(BrokenImageError, match=f"{side}x{side} pixels.*give one of at most"):
        read_image(data)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 7, (7, 7, 7)), ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 9, (9, 9, 9)), ("P", 1, (200, 100, 50)), ("RGBA", (255, 0, 0, 128), (255, 127, 127)), ("LA", (0,
        51), (204, 204, 204)),
    ],
)  # fmt: skip
def test_a_very_large_picture_is_read_smaller(
    mode: str, colour: Any, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LARGE", "LARGE_WITH_ALPHA", "LARGE_TRANSPARENT"):
        monkeypatch.setattr(images, name, 1000)
    monkeypatch.setattr(images, "STRIP", 500)
    image = Image.new(mode, (101, 40), colour)
    if mode == "P":
        image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(image.crop((0, 0, 1, 1)).resize((50, 40)), (51, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    read = read_image(encoded(image, exif=exif))
    assert read.size == (8, 21)  # a fifth, turned
    assert (to_pixels(read) == expected).all()
    assert read_image(encoded(Image.new("RGB", (25, 40)), "JPEG")).size == (25, 40)


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()

    def names(*patterns: str) -> list[str]:
        return [p.name for p in find_images([str(tmp_path / p) for p in patterns])]

    assert names(".") == ["a.JPG", "b.png", "c.webp"]
    assert names("*.png", ".", "note.txt") == ["b.png", "a.JPG", "c.webp", "note.txt"]
    with pytest.raises(UserError, match=r"--ref: there is no file or folder .*nothing\.png"):
        names("nothing.png")
    for pattern in ("empty", "*.gif"):
        with pytest.raises(UserError, match=r"grid\.references: no images in .*known endings"):
            find_images([str(tmp_path / pattern)], "grid.references")


def test_equal_references_are_read_once(tmp_path: Path) -> None:
    for folder, colour in (("one", RED), ("two", RED), ("three", BLUE)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / folder / "x.png")
    read = read_references(find_images([str(tmp_path)]), (4, 4), 3)
    assert [r.name for r in read] == ["x", "x"]
    assert {tuple(r.pixels[0, 0].tolist()) for r in read} == {RED, BLUE}


@pytest.mark.parametrize("side", [1, 8, 200])
def test_grid_tiles_are_where_they_should_be(side: int) -> None:
    def tile(*colour: int) -> Any:
        return np.full((side, side, 3), colour, dtype=np.uint8)

    colours = [[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(9, 9, 9), (90, 90, 9), (9, 90, 90)]]
    columns = [
        Column(label="reference", rows=[[tile(*row[0])] for row in colours]),
        Column(label="a label that is far too long for the tiles under it " * 3, rows=[[tile(*c) for c in row[1:]]
                                                                                      for row in colours]),
    ]  # fmt: skip
    sheet = draw_grid(columns, "title")
    edge = side * max(1, -(-96 // side))  # enlarged by a whole number
    lefts = [12, 12 + edge + 12, 12 + edge + 12 + edge + 2]
    for i, row in enumerate(colours):
        top = 44 + i * (edge + 2)
        for left, colour in zip(lefts, row, strict=True):
            corners = [(left, top), (left + edge - 1, top + edge - 1)]
            assert [sheet.getpixel(corner) for corner in corners] == [colour, colour]
    assert np.asarray(sheet)[:44].min() < 128  # something is written
    assert np.asarray(sheet)[44:, :12].min() == 255
    assert sheet.getpixel((lefts[1] - 6, 60)) == (255, 255, 255)


def test_grid_of_greyscale_tiles() -> None:
    sheet = draw_grid([Column(label="x", rows=[[np.full((8, 8, 1), 70, dtype=np.uint8)]])], "title")
    assert sheet.getpixel((20, 60)) == (70, 70, 70)


def with_a_broken_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a description longer than an offset, which is elsewhere"
    return encoded(Image.new("RGB", (8, 8)), exif=exif.tobytes()[:20])


def test_what_pillow_warns_of_is_not_heard() -> None:
    broken = with_a_broken_exif()
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        ImageOps.exif_transpose(Image.open(io.BytesIO(broken)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(broken)


def test_other_warnings_are_heard_while_threads_read() -> None:
    here, go_on = Event(), Event()

    def use(image: Image.Image) -> None:
        here.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(images.decoded, with_a_broken_exif(), use)
        assert here.wait(60)
        with pytest.warns(UserWarning, match="still heard"):
            warnings.warn("still heard", stacklevel=1)
        go_on.set()
        reading.result()
