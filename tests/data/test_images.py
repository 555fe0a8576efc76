"""Images of every kind, read with known colours; 8 bits to [-1, 1] and back."""

import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from ilvr_lightning.data import images
from ilvr_lightning.data.images import (
    BrokenImageError,
    fit_image,
    from_tensor,
    open_image,
    read_image,
    to_pixels,
    to_tensor,
)
from ilvr_lightning.errors import UserError
from tests.support.image_sets import encode as encoded

RED, BLUE = (255, 0, 0), (0, 0, 255)


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


def test_dark_image_of_16_bits_stays_dark() -> None:
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


def test_what_is_no_image_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zeros.png"):
        with pytest.raises(BrokenImageError, match=rf"{name} cannot be read as an image: it is not a file"):
            read_image(tmp_path / name)
    with pytest.raises(BrokenImageError, match="its format is none of PNG, "):
        read_image(encoded(Image.new("RGB", (4, 4)), "PPM"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK"])
@pytest.mark.parametrize("kind", images.FORMATS)
def test_images_with_too_many_pixels(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose conversion needs copies have a smaller limit; nothing is decoded of what is refused."""
    monkeypatch.setattr(images, "MAX_PIXELS", 400)
    monkeypatch.setattr(images, "MAX_PIXELS_WITH_COPIES", 200)
    try:
        pictures = [Image.new(mode, (width, 10)) for width in (20, 21, 41)]
        for picture in pictures if mode == "P" else ():
            picture.putpalette(range(256))  # Pillow 12 cannot read its own BMP of an empty palette
        small, large, huge = (encoded(picture, kind) for picture in pictures)
    except (OSError, ValueError):
        return  # the format has no such mode
    with Image.open(io.BytesIO(small)) as image:
        needs_copies = image.mode not in ("1", "L", "P", "RGB") or (image.mode == "RGB" and kind in ("WEBP", "TIFF"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(BrokenImageError, match=r"it has 41x10 pixels, and an image of its kind may have .*; make it"):
        read_image(huge)
    if needs_copies:
        with pytest.raises(BrokenImageError, match="it has 21x10 pixels"):
            read_image(large)
    monkeypatch.undo()
    assert read_image(small).size == (20, 10)


def test_transparent_colours_and_progressive_files_need_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS_WITH_COPIES", 200)
    for data in (
        encoded(Image.new("P", (21, 10)), transparency=0),
        encoded(Image.new("RGB", (21, 10)), transparency=(0, 0, 0)),
        encoded(Image.new("RGB", (21, 10)), "JPEG", progressive=True),
    ):
        with pytest.raises(BrokenImageError, match="it has 21x10 pixels"):
            read_image(data)


def test_decompression_bombs() -> None:
    """Pillow refuses them itself."""
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = (50_000).to_bytes(4, "little") * 2
    with pytest.raises(BrokenImageError, match=r"an image cannot be read as an image: .*exceeds limit"):
        read_image(bytes(data))


def test_large_jpegs_are_decoded_at_half_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph = encoded(Image.new("RGB", (100, 60), (200, 100, 50)), "JPEG")
    assert read_image(photograph).size == (100, 60)
    monkeypatch.setattr(images, "DRAFT_PIXELS", 1000)
    monkeypatch.setattr(images, "MAX_PIXELS", 1500)  # which it exceeds before the draft alone
    small = read_image(photograph)
    assert small.size == (50, 30)
    assert np.abs(to_pixels(small).astype(int) - (200, 100, 50)).max() <= 3
    assert read_image(encoded(Image.new("RGB", (40, 30)))).size == (40, 30)


def with_a_broken_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a description longer than an offset, which is elsewhere"
    return encoded(Image.new("RGB", (8, 8)), exif=exif.tobytes()[:20])


def damaged_tiff() -> bytes:
    """An image of which libtiff complains in its own words: "Using code not yet in table"."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(noise), "TIFF", compression="tiff_lzw"))
    data[8:48] = bytes(40)
    return bytes(data)


def test_decoders_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The exception says what is wrong with a file: neither Pillow's warnings and logs nor libtiff add to it."""
    with pytest.raises(BrokenImageError):
        read_image(damaged_tiff())
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        ImageOps.exif_transpose(Image.open(io.BytesIO(with_a_broken_exif())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.silence_decoders()  # the filters of the import are not pytest's
        read_image(with_a_broken_exif())
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("PIL").handlers


def test_what_fails_when_it_is_converted_is_broken(tmp_path: Path) -> None:
    data = encoded(Image.new("L", (4, 4)))
    with pytest.raises(BrokenImageError, match="an image cannot be read as an image: no such mode"), open_image(data):
        raise LookupError("no such mode")
    with pytest.raises(UserError, match=r"^mine$"), open_image(data):
        raise UserError("mine")
    with pytest.raises(BrokenImageError, match="No such file"):
        read_image(tmp_path / "nothing.png")


def test_open_image_gives_any_mode_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with open_image(encoded(Image.new("LA", (2, 1), (9, 128)), exif=exif)) as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("LA", (1, 2), (9, 128))
