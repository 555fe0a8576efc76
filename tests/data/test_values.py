"""Files of more than 8 bits: which of their values are black and white, what is read, and what is refused."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile

from ilvr_lightning.config.load import from_dict
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data import values
from ilvr_lightning.data.images import BrokenImageError, image_size, read_image, to_pixels
from ilvr_lightning.data.references import find_references
from ilvr_lightning.data.values import Page
from ilvr_lightning.errors import UserError
from tests.support.image_sets import data_config as config
from tests.support.image_sets import encode, png, set_up, stream_config

HIGH = {8: 255, 10: 1023, 12: 4095, 14: 16383, 16: 65535}


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png16(array: NDArray[np.uint16]) -> bytes:
    """(H, W, 1 to 4) as a PNG of 16 bits, which Pillow does not write in colour."""
    height, width, channels = array.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def ramp(high: float, dtype: Any = np.uint16, channels: int = 1, low: float = 0) -> NDArray[Any]:
    """(4, 8, channels) from low to high."""
    values = np.linspace(low, high, 32 * channels).astype(dtype)
    return values.reshape(4, 8, channels)


KINDS: dict[str, Any] = {
    "PNG, one channel": lambda a: png16(a[:, :, :1]),
    "PNG, three channels": lambda a: png16(a),
    "TIFF, one channel": lambda a: tiff(a[:, :, 0]),
    "TIFF, one channel, big-endian": lambda a: tiff(a[:, :, 0], byteorder=">"),
    "TIFF, one channel, deflate": lambda a: tiff(a[:, :, 0], compression="zlib"),
    "TIFF, three channels": lambda a: tiff(a, photometric="rgb"),
    "TIFF, three channels, deflate, predictor": lambda a: tiff(a, photometric="rgb", compression="zlib", predictor=2),
    "TIFF, three channels, planar": lambda a: tiff(np.moveaxis(a, -1, 0), photometric="rgb", planarconfig="separate"),
    "TIFF, three channels, tiled": lambda a: tiff(a, photometric="rgb", tile=(16, 16)),
    "BigTIFF, three channels": lambda a: tiff(a, photometric="rgb", bigtiff=True),
    "npy (H, W)": lambda a: npy(a[:, :, 0]),
    "npy (H, W, 1)": lambda a: npy(a[:, :, :1]),
    "npy (H, W, 3)": npy,
    "npy, big-endian": lambda a: npy(a.astype(">u2")),
    "npy, Fortran order": lambda a: npy(np.asfortranarray(a)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", HIGH)
def test_every_kind_of_file_and_depth(kind: str, bits: int) -> None:
    array = ramp(HIGH[bits], channels=3)
    data = KINDS[kind](array)
    expected = np.rint(array * (255 / HIGH[bits])).astype(np.uint8)
    grey = "one channel" in kind or kind in ("npy (H, W)", "npy (H, W, 1)")
    expected = np.repeat(expected[:, :, :1], 3, axis=2) if grey else expected
    assert (to_pixels(read_image(data, 3, (0, HIGH[bits]))) == expected).all()
    assert image_size(data) == (8, 4)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "u4", "i4"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("write", [tiff, npy])
def test_floats_and_other_integers(dtype: str, channels: int, write: Any) -> None:
    if write is tiff and channels == 3 and dtype in ("i4", "u4", "i2"):
        array = ramp(100, dtype, 3)
        data = tiff(array, photometric="rgb")
    else:
        array = ramp(100, dtype, channels, low=-20 if dtype[0] != "u" else 0)
        data = write(
            array if channels == 3 else array[:, :, 0],
            **({"photometric": "rgb"} if write is tiff and channels == 3 else {}),
        )
    low = float(array.min())
    expected = np.rint((array.astype("f8") - low) * (255 / (100 - low)))
    found = to_pixels(read_image(data, channels, (low, 100)))
    assert np.abs(found - expected).max() <= (1 if dtype == "f2" else 0)


def test_values_beyond_the_range_are_clipped_and_nan_is_black() -> None:
    data = tiff(np.array([[-5, 0, 60, 100, 1e30, np.inf, np.nan]], dtype=np.float32))
    assert to_pixels(read_image(data, 1, (0, 100))).ravel().tolist() == [0, 0, 153, 255, 255, 255, 0]
    assert to_pixels(read_image(data, 1, (-100, 100))).ravel().tolist()[-1] == 0


def test_eight_bits_stay_as_they_are() -> None:
    array = ramp(255, np.uint8, 3)
    for data in (
        encode(Image.fromarray(array)),
        tiff(array, photometric="rgb"),
        npy(array),
        encode(Image.fromarray(array), "BMP"),
    ):
        assert (to_pixels(read_image(data, 3, (0, 4095))) == array).all()
    assert to_pixels(read_image(npy(np.array([[True, False]])), 1, (0, 4095))).ravel().tolist() == [255, 0]


def test_alpha_is_of_the_full_depth() -> None:
    array = np.concatenate([ramp(4095, channels=3), np.full((4, 8, 1), 65535, np.uint16)], axis=2)
    array[0, 0, 3] = 0
    for data in (png16(array), tiff(array, photometric="rgb", extrasamples=["unassalpha"])):
        pixels = to_pixels(read_image(data, 3, (0, 4095)))
        assert pixels[0, 0].tolist() == [255] * 3  # over white
        assert (pixels[1:] == np.rint(array[1:, :, :3] * (255 / 4095))).all()


def test_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files whose pixels Pillow does not give."""
    array = ramp(4095, channels=3)
    data = tiff(array, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    expected = np.rint(np.rot90(array, -1) * (255 / 4095))
    assert (to_pixels(read_image(data, 3, (0, 4095))) == expected).all()
    assert image_size(data) == (4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.new("RGB", (8, 4)), exif=exif)
    assert image_size(turned) == (4, 8)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    assert image_size(turned) == (4, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(np.zeros((4, 4, 5), np.uint8), photometric="minisblack", planarconfig="contig"), "has 5 channels; im"),
        (tiff(np.zeros((5, 4, 4), np.uint16), photometric="minisblack", planarconfig="separate"), "it has 5 channels"),
        (tiff(np.zeros((4, 4, 4), np.float32), photometric="minisblack", planarconfig="contig"), "it has 4 channels"),
        (tiff(np.zeros((4, 4), np.complex64)), "its values are of the type complex64"),
        (tiff(np.zeros((4, 4, 3), np.float64), photometric="rgb", compression="lzma"), "its compression is LZMA, and"),
        (npy(np.zeros((4, 4, 4), np.uint8)), r"it is an array of uint8, \(4, 4, 4\); an image is \(H, W\) or"),
        (npy(np.zeros(4)), r"it is an array of float64, \(4,\)"),
        (npy(np.zeros((0, 4))), r"it is an array of float64, \(0, 4\)"),
        (npy(np.array([[{}]], dtype=object)), "it is an array of object"),
        (npy(np.zeros((4, 4)))[:-8], "cannot be read as an image"),
        (tiff(np.zeros((4, 4), np.float64))[:-8], "cannot be read as an image"),
        (png16(ramp(4095, channels=3))[:60], "cannot be read as an image"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_said_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason) as caught:
        read_image(data, 3, (0, 1))
    assert "\n" not in str(caught.value)


def test_large_arrays_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_BYTES", 4 * 8 * 3 * 2 - 1)
    for data in (npy(ramp(9, channels=3)), tiff(ramp(9, channels=3), photometric="rgb")):
        with pytest.raises(BrokenImageError, match="values of 16 bits, and 0 MB are read; make it smaller"):
            read_image(data, 3, (0, 1))


def test_parts_that_grow_when_they_are_unpacked_are_refused() -> None:
    data = tiff(np.zeros((64, 64), np.float64), compression="zlib")
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        page = opened.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    bomb = zlib.compress(bytes(64 * 64 * 8 + 1), 9)
    assert len(bomb) <= count + 8
    with pytest.raises(BrokenImageError, match="a part of it is larger than it says"):
        read_image(data[:offset] + bomb[:count].ljust(count, b"\0") + data[offset + count :], 1, (0, 1))


# The range of a data set


def folder(path: Path, *arrays: NDArray[Any], write: Any = tiff, ending: str = "tif") -> Path:
    path.mkdir()
    for i, array in enumerate(arrays):
        (path / f"{i}.{ending}").write_bytes(write(array))
    return path


@pytest.mark.parametrize("bits", HIGH)
def test_depth_is_found_and_said(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image has the largest values; all are read with the same range."""
    dark, bright = ramp(HIGH[bits] // 8)[:, :, 0], ramp(HIGH[bits] - 1)[:, :, 0]
    path = folder(tmp_path / "set", dark, dark, dark, bright, dark)
    data = set_up(config(path, image_size=4, validation_fraction=0.2))
    assert data.config.value_range == (0, HIGH[bits])
    assert f"values       0 to {HIGH[bits]}, {bits}-bit: " in capsys.readouterr().out
    assert data.train is not None and data.validation is not None
    peaks = [float(part[i][0].max()) for part in (data.train, data.validation) for i in range(len(part))]
    assert sorted(round(peak, 1) for peak in peaks)[-2] < -0.6


@pytest.mark.parametrize(
    ("low", "high", "expected", "words"),
    [
        (0, 0.9, (0, 1), "floats"), (-0.9, 0.9, (-1, 1), "floats"), (0, 200, (0, 255), "floats"),
        (0, 0.125, (0, 0.125), "floats, smallest to largest"), (-300, 5, (-300, 5), "floats, smallest to largest"),
        (3, 3, (3, 4), "floats, smallest to largest"),
    ],
)  # fmt: skip
def test_ranges_of_floats(
    low: float, high: float, expected: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "set", *[ramp(high, np.float32, 1, low)] * 3, write=npy, ending="npy")
    assert set_up(config(path, image_size=4)).config.value_range == expected
    assert f"values       {expected[0]:g} to {expected[1]:g}, {words}: " in capsys.readouterr().out


def test_percentiles_leave_hot_pixels_out(tmp_path: Path) -> None:
    hot = np.random.default_rng(0).integers(100, 900, (60, 60), dtype=np.uint16)
    hot[0, 0] = 65535
    path = folder(tmp_path / "set", hot, hot, hot)
    assert set_up(config(path)).config.value_range == (0, 65535)
    low, high = set_up(config(path, value_range="percentile")).config.known_range or (0, 0)
    assert 100 <= low < 105 and 895 < high < 901
    assert set_up(config(path, value_range=(100, 900))).config.value_range == (100, 900)


def test_sets_of_8_bits_have_no_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "set", *[ramp(255, np.uint8)[:, :, 0]] * 3)
    assert set_up(config(path)).config.value_range == "auto"
    assert capsys.readouterr().out == ""


def test_streamed_sets_have_the_range_of_what_is_held_out(tmp_path: Path) -> None:
    import datasets

    rows = [{"bytes": tiff(ramp(4000)[:, :, 0]), "path": None}] * 12
    datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "train.parquet"
    )
    assert set_up(stream_config(tmp_path)).config.value_range == (0, 4095)


def test_integers_and_floats_have_no_common_range(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", ramp(4095)[:, :, 0], ramp(1, np.float32)[:, :, 0])
    with pytest.raises(UserError, match=r"holds files of integers and files of floats; give data\.value_range="):
        set_up(config(path))
    set_up(config(path, value_range=[0, 4095]))


@pytest.mark.parametrize("given", [[5, 5], [9, 1], [0, float("inf")], "none", [1, 2, 3], [1]])
def test_ranges_that_are_none(given: Any) -> None:
    with pytest.raises(UserError, match=r"value_range|tuple"):
        from_dict(DataConfig, {"value_range": given})


def test_sets_of_which_nothing_is_read_say_why(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", *[np.zeros((4, 4, 6), np.float32)] * 3, write=npy, ending="npy")
    with pytest.raises(UserError, match=r"no image in it can be read: .* \(4, 4, 6\)"):
        set_up(config(path))


def test_references_are_read_with_the_range(tmp_path: Path) -> None:
    for name, data in (("a.npy", npy(ramp(4095))), ("b.tif", tiff(ramp(4095)[:, :, 0])), ("c.png", png(9))):
        (tmp_path / name).write_bytes(data)
    dark, bright = (find_references([str(tmp_path)], (3, 4, 8), value_range=r) for r in (None, (0, 4095)))
    assert [int(r.pixels.max()) for r in dark] == [16, 16, 246]
    assert [int(r.pixels.max()) for r in bright] == [255, 255, 246]


# Pages


def stack(*shades: int) -> bytes:
    return tiff(np.stack([np.full((8, 8), shade, np.uint8) for shade in shades]), photometric="minisblack")


def shades(part: Any) -> list[int]:
    return [round((float(part[i][0].mean()) + 1) * 127.5) for i in range(len(part))]


def test_pages_are_images_or_are_said_to_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "a.tif").write_bytes(stack(10, 20, 30))
    (path / "b.tif").write_bytes(stack(40))
    (path / "c.png").write_bytes(encode(Image.new("L", (8, 8), 50)))
    (path / "d.tif").write_bytes(stack(60, 70))
    first, every = set_up(config(path)), set_up(config(path, pages="all"))
    out = capsys.readouterr().out
    assert out == "pages        at least 3 pages of TIFFs are left out; data.pages=all takes them\n"
    assert sorted(shades(first.train) + shades(first.validation)) == [10, 40, 50, 60]
    assert sorted(shades(every.train) + shades(every.validation)) == [10, 20, 30, 40, 50, 60, 70]
    with pytest.raises(ValueError, match=r"data\.streaming=true reads the first page"):
        stream_config(path, pages="all")


def test_thumbnails_are_no_pages(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for shade, kind in ((1, 0), (2, 1), (3, 0)):
            writer.write(np.full((8, 8), shade, np.uint8), subfiletype=kind, metadata=None)
    assert values.pages(file.getvalue()) == [0, 2]
    assert to_pixels(read_image(Page(file.getvalue(), 2), 1)).max() == 3
    with pytest.raises(BrokenImageError, match=r"an image \(page 10\) cannot be read"):
        read_image(Page(file.getvalue(), 9), 1)


def test_pages_that_lead_back_to_themselves_count_once() -> None:
    data = bytearray(stack(7))
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        (page,) = opened.pages
        assert isinstance(page, tifffile.TiffPage)
        entries = struct.unpack_from("<H", data, page.offset)[0]
        struct.pack_into("<I", data, page.offset + 2 + 12 * entries, page.offset)
    assert values.pages(bytes(data)) == [0]


def test_pages_of_16_bits_in_colour() -> None:
    data = tiff(np.stack([ramp(1000 * n, channels=3) for n in (1, 2)]), photometric="rgb")
    assert to_pixels(read_image(Page(data, 1), 3, (0, 4095))).max() == round(2000 / 4095 * 255)
