"""The generator: hostile inputs by hand and mutations of valid ones, each from (seed, index) alone."""

import functools
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import tifffile
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ilvr_lightning.config.describe import all_keys
from ilvr_lightning.sampling.arguments import make_parser

Program = Literal["sample", "train", "checkpoints"]
Content = bytes | Callable[[Path], object]
"""Of a file; what is large, or none (a FIFO, a link), is made by a function of its path."""

OUT = "../out"
"""The one folder that a case may write to, from the working folder."""
SECRET = "hunter2-of-the-fuzz"
"""The value of the environment's SECRET: in no message and no file."""
EXECUTED = "executed"
"""What hostile pickles and tags would make in the working folder."""
SAMPLE: tuple[str, ...] = (
    "--ref", "images/00.png", "--ckpt", "tiny.safetensors", "--factor", "2", "--steps", "2", "--num-samples", "1",
    "--device", "cpu", "--compile", "false", "--out", OUT,
)  # fmt: skip
TRAIN: tuple[str, ...] = ("tiny.yaml", "run.name=x", "trainer.max_steps=1", f"trainer.default_root_dir={OUT}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command, and the files that it meets."""

    what: str
    """For a reader."""
    program: Program = "sample"
    argv: tuple[str, ...]
    files: Mapping[str, Content] = field(default_factory=dict, repr=False)
    """By their paths from the working folder: in in/, which is the case's own, or in OUT."""
    valid: bool | None = None
    """Whether it must end with 0, or must be refused or skipped; None: either."""
    names: tuple[str, ...] = ()
    """A refusal holds one of these."""
    kind: str = ""
    index: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Valid:
    """What is mutated: the files of a run, of foreign formats, and a picture with its recipe."""

    config: str
    checkpoint: bytes
    safetensors: bytes
    adm: bytes
    """A state dict under ADM's names."""
    diffusers: Mapping[str, bytes]
    """A folder's files by their paths."""
    picture: bytes
    """A PNG with its recipe."""
    metadata: bytes
    """metadata.jsonl, the index of its folder."""
    references: Mapping[str, bytes]
    """The picture's, by file name."""


def cases(valid: Valid, seed: int, count: int) -> Iterator[Case]:
    """The first so many."""
    return (case(valid, seed, index) for index in range(count))


def case(valid: Valid, seed: int, index: int) -> Case:
    """Equal for equal (seed, index): the kinds take turns, and in each those by hand alternate with mutations."""
    kind = list(KINDS)[index % len(KINDS)]
    number, hostile = index // len(KINDS), _by_hand(valid, seed, kind)
    if number % 2 == 0 and number // 2 < len(hostile):
        return replace(hostile[number // 2], kind=kind, index=index)
    return replace(KINDS[kind][1](valid, Random(f"{seed}/{index}")), kind=kind, index=index)


@functools.cache
def _by_hand(valid: Valid, seed: int, kind: str) -> list[Case]:
    made = KINDS[kind][0](valid)
    Random(f"{seed}/{kind}").shuffle(made)
    return made


# --- bytes and values


def mutated_bytes(random: Random, whole: bytes) -> bytes:
    """A few bits, a stretch or the end changed."""
    data, at = bytearray(whole), random.randrange(len(whole) or 1)
    size = min(random.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
    match random.randrange(8):
        case 0:
            return bytes(data[:at])
        case 1:
            return bytes(data[: random.randrange(len(data) // 1024 + 1) * 1024])
        case 2:
            for _ in range(random.randrange(1, 20)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case 3:
            data[at : at + size] = random.randbytes(size)
        case 4:
            data[at : at + size] = random.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        case 5:
            del data[at : at + size]
        case 6:
            data[at:at] = data[at : at + size] * random.choice((1, 2, 100))
        case 7:
            early = random.randrange(min(64, len(data)))  # where headers say how long things are
            data[early : early + 4] = random.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(data)


def nested(depth: int, of: Any = 1) -> Any:
    """[[[...]]]"""
    for _ in range(depth):
        of = [of]
    return of


def laughs() -> Any:
    """10^30 items in 300 references."""
    of: Any = ["ha"]
    for _ in range(30):
        of = [of] * 10
    return of


def circle() -> Any:
    """A dict that holds itself."""
    of: dict[str, Any] = {}
    of["self"] = of
    return of


PLAIN: tuple[Any, ...] = (
        -1, 0, 1.5, 10**9, 10**30, 10**400, float("inf"), float("nan"), -0.0, 1e-300, None, True, "", "x", " ", "\n",
        "../../x", "a" * 300, "b" * 10**6, "${oc.env:SECRET}", "${seed}", "???", "\x1b[31m", "\u2028", "1e400", [], {},
        [None], [[]], {"": ""}, {"a": {"b": 1}}, [1, 2, 3], [-1], ["x"] * 1000, nested(50), nested(400),
)  # fmt: skip
"""What JSON and a pickle may hold in a setting's place."""
PICKLED: tuple[Any, ...] = (
    *PLAIN, laughs(), circle(), b"bytes", (1,), {1: 2}, {(1,): 2}, {"x"},
    torch.zeros(2), torch.zeros(1).expand(2**31, 2**10), torch.zeros(()), 1j,
    torch.zeros(3, dtype=torch.int64), torch.full((8,), float("nan")), "\ud800",
)  # fmt: skip


def mutated_value(random: Random, value: Any, hostile: Sequence[Any]) -> Any:
    """A nested value with one node replaced, removed, renamed or added."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if _is_list(value) else []
    if not items or random.random() < 0.12:
        return random.choice(hostile)
    copied: Any = dict(value) if isinstance(value, dict) else list(value)
    key, inner = random.choice(items)
    move = random.random()
    if move < 0.75:
        copied[key] = mutated_value(random, inner, hostile)
    elif move < 0.85:
        del copied[key]
    elif isinstance(copied, dict):
        copied[random.choice(("x", "", "a.b", "\n", "k" * 300, str(key) + "s"))] = random.choice(hostile)
        if move > 0.93:
            del copied[key]
    else:
        copied.append(random.choice(hostile))
    return tuple(copied) if isinstance(value, tuple) else copied


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def mutated_json(random: Random, text: bytes | str) -> str:
    """Mostly well-formed."""
    if random.random() < 0.15:
        return mutated_bytes(random, text.encode() if isinstance(text, str) else text).decode(errors="replace")
    made = json.dumps(mutated_value(random, json.loads(text), PLAIN))
    return made.replace('"???"', "[" * 100_000) if random.random() < 0.1 else made


# --- pictures


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", *more: bytes) -> bytes:
    """A PNG of any header, pixel data (compressed) and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join((PNG, chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b"")))


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(count: int) -> bytes:
    """So many zero bytes, deflated."""
    packer = zlib.compressobj(1)
    block = bytes(2**20)
    return b"".join([*(packer.compress(block) for _ in range(count >> 20)),
                     packer.compress(block[: count % 2**20]), packer.flush()])  # fmt: skip


def mutated_png(random: Random, data: bytes) -> bytes:
    """A chunk's content changed, its checksum right."""
    chunks, at = [], len(PNG)
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = random.randrange(len(chunks))
    name, content = chunks[place]
    chunks[place] = (name, mutated_bytes(random, content) if content else random.randbytes(8))
    return PNG + b"".join(chunk(*each) for each in chunks)


def encoded(
    kind: str, mode: str = "RGB", size: tuple[int, int] = (20, 18), colour: Any = None, **options: Any
) -> bytes:
    """A picture of noise, or of one colour."""
    file = io.BytesIO()
    bands = len(Image.new(mode, (1, 1)).getbands())
    if colour is None and mode in ("RGB", "RGBA", "CMYK", "L", "LA", "LAB", "YCbCr"):
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
        image = Image.frombytes(mode, size, pixels.tobytes())
    else:
        image = Image.new(mode, size, 0 if colour is None else colour)
    image.save(file, kind, **options)
    return file.getvalue()


def _frames(kind: str, count: int, size: tuple[int, int] = (20, 18)) -> bytes:
    return encoded(
        kind, size=size, save_all=True, append_images=[Image.new("RGB", size, (i, 0, 0)) for i in range(count)]
    )


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@functools.cache
def valid_pictures() -> dict[str, bytes]:
    """By a name that tells the format."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sixteen = io.BytesIO()
    Image.fromarray(np.arange(360, dtype=np.uint16).reshape(18, 20) * 180).save(sixteen, "PNG")
    floats = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 360, dtype=np.float32).reshape(18, 20)).save(floats, "TIFF")
    return {
        "rgb.png": encoded("PNG"), "rgba.png": encoded("PNG", "RGBA"), "grey.png": encoded("PNG", "L"),
        "la.png": encoded("PNG", "LA"), "palette.png": encoded("PNG", "P", transparency=1), "bit.png": encoded("PNG",
        "1"),
        "grey16.png": sixteen.getvalue(), "rgb16.png": png(4, 4, 16, 2, zlib.compress(bytes(4 * 25))),
        "exif.png": encoded("PNG", exif=_exif(), icc_profile=icc), "animated.png": _frames("PNG", 3),
        "rgb.jpg": encoded("JPEG"), "cmyk.jpg": encoded("JPEG", "CMYK"), "exif.jpg": encoded("JPEG", exif=_exif(8)),
        "progressive.jpg": encoded("JPEG", progressive=True, icc_profile=icc), "rgb.webp": encoded("WEBP"),
        "alpha.webp": encoded("WEBP", "RGBA", lossless=True), "animated.webp": _frames("WEBP", 3),
        "animated.gif": _frames("GIF", 3), "rgb.bmp": encoded("BMP"), "rgb.tif": encoded("TIFF"),
        "deflate.tif": encoded("TIFF", compression="tiff_adobe_deflate"), "lzw.tif": encoded("TIFF",
        compression="tiff_lzw"),
        "jpeg.tif": encoded("TIFF", compression="jpeg"), "float.tif": floats.getvalue(),
        "cmyk.tif": encoded("TIFF", "CMYK"), "pages.tif": _frames("TIFF", 3), "one.png": encoded("PNG", size=(1, 1)),
        "array.npy": _npy(np.linspace(0, 1, 60).reshape(5, 4, 3)), "grey.npy": _npy(np.eye(9, dtype=np.uint16)),
        "rgb_float.tif": _tiff(np.linspace(0, 1, 60, dtype=np.float32).reshape(5, 4, 3), photometric="rgb",
        compression="zlib"),
        "one.jpg": encoded("JPEG", size=(1, 1)), "one.gif": encoded("GIF", "L", size=(1, 1)), "line.png": encoded("PNG",
        size=(500, 1)),
    }  # fmt: skip


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _tiff(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def _tiff_bomb() -> bytes:
    """A strip of a kilobyte, as it says, that is unpacked to a gigabyte."""
    data = _tiff(
        np.random.default_rng(0).random((600, 600, 3)), photometric="rgb", compression="zlib", rowsperstrip=600
    )
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        page = opened.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    bomb = zeros(2**30)
    assert len(bomb) < count
    return data[:offset] + bomb.ljust(count, b"\0") + data[offset + count :]


def _lazy(make: Callable[..., bytes], *arguments: Any, **options: Any) -> Content:
    return lambda path: path.write_bytes(make(*arguments, **options))


def hostile_pictures() -> list[tuple[str, Content, bool | None]]:
    """(name, content, whether it is a picture)."""
    good = encoded("PNG")
    bomb = struct.pack("<HHIIIIII", 0x4D42, 0, 0, 0, 0, 40, 50_000, 50_000)
    tiff = encoded("TIFF")
    at = int.from_bytes(tiff[4:8], "little")
    loop = bytearray(tiff)
    count = int.from_bytes(tiff[at : at + 2], "little")
    loop[at + 2 + 12 * count : at + 6 + 12 * count] = tiff[4:8]  # the next directory is this one

    def tags(changes: dict[int, int]) -> bytes:
        changed = bytearray(tiff)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag = int.from_bytes(tiff[entry : entry + 2], "little")
            if tag in changes:
                changed[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, changes[tag])
        return bytes(changed)

    webp = (
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff\xff\xff\xff"
    )
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\0"
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    text = chunk(b"zTXt", b"key\0\0" + zeros(2**26))
    return [
        *((name, content, True) for name, content in valid_pictures().items()),
        ("empty.png", b"", False),
        ("half.png", good[: len(good) // 2], False),
        ("signature.png", PNG, False),
        ("bomb.png", png(50_000, 50_000, data=zeros(2**20)), False),
        ("bomb_bits.png", _lazy(lambda: png(50_000, 50_000, 1, 0, zeros(50_000 * 6251))), False),
        ("bomb_most.png", png(2**31 - 1, 2**31 - 1), False),
        ("below_pillows_limit.png", _lazy(lambda: png(13_000, 13_000, 1, 0, zeros(13_000 * 1626))), False),
        ("large_bits.png", _lazy(lambda: png(9400, 9400, 1, 0, zeros(9400 * 1176))), True),
        ("large_rgb.png", _lazy(lambda: png(9400, 9400, 8, 2, zeros(9400 * 28201))), True),
        ("large_rgba.png", _lazy(encoded, "PNG", "RGBA", (5100, 5100), (255, 0, 0, 128), compress_level=1), True),
        ("large_rgba_refused.png", _lazy(encoded, "PNG", "RGBA", (9400, 9400), (255, 0, 0, 128), compress_level=1),
        False),
        ("large_la.png", _lazy(encoded, "PNG", "LA", (5100, 5100), (9, 128), compress_level=1), True),
        ("large_la_refused.png", _lazy(encoded, "PNG", "LA", (6000, 6000), (9, 128), compress_level=1), False),
        ("large_palette.png", _lazy(encoded, "PNG", "P", (5100, 5100), 1, transparency=0, compress_level=1), True),
        ("large_palette_refused.png", _lazy(encoded, "PNG", "P", (9000, 9000), 1, transparency=0, compress_level=1),
        False),
        ("large_grey16.png", _lazy(lambda: png(5100, 5100, 16, 0, zeros(5100 * 10201))), True),
        ("large_grey16_refused.png", _lazy(lambda: png(9400, 9400, 16, 0, zeros(9400 * 18801))), False),
        ("large_rgb16.png", _lazy(lambda: png(5000, 5000, 16, 2, zeros(5000 * 30001))), True),
        ("large_alpha.png", _lazy(encoded, "PNG", "RGBA", (4000, 4000), (255, 0, 0, 128), compress_level=1), True),
        ("large_truncated.png", png(9400, 9400, data=zeros(2**20)), False),
        ("zero.png", png(0, 0), False),
        ("wide.png", _lazy(lambda: png(1_000_000, 1, 8, 2, zeros(3_000_001))), True),
        ("wide_zero.png", png(2**31 - 1, 0), False),
        ("depth.png", png(4, 4, 7, 2, zeros(100)), False),
        ("palette_none.png", png(4, 4, 8, 3, zeros(20)), None),
        ("text_bomb.png", png(4, 4, 8, 2, zeros(52), text), None),
        ("text_bombs.png", png(4, 4, 8, 2, zeros(52), *[text] * 100), None),
        ("itxt_bomb.png", png(4, 4, 8, 2, zeros(52), chunk(b"iTXt", b"key\0\1\0\0\0" + zeros(2**26))), None),
        ("icc_bomb.png", png(4, 4, 8, 2, zeros(52), chunk(b"iCCP", b"icc\0\0" + zeros(2**26))), None),
        ("long_text.png", _lazy(lambda: png(4, 4, 8, 2, zeros(52), chunk(b"tEXt", b"key\0" + b"x" * 10**7))), None),
        ("idat_bomb.png", _lazy(lambda: png(4, 4, 8, 2, zeros(2**28))), None),
        ("many_chunks.png", png(4, 4, 8, 2, zeros(52), *[chunk(b"tEXt", b"k\0v")] * 20_000), None),
        ("exif_broken.png", png(4, 4, 8, 2, zeros(52), chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 99)), None),
        ("exif_loop.png", png(4, 4, 8, 2, zeros(52), chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0\x08\0\0\0")), None),
        ("exif_99.jpg", encoded("JPEG", exif=_exif(99)), True),
        ("exif_broken.jpg", encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), True),
        ("exif_noise.jpg", encoded("JPEG", exif=b"Exif\0\0" + bytes(range(256)) * 9), True),
        ("icc_broken.jpg", encoded("JPEG", icc_profile=b"no profile"), True),
        ("icc_broken.png", encoded("PNG", icc_profile=bytes(99)), True),
        ("comment.jpg", encoded("JPEG", comment=b"\x1b[31m" * 9), True),
        ("bomb.jpg", encoded("JPEG").replace(struct.pack(">HH", 18, 20), struct.pack(">HH", 50_000, 50_000)), False),
        ("bomb_below.jpg", encoded("JPEG").replace(struct.pack(">HH", 18, 20), struct.pack(">HH", 9_400, 9_400)), None),
        ("large.jpg", _lazy(encoded, "JPEG", "RGB", (9000, 9000), (9, 99, 199)), True),
        ("large_cmyk.jpg", _lazy(encoded, "JPEG", "CMYK", (6000, 6000), (9, 99, 199, 0)), True),
        ("large_progressive.jpg", _lazy(encoded, "JPEG", "RGB", (9000, 9000), 0, progressive=True, subsampling=0),
        None),
        ("bomb.webp", webp, False),
        ("large.webp", _lazy(encoded, "WEBP", "RGB", (9000, 9000), (9, 99, 199), lossless=True, method=0), None),
        ("mid.webp", _lazy(encoded, "WEBP", "RGBA", (4500, 4500), (9, 99, 199, 99), lossless=True, method=0), True),
        ("bomb.gif", gif + frame + b";", False),
        ("frame_beyond_screen.gif", b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + frame + b";",
        False),
        ("large.gif", _lazy(encoded, "GIF", "L", (9000, 9000), 7), True),
        ("frames.gif", _lazy(_frames, "GIF", 2000, (8, 8)), True),
        ("frames.webp", _lazy(_frames, "WEBP", 300, (64, 64)), True),
        ("frames.png", _lazy(_frames, "PNG", 500, (8, 8)), True),
        ("bomb.bmp", bomb + struct.pack("<HHIIIIII", 1, 24, 0, 0, 0, 0, 0, 0), False),
        ("bomb_below.bmp", bomb.replace(struct.pack("<II", 50_000, 50_000), struct.pack("<II", 9400, 9400))
         + struct.pack("<HHIIIIII", 1, 24, 0, 0, 0, 0, 0, 0), False),
        ("rle.bmp", bomb.replace(struct.pack("<II", 50_000, 50_000), struct.pack("<II", 9400, 9400))
         + struct.pack("<HHIIIIII", 1, 8, 1, 0, 0, 0, 0, 0) + bytes(1024) + b"\xff\0" * 999, None),
        ("bomb.tif", tags({256: 50_000, 257: 50_000}), False),
        ("bomb_below.tif", tags({256: 9400, 257: 9400}), False),
        ("strips.tif", tags({278: 0}), None),
        ("samples.tif", tags({277: 2**31}), False),
        ("offset.tif", tags({273: 2**32 - 1}), False),
        ("counts.tif", tags({279: 2**32 - 1}), None),
        ("compression.tif", tags({259: 65535}), False),
        ("loop.tif", bytes(loop), True),
        ("tiles.tif", tiff[:4] + b"\xff\xff\xff\x7f" + tiff[8:], False),
        ("large.tif", _lazy(encoded, "TIFF", "RGB", (8000, 8000), 0, compression="tiff_adobe_deflate"), None),
        ("large_float.tif", _lazy(encoded, "TIFF", "F", (5000, 5000), 0.5, compression="tiff_lzw"), None),
        ("turned.tif", _lazy(encoded, "TIFF", "RGB", (4900, 4900), 0, compression="tiff_adobe_deflate",
        tiffinfo={274: 6}), True),
        ("rgb16_bomb.tif", _lazy(_tiff_bomb), False),
        ("volume.tif", _tiff(np.zeros((4, 16, 16), np.float32), volumetric=True), None),
        ("channels.tif", _tiff(np.zeros((9, 9, 7), np.uint8), photometric="minisblack", planarconfig="contig"), False),
        ("large_rgb_float.tif", _lazy(lambda: _tiff(np.zeros((4200, 4200, 3), np.float32), photometric="rgb",
         compression="zlib")), True),
        ("bomb.npy", npy.getvalue(), False),
        ("objects.npy", _npy(np.array([[Harm("os.system")]], dtype=object)), False),
        ("large.npy", _lazy(lambda: _npy(np.zeros((4200, 4200, 3), np.float32))), True),
        ("lab.tif", encoded("TIFF", "LAB"), None),
        ("really_a.jpg.png", encoded("JPEG"), True),
        ("really_a.png.gif", good, True),
        ("text.png", b"no picture", False),
        ("page.jpg", b"<!doctype html><title>404</title>", False),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', False),
        ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", False),
        ("without_local_paths.png", b"P6 4 4 255\n" + bytes(48), False),
        ("plain_portable.png", b"P2 40000 40000 65535\n" + b"1 " * 999, False),
        ("fits.png", b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800), False),
        ("photoshop.png", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99), False),
        ("icon.png", encoded("ICO", "RGBA", (16, 16)), False),
        ("icons.png", encoded("ICNS", "RGBA", (16, 16)), False),
        ("jpeg2000.png", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), False),
        ("gzip.png", b"\x1f\x8b\x08" + bytes(99), False),
        ("zip.png", _lazy(lambda: _zip({"a": b"b"})), False),
        ("pickle.png", pickle.dumps(Harm("os.system")), False),
        ("folder.png", lambda path: path.mkdir(), None),
        ("fifo.png", os.mkfifo, False),
        ("loop.png", lambda path: path.symlink_to(path.name), False),
        ("nowhere.png", lambda path: path.symlink_to("nowhere"), False),
        ("link.png", lambda path: path.symlink_to("../images/00.png"), True),
        ("zeros.png", lambda path: path.symlink_to("/dev/zero"), False),
        ("terminal.png", lambda path: path.symlink_to("/dev/tty"), False),
        ("memory.png", lambda path: path.symlink_to("/proc/self/mem"), False),
        ("sparse.png", _sparse, False),
    ]  # fmt: skip


def _sparse(path: Path) -> None:
    """A terabyte that takes no room."""
    path.touch()
    os.truncate(path, 2**40)


def _beside(name: str, content: Content) -> dict[str, Content]:
    """A training folder with three good pictures."""
    return {**{f"in/good_{i}.png": encoded("PNG", "L", colour=60 * i) for i in range(3)}, f"in/{name}": content}


def _picture_cases(flag: str, name: str, content: Content, valid: bool | None) -> Case:
    if flag == "data.path":
        return Case(what=f"{name} in data.path", program="train", argv=(*TRAIN, "data.path=in", "data.batch_size=1"),
                    files=_beside(name, content), valid=None, names=("data.path", name))  # fmt: skip
    if flag == "grid.references":
        argv = (*TRAIN, f"grid.references=[in/{name}]")
        return Case(what=f"{name} in grid.references", program="train", argv=argv, files={f"in/{name}": content},
                    valid=None if valid else valid, names=("grid.references", name))  # fmt: skip
    argv = (*SAMPLE, "--ref", f"in/{name}") if flag == "--ref" else (*SAMPLE, flag, f"in/{name}")
    valid = valid if flag == "--ref" or not valid else None
    return Case(
        what=f"{flag} {name}",
        argv=argv,
        files={f"in/{name}": content},
        valid=valid,
        names=(flag, name, Path(name).stem),
    )


def images_by_hand(_: Valid) -> list[Case]:
    made = [_picture_cases("--ref", *picture) for picture in hostile_pictures()]
    some = [p for p in hostile_pictures() if not p[0].startswith(("large", "frames", "zeros", "sparse", "memory"))]
    made += [_picture_cases("data.path", *picture) for picture in some[::6]]
    made += [_picture_cases("grid.references", *picture) for picture in some[::10]]
    made.append(Case(what="a FIFO by a glob", argv=(*SAMPLE, "--ref", "in/*.png"),
                     files={"in/fifo.png": os.mkfifo}, valid=False, names=("fifo.png",)))  # fmt: skip
    return made


def mutated_picture(_: Valid, random: Random) -> Case:
    name, data = random.choice(list(valid_pictures().items()))
    changed = (
        mutated_png(random, data) if name.endswith(".png") and random.random() < 0.5 else mutated_bytes(random, data)
    )
    flag = random.choices(("--ref", "data.path", "grid.references"), (0.9, 0.06, 0.04))[0]
    return _picture_cases(flag, name, changed, None)


def masks_by_hand(_: Valid) -> list[Case]:
    return [_picture_cases("--mask", *picture) for picture in hostile_pictures()]


def mutated_mask(valid: Valid, random: Random) -> Case:
    made = mutated_picture(valid, random)
    name, content = list(made.files.items())[-1]
    return _picture_cases("--mask", Path(name).name, content, None)


# --- configs and overrides


def _aliases(levels: int, width: int = 10) -> str:
    lines = ["a0: &a0 [ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\ngrid: {{references: *a{levels - 1}}}\n"


def _merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], y{i}: 1}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


TEXTS = ("run.name", "data.name", "data.image_column", "data.label", "data.validation_split", "data.path", "init_from")
"""Keys that may hold any text, each of which may refer to the next."""


def _references(width: int) -> str:
    return "\n".join(f"{a}: '{f'${{{b}}}' * width}'" for a, b in pairwise(TEXTS)).replace(
        "run.name:", "run: {name:").replace("'\n", "'}\n", 1) + "\n"  # fmt: skip


CONFIGS: tuple[tuple[str, str | bytes | Callable[[Path], object]], ...] = (
    ("aliases", _aliases(12)),
    ("more aliases", _aliases(40)),
    ("merges", _merges(12)),
    ("an alias to itself", "data: &a {x: *a}\n"),
    ("a list in itself", "grid: {references: &a [*a]}\n"),
    ("deep lists", "data: " + "[" * 5000),
    ("deep closed lists", "grid: {references: " + "[" * 3000 + "]" * 3000 + "}"),
    ("deep dicts", "data: " + "{a: " * 3000),
    ("deep closed dicts", "data: " + "{a: " * 400 + "1" + "}" * 400),
    ("deep blocks", "\n".join(" " * i + "a:" for i in range(900))),
    ("python/object/apply", f"seed: !!python/object/apply:os.system ['touch {EXECUTED}']\n"),
    ("python/object/new", f"data: !!python/object/new:os.system ['touch {EXECUTED}']\n"),
    ("python/name", "seed: !!python/name:os.system\n"),
    ("python/module", "seed: !!python/module:os\n"),
    ("python/tuple", "optim: {betas: !!python/tuple [0.9, 0.99]}\n"),
    ("a tag of its own", "seed: !evil 3\n"),
    ("binary", "run: {name: !!binary aGVsbG8=}\n"),
    ("set", "data: !!set {path, split}\n"),
    ("timestamp", "run: {name: 2001-01-01}\n"),
    ("environment", "run: {name: '${oc.env:SECRET}'}\n"),
    ("environment in a key", "'${oc.env:SECRET}': 1\n"),
    ("environment in a list", "grid: {references: ['${oc.env:SECRET}']}\n"),
    ("environment in a list of lists", "sampling: {octave_gains: [['${oc.env:SECRET}']]}\n"),
    ("environment by decode", "run: {name: '${oc.decode:${oc.env:SECRET}}'}\n"),
    ("environment in pieces", "data: {split: 'oc.env', name: '${${data.split}:SECRET}'}\n"),
    ("environment by select", "run: {name: '${oc.select:x,${oc.env:SECRET}}'}\n"),
    ("environment, escaped", "run: {name: '\\${oc.env:SECRET}'}\n"),
    ("environment in a trainer key", "trainer: {profiler: '${oc.env:SECRET}'}\n"),
    ("create", "data: '${oc.create:{path:x}}'\n"),
    ("itself", "run: {name: '${run.name}'}\n"),
    ("one another", "data: {path: '${data.name}', name: '${data.path}'}\n"),
    ("the whole", "run: {name: '${.}'}\n"),
    ("a section", "run: {name: '${data}'}\n"),
    ("a list of itself", "grid: {factors: '${grid.factors}'}\n"),
    ("nowhere", "run: {name: '${no.such}'}\n"),
    ("unclosed", "run: {name: '${'}\n"),
    ("deep references", "run: {name: '" + "${" * 900 + "}" * 900 + "'}\n"),
    ("references that explode", "run: {name: '" + "${data.name}" * 60 + "'}\ndata:\n"
     + "\n".join(f"  {a}: '{('${data.' + b + '}') * 60}'" for a, b in (
         ("name", "image_column"), ("image_column", "label"), ("label", "validation_split"),
         ("validation_split", "split"))) + "\n  split: hahahaha\n"),
    ("a million keys", lambda path: path.write_text("\n".join(f"k{i}: 1" for i in range(10**6)))),
    ("ten megabytes of text", lambda path: path.write_text("run: {name: " + "x" * 10**7 + "}")),
    ("a megabyte of key", "k" * 10**6 + ": 1\n"),
    ("a long key", "k" * 900 + ": 1\n"),
    ("a long section key", "data: {" + "k" * 900 + ": 1}\n"),
    ("a long value", "data: {split: " + "v" * 10**5 + "}\n"),
    ("a long number", "seed: " + "9" * 5000 + "\n"),
    ("a large number", "data: {batch_size: " + "9" * 400 + "}\n"),
    ("a float beyond all", "optim: {lr: 1.0e+400}\n"),
    ("sexagesimal", "seed: " + "59:" * 200 + "59\n"),
    ("hexadecimal", "seed: 0x" + "f" * 400 + "\n"),
    ("not a number", "optim: {lr: .nan}\n"),
    ("a null byte", b"seed: 1\0\n"),
    ("control characters", "run: {name: \"a\\x1b[31m\"}\n"),
    ("a line separator", "run: {name: \"a\\u2028b\"}\n"),
    ("a surrogate", "run: {name: \"\\ud800\"}\n"),
    ("latin 1", "run: {name: café}\n".encode("latin-1")),
    ("utf-16", "seed: 1\n".encode("utf-16")),
    ("a byte order mark", b"\xef\xbb\xbfseed: 1\n"),
    ("two documents", "seed: 1\n---\nseed: 2\n"),
    ("a list", "- seed\n"),
    ("a word", "seed\n"),
    ("a number", "3\n"),
    ("nothing", ""),
    ("a key twice", "seed: 1\nseed: 2\n"),
    ("no text for a key", "1: 2\nnull: 3\n[1, 2]: 4\n"),
    ("a question", "? {a: 1}\n: 2\n"),
    ("a directive", "%YAML 9.9\n---\nseed: 1\n"),
    ("tabs", "\tseed: 1\n"),
    ("dots in a key", "data.path: images\n"),
    ("a missing value", "data: {path: ???}\n"),
    ("sections that are none", "data: 3\nmodel: [1]\n"),
    ("an empty section", "data:\nmodel: {}\n"),
    ("out of its folder", "run: {name: ../../escaped}\n"),
    ("an absolute name", "run: {name: /tmp/escaped}\n"),
    ("binary noise", bytes(range(256)) * 40),
    ("a picture", encoded("PNG")),
    ("a FIFO", os.mkfifo),
    ("a folder", lambda path: path.mkdir()),
    ("a loop", lambda path: path.symlink_to(path.name)),
    ("zeros", lambda path: path.symlink_to("/dev/zero")),
    ("sparse", _sparse),
)  # fmt: skip
HARMLESS = {"an empty section", "nothing", "environment, escaped", "a byte order mark", "utf-16", "binary", "timestamp",
            "python/tuple", "a key twice", "set", "a long value"}  # fmt: skip
"""Of these, what may be read."""


def _config_case(what: str, content: Content, valid: bool | None, *more: str) -> Case:
    argv = ("in/x.yaml", *(TRAIN[2:] if more else TRAIN[1:]), *more)
    return Case(what=what, program="train", argv=argv, files={"in/x.yaml": content}, valid=valid, names=CONFIG_NAMES)


CONFIG_NAMES = ("x.yaml", "config", "data", "model", "optim", "grid", "seed", "run", "trainer", "sampling",
                "unknown key",
                "diffusion", "checkpoint", "ema", "calibration", "resume", "init_from", "compile",
                "references")  # fmt: skip


def configs_by_hand(_: Valid) -> list[Case]:
    made = []
    for what, content in CONFIGS:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        valid = None if what in HARMLESS else False
        made.append(_config_case(what, data, valid, "--print-config"))
    return made


def mutated_config(valid: Valid, random: Random) -> Case:
    lines = valid.config.splitlines()
    place = random.randrange(len(lines))
    line = lines[place]
    match random.randrange(6):
        case 0:
            changed = [*lines[:place], *lines[place + 1 :]]
        case 1:
            changed = [*lines[:place], line, line, *lines[place + 1 :]]
        case 2:
            changed = [*lines[:place], " " * random.randrange(1, 5) + line, *lines[place + 1 :]]
        case 3 | 4:
            at = random.randrange(len(line) + 1)
            strange = random.choice(("{", "[", "}", "]", "&a ", "*a ", "!", "|", ">", "%", "@", "`", '"', "'", "\t",
            "#", ": ",
                                     "- ", "${", "}", "\0", "\x85", "\u2028", "\\", "?", "~", ",", "é", "=",
                                     "<<: "))  # fmt: skip
            changed = [*lines[:place], line[:at] + strange + line[at + random.randrange(3) :], *lines[place + 1 :]]
        case _:
            key = random.choice(list(all_keys()))
            return _config_case(f"{key} of a strange value", _as_yaml(random, key), None, "--print-config")
    return _config_case(f"line {place} changed", "\n".join(changed).encode(), None, "--print-config")


def _as_yaml(random: Random, key: str) -> bytes:
    section, _, name = key.rpartition(".")
    value = json.dumps(random.choice(PLAIN))
    return (f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n").encode()


HARMFUL_KEYS = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.default_root_dir", "run.name")
"""What would start processes, or says where the output goes."""
STRANGE = (
    "-1", "0", "1.5", "1e400", "-1e400", "nan", "inf", "1_000", "0x10", "0o7", "9" * 400, "9" * 5000, "1000000000000",
    "true",
    "null", "~", "", " ", "''", '"', "[", "[]", "{}", "[1", "[1,2]", "[[1]]", "{a: 1}", "{a: {b: {c: 1}}}", "x",
    "x" * 300,
    "x" * 10**5, "../../x", "-x", "--x", "${seed}", "${oc.env:SECRET}", "${oc.env:SECRET,x}", "${", "${}", "${.}",
    "???",
    "a=b", "a: b", "!!python/name:os.system", f"!!python/object/apply:os.system ['touch {EXECUTED}']", "&a [*a]", "*a",
    "a\nb", "a\0b", "a\x1b[31m", "\udcff", "٣", "²", "½", "\u202e", "%s", "{0}", "auto", "[" * 2000, "{a: " * 2000,
    "[" * 300 + "]" * 300, "{a: " * 300 + "1" + "}" * 300, "&a [x,x]", "~root", "~nobody_of_this_name", "/dev/zero",
    "/dev/stdin",
    "https://example.com/x.png", "hf://x/y", "*", "**", "a/b", "\\\\server\\x", "C:\\x", "|", "data/toon:test[0:1]",
)  # fmt: skip
"""Values of settings and flags."""


def _override(argument: str, valid: bool | None = None, *more: str) -> Case:
    key = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in argument.partition("=")[0])
    names = (key[:40], key.partition(".")[0][:40], "key=value", "unknown key", "has no key", "give one config",
    "trainer.*",
             "is a section", "data.batch_size", "cannot read or write")  # fmt: skip
    what = f"override {argument[:80]!r}"
    return Case(what=what, program="train", argv=(*TRAIN, argument, *more), valid=valid, names=names)


def overrides_by_hand(_: Valid) -> list[Case]:
    deep = ".".join("a" * 500)
    refused = [
        f"{deep}=1", f"data.{deep}=1", "=1", ".=1", "..=1", "data.=1", ".data=1", "data..path=x", "data[0]=1",
        "data.path[0]=1",
        "trainer[0]=1", "[a]=1", "a[=1", "data[path=x", "grid.factors[0]=8", "k" * 10**5 + "=1",
        "data." + "k" * 10**5 + "=1",
        "seed", "--seed=1", "-seed=1", "--seed", "-", "--", "{}", "x.yaml", "tiny.yaml", "in/../tiny.yaml", "*.yaml",
        "\n.yaml",
        "seed=" + "[" * 10**5, "seed=" + "{a: " * 10**4, "${oc.env:SECRET}=1", "data.${oc.env:SECRET}=1", "${seed}=1",
        "model.channels=1000000000", "model.channels=1000000000000000000000", "model.num_res_blocks=1000000",
        "model.channel_mult=[1000000]", f"model.channel_mult=[{','.join('1' * 4000)}]",
        "diffusion.num_timesteps=1000000000",
        "diffusion.num_timesteps=100000000000000000000", "data.image_size=[8,1000000000]",
        "data.num_workers=1000000000",
        "grid.samples=1000000", "optim.lr=1e400", "data.cache_mb=-1", "run.name=../escaped", "run.name=..",
        "run.name=/tmp/x",
        "run.name=a/b", "run.name=" + "x" * 300, 'run.name="\\0"', "trainer.default_root_dir=",
        "trainer.default_root_dir=[x]", "trainer.default_root_dir=tiny.yaml", 'trainer.default_root_dir="a\\0b"',
        "trainer.default_root_dir=" + "x" * 5000, "trainer={a: 1}", "data={path: 1, nope: 2}", "data=[1]",
        "sampling.timesteps=[]",
        f"sampling.timesteps=[{','.join(map(str, range(99999, 0, -1)))}]", "sampling.octave_gains=[[[[[1]]]]]",
        f"diffusion.betas=[{','.join(['0.1'] * 3)},2]", "diffusion.betas=[]", "sampling.num_steps=2000",
        "trainer.accumulate_grad_batches=1000000000000", "trainer.max_time=x", "trainer.precision=[]",
        "trainer.limit_val_batches=x",
    ]  # fmt: skip
    return [_override(argument, False) for argument in refused]


def mutated_override(_: Valid, random: Random) -> Case:
    keys = [key for key in all_keys() if key not in HARMFUL_KEYS]
    key, value = random.choice(keys), random.choice(STRANGE)
    if random.random() < 0.1:
        key = mutated_bytes(random, key.encode()).decode(errors="replace")
    if key in ("data.num_workers", "trainer.max_steps", "trainer.max_epochs") and value.isascii() and value.isdigit():
        value = "-2"  # other numbers may be meant
    # Most are refused before a run starts, which takes half a second.
    return _override(f"{key}={value}", None, *(["--print-config"] if random.random() < 0.7 else []))


UNKNOWN_WORK = ("--compile", "-h", "--num-samples", "--image-size", "--devices", "--out", "--reproduce")
"""Flags whose value may ask for much work in good faith."""


def flags_by_hand(_: Valid) -> list[Case]:
    refused: list[tuple[str, ...]] = [
        ("--num-samples", "-1"), ("--num-samples", "9" * 5000), ("--num-samples", "1e3"), ("--num-samples", "²"),
        ("--image-size", "²"), ("--image-size", "8193"), ("--image-size", "x"), ("--image-size", "1x1x1"),
        ("--image-size", "9" * 9999),
        ("--image-size", "-8"), ("--image-size", "7"), ("--image-size", "8192"), ("--devices", "-1"), ("--devices",
        "1000000000"), ("--devices",
        "x"),
        ("--devices", "9" * 5000), ("--device", "gpu"), ("--seed", "-1"), ("--seed", "9" * 400), ("--seed", "9" * 5000),
        ("--seed", "1e1"),
        ("--out", ""), ("--out", " "), ("--out", "tiny.yaml"), ("--out", "tiny.yaml/x"), ("--out", "a\0b"), ("--out",
        "x" * 5000),
        ("--out", "/proc/x"), ("--out", "/dev/null/x"), ("--ref", ""), ("--ref", "\0"), ("--ref", "x" * 5000), ("--ref",
        "["),
        ("--ref", "~nobody_of_this_name"), ("--ref", "nothing:train"), ("--ref", "images:test"), ("--ref",
        "images:train[9:3]"),
        ("--ref", "images:train[" + "9" * 5000 + ":]"), ("--ref", "images:train[" + "9" * 30 + ":]"), ("--ref",
        "/dev/zero"),
        ("--ckpt", ""), ("--ckpt", "\0"), ("--ckpt", "x" * 5000), ("--ckpt", "/dev/zero"), ("--ckpt", "/dev/stdin"),
        ("--ckpt", "images"),
        ("--ckpt", "../../../../etc/passwd"), ("--ckpt", "tiny.yaml"), ("--ckpt", "images/00.png"), ("--ckpt", "-x"),
        ("--ckpt", "--out"),
        ("--reproduce", ""), ("--reproduce", "images/00.png"), ("--reproduce", "/dev/zero"), ("--reproduce", "\0"),
        ("--factor", "0"), ("--factor", "3"), ("--factor", "9" * 400), ("--factor", "9" * 5000), ("--factor",
        *["2"] * 1000), ("--factor",),
        ("--range", "²:0"), ("--range", "9" * 5000 + ":0"), ("--range", "1:2:3"), ("--range", "-1:0"), ("--range", ":"),
        ("--steps", "0"), ("--timesteps", "5", "9"), ("--timesteps", "9" * 400), ("--octave-gains", "nan"),
        ("--octave-gains", "1e400"), ("--octave-gains", *["1"] * 3, "x"), ("--eta", "nan"), ("--eta", "-1e400"),
        ("--override", "=1"),
        ("--override", "x=1"), ("--override", "num_heads=" + "9" * 5000), ("--override", "k" * 10**5 + "=1"),
        ("--preset", "x" * 10**5),
        ("--mask", "nothing"), ("--mask", "images"), ("--mask", ""), ("--batch-size", "0"), ("--batch-size",
        "9" * 5000),
        ("--x" + "x" * 10**5,), ("\n",), ("\x1b[31m",), ("--precision", "16"), ("--compile", "maybe"), ("--weights",
        "best"),
        ("--fit", "stretch"), ("--start-from", "0"), ("--respaced-range-t", "-1"), ("--unconditional",), ("@tiny.yaml",
        ), ("--ref=",),
    ]  # fmt: skip
    made = [
        Case(what=f"flags {' '.join(argv)[:80]!r}", argv=(*SAMPLE, *argv), valid=False, names=FLAGGED)
        for argv in refused
    ]
    checkpoints: list[tuple[str, ...]] = [
        (), ("inspect",), ("inspect", ""), ("inspect", "nothing"), ("inspect", "images"), ("inspect", "/dev/zero"),
        ("inspect", "a\0b"),
        ("inspect", "tiny.safetensors", "--override", "x=1"), ("export", "tiny.safetensors", "--to", "x", f"{OUT}/x"),
        ("export", "tiny.safetensors", "--to", "adm", f"{OUT}/x.pt"), ("export", "tiny.safetensors", "--to",
        "safetensors", "images"),
        ("export", "tiny.safetensors", "--to", "safetensors", ""), ("export", "tiny.safetensors", "--to", "safetensors",
        f"{OUT}/{'x' * 300}"),
        ("export", "tiny.safetensors", "--to", "safetensors", "a\0b"),
        ("export", "tiny.safetensors", "--to", "safetensors", f"{OUT}/x", "--calibrate", "in/fifo"),
        ("explode",),
    ]  # fmt: skip
    files: dict[str, Content] = {"in/fifo": os.mkfifo, "in/zeros": lambda path: path.symlink_to("/dev/zero")}
    return made + [
        Case(what=f"checkpoints {' '.join(argv)[:80]!r}", program="checkpoints", argv=argv, files=files, valid=False)
        for argv in checkpoints
    ]


def mutated_flags(_: Valid, random: Random) -> Case:
    actions = [a for a in make_parser()._actions if a.option_strings and a.option_strings[0] not in UNKNOWN_WORK]
    argv: list[str] = []
    for action in random.sample(actions, random.choice((1, 1, 1, 2, 3))):
        argv.append(random.choice(action.option_strings))
        if action.nargs != 0:
            choices = [str(c) for c in action.choices or () if c not in ("cuda", "mps")] or ["1", "2", "8:0", "5"]
            count = random.choice((0, 1, 1, 1, 1, 2, 5)) if action.nargs == "+" else 1
            argv += [random.choice(choices if random.random() < 0.3 else STRANGE) for _ in range(count)]
    # A value of --ref or --ckpt may be a place that takes long to look through.
    argv = ["in" if word in ("**", "*", "/dev/stdin") else word for word in argv]
    return Case(what=f"flags {' '.join(argv)[:80]!r}", argv=(*SAMPLE, *argv), names=FLAGGED)


FLAGGED = ("--", "checkpoint", "in/", "override", "cannot read or write")
"""What is named in a refusal of flags."""


# --- checkpoints


class Harm:
    """Calls a function when it is unpickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        match self.how:
            case "os.system":
                return os.system, (f"touch {EXECUTED}",)
            case "os.mkdir":
                return os.mkdir, (EXECUTED,)
            case "exec":
                return exec, (f"open({EXECUTED!r}, 'w')",)
            case "eval":
                return eval, (f"open({EXECUTED!r}, 'w')",)
            case "open":
                return open, (EXECUTED, "w")
            case _:
                return getattr, ("x", "format")


def _zip(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def torch_zip(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, of any pickle."""
    return _zip({"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"}, compression)


def saved(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A zip file with other entries, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _zip({name: change(name, archive.read(name)) for name in archive.namelist()})


PICKLES: dict[str, bytes] = {
    "GLOBAL": b"\x80\x02cos\nsystem\n(X\x0e\0\0\0touch executedtR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
    "INST": b"(S'touch executed'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch executed'\no.",
    "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}X\n\0\0\0__class__X\x01\0\0\0xsb.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\nX\x06\0\0\0systemtR.",
    "load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x20" + bytes(32) + b"tR.",
    "nested torch.load": b"\x80\x02ctorch.serialization\nload\n(X\x04\0\0\0a.pttR.",
    "numpy": b"\x80\x02cnumpy.core.multiarray\nscalar\n(tR.",
    "terabyte bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",
    "petabyte bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x07\0\0\0\0\0\0\x10\x85R.",
    "terabyte tensor": b"\x80\x02ctorch\nTensor\n\x8a\x06\0\0\0\0\0\x01\x85R.",
    "long string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    "terabyte string": b"\x80\x04\x8d\0\0\0\0\0\x01\0\0x.",
    "two gigabytes of string": b"\x80\x02X\xff\xff\xff\x7fx.",
    "long integer": b"\x80\x02\x8b\xff\xff\xff\x7f\1.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "no memo": b"\x80\x02h\x09.",
    "underflow": b"\x80\x02tR.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "marks": b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
    "persistent": b"\x80\x02X\x01\0\0\0xQ.",
    "protocol": b"\x80\xff}.",
    "extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "no stop": b"\x80\x02}",
    "noise": bytes(range(256)) * 4,
}


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header and any word on its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(shape: Sequence[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}}


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _described(valid: Valid, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Our safetensors with another description."""
    header, data = _header(valid.safetensors)
    description = json.loads(header["__metadata__"]["ilvr_lightning"])
    change(description)
    header["__metadata__"]["ilvr_lightning"] = json.dumps(description)
    return safetensors(header, data)


def _configured(valid: Valid, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Our checkpoint with another content."""
    content = loaded(valid.checkpoint)
    change(content)
    return saved(content)


def loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _wide(valid: Valid) -> bytes:
    """A state dict of a network as wide as they load, its weights one number each."""
    state = {
        k: v.new_zeros(()).expand([n * 500 if n > 3 else n for n in v.shape]) for k, v in loaded(valid.adm).items()
    }
    return saved(state)


def _repeated(valid: Valid) -> bytes:
    """Every weight a view of one small storage."""
    state = loaded(valid.adm)
    storage = torch.zeros(max(v.numel() for v in state.values()))
    return saved({k: storage[: v.numel()].view(v.shape) for k, v in state.items()})


def hostile_checkpoints(valid: Valid) -> list[tuple[str, str, Content, bool | None]]:
    """(what, name, content, whether it is a checkpoint)."""
    made: list[tuple[str, str, Content, bool | None]] = []
    for name, pickled in PICKLES.items():
        made.append((f"pickle {name}, zipped", "x.ckpt", torch_zip(pickled), False))
        made.append((f"pickle {name}, bare", "x.pt", pickled, False))
    for how in ("os.system", "os.mkdir", "exec", "eval", "open", "getattr"):
        for zipped in (True, False):
            content = loaded(valid.checkpoint)
            content["hyper_parameters"]["extra"] = Harm(how)
            made.append((f"{how} in it, {zipped=}", "x.ckpt", saved(content, zipped), False))
        made.append((f"{how} as a plain pickle", "x.pt", pickle.dumps(Harm(how), protocol=4), False))
        state = {**loaded(valid.adm), "extra": Harm(how)}
        made.append((f"{how} in a state dict named safetensors", "x.safetensors", saved(state), False))
    config = ("hyper_parameters", "config")

    def deep(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
        def change(content: dict[str, Any]) -> None:
            node = content[config[0]][config[1]]
            *sections, last = key.split(".")
            for section in sections:
                node = node[section]
            node[last] = value

        return change

    for key, values in {
        "model.channels": (10**9, 16384, -1, 10**400, float("nan"), "8", None, [8]),
        "model.num_res_blocks": (10**6,),
        "model.channel_mult": ((1,) * 5000, (10**9,), (), laughs()),
        "diffusion.num_timesteps": (10**12, 10**400, -5),
        "data.image_size": (8192, 10**9, (8, 8, 8)),
        "diffusion.betas": ((0.5,) * 10**6, laughs()),
        "data.path": ("x" * 10**6, circle()),
        "trainer": (laughs(), circle(), nested(3000), {"max_epochs": circle()}),
        "grid.references": (laughs(), ["x" * 100] * 10**5),
        "data.split": ("${oc.env:SECRET}", "\x1b[31m"),
        "data.batch_size": (10**400,),
        "seed": (10**400, circle()),
    }.items():
        for value in values:
            try:
                content = _configured(valid, deep(key, value))
            except RecursionError:
                continue
            made.append((f"{key}={value!r:.40}" if not _is_deep(value) else f"{key} deep", "x.ckpt", content, None))
    for what, change in {
        "no state": lambda c: c.update(state_dict={}), "a state of numbers": lambda c: c.update(state_dict={"a": 1}),
        "deep facts": lambda c: c.update(epoch=laughs()), "a huge step": lambda c: c.update(global_step=10**5000),
        "a step with lines": lambda c: c.update(global_step="a\nb"),
        "callbacks that are none": lambda c: c.update(callbacks=3),
        "deep callbacks": lambda c: c.update(callbacks={"x": {"octave_gains": laughs(),
        "calibrated_at": c["global_step"]}}),
        "a circle of gains": lambda c: c.update(callbacks={"x": {"octave_gains": circle(),
        "calibrated_at": c["global_step"]}}),
        "an enormous weight": lambda c: c["state_dict"].update({"network.out.bias": torch.zeros(1).expand(2**40)}),
        "a key of tuples": lambda c: c["state_dict"].update({(1, 2): torch.zeros(1)}),
        "nan": lambda c: c["state_dict"]["network.out.bias"].fill_(float("nan")),
    }.items():  # fmt: skip
        made.append((what, "x.ckpt", _configured(valid, change), None))
    made.append(("only a list that explodes", "x.ckpt", saved(laughs()), False))
    made.append(("a state that holds itself", "x.ckpt", saved({"state_dict": circle()}), False))
    made.append(("a wide network of one number", "x.pt", _wide(valid), False))
    made.append(("weights that share their numbers", "x.pt", _repeated(valid), None))
    made.append(("compressed", "x.pt", torch_zip(pickle.dumps({"a": "x" * 10**7}), zipfile.ZIP_DEFLATED), False))
    made.append(("a zip of others", "x.zip", _zip({"a.txt": b"a"}), False))
    made.append(("a zip out of its folder", "x.pt", _zip({"../../escaped/data.pkl": b"x", "../version": b"3"}), False))
    made.append(("an empty zip", "x.pt", _zip({}), False))
    made.append(("many entries", "x.pt", _lazy(lambda: _zip({f"a/{i}": b"" for i in range(20_000)})), False))
    for what, data in {
        "terabytes of header": safetensors({}, length=2**40), "the longest header": safetensors({}, length=2**64 - 1),
        "a header beyond the file": safetensors(_tensor([1], 0, 4), bytes(4), 9999), "no header": safetensors(b"",
        length=0),
        "a short header": safetensors({}, length=1), "terabytes of tensor": safetensors(_tensor([2**20, 2**20], 0,
        2**42), bytes(64)),
        "a shape that lies": safetensors(_tensor([2**31, 2**31], 0, 4), bytes(4)),
        "a negative shape": safetensors(_tensor([-1], 0, 4), bytes(4)),
        "offsets reversed": safetensors(_tensor([1], 4, 0), bytes(4)), "overlapping": safetensors({
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1],
            "data_offsets": [0, 4]}}, bytes(4)),
        "an unknown dtype": safetensors(_tensor([1], 0, 4, "X99"), bytes(4)),
        "an overflowing shape": safetensors(_tensor([2**63, 2], 0, 4), bytes(4)),
        "deep json": safetensors(b'{"a":' + b"[" * 100_000), "no json": safetensors(b"{" + b"\xff" * 99),
        "a list": safetensors([]), "many dimensions": safetensors(_tensor([1] * 10_000, 0, 4), bytes(4)),
        "huge metadata": safetensors({"__metadata__": {"ilvr_lightning": "x" * 10**6}, **_tensor([1], 0, 4)}, bytes(4)),
        "deep metadata": safetensors({"__metadata__": {"ilvr_lightning": "[" * 10**5}, **_tensor([1], 0, 4)}, bytes(4)),
        "wrong metadata": safetensors({"__metadata__": {"ilvr_lightning": 3}, **_tensor([1], 0, 4)}, bytes(4)),
        "no tensors": safetensors({"__metadata__": {"ilvr_lightning": "{}"}}),
    }.items():  # fmt: skip
        made.append((what, "x.safetensors", data, False))
    for what, alter in {
        "a wide network": lambda d: d["model"].update(channels=16384),
        "many levels": lambda d: d["model"].update(channel_mult=[1] * 999),
        "a large size": lambda d: d.update(image_shape=[3, 8192, 8192]),
        "a strange kind": lambda d: d.update(kind="a\nb\x1b[31m" * 99),
        "long facts": lambda d: d.update(facts={"x" * 999: "y" * 10**6}),
        "deep facts": lambda d: d.update(facts={"x": nested(400)}),
        "many gains": lambda d: d.update(octave_gains={"fast": {str(i): [1.0] * 9 for i in range(1, 9999)}}),
        "gains of nan": lambda d: d.update(octave_gains={"fast": {"2": [float("nan")]}}),
        "gains of words": lambda d: d.update(octave_gains="x"),
        "many betas": lambda d: d["diffusion"].update(betas=[0.001] * 10**6),
        "a huge T": lambda d: d["diffusion"].update(num_timesteps=10**12),
        "many assumptions": lambda d: d.update(assumed=["x"] * 10**5),
        "a config that is none": lambda d: d.update(config=nested(400)),
        "references that explode": lambda d: d.update(config={"run": {"name": "${data.name}" * 60},
        "data": {"name": "${data.label}" * 60}}),
    }.items():  # fmt: skip
        made.append((what, "x.safetensors", _described(valid, alter), None))
    made.append(("a FIFO", "x.ckpt", os.mkfifo, False))
    made.append(("zeros", "x.ckpt", lambda path: path.symlink_to("/dev/zero"), False))
    made.append(("memory", "x.ckpt", lambda path: path.symlink_to("/proc/self/mem"), False))
    made.append(("a loop", "x.ckpt", lambda path: path.symlink_to(path.name), False))
    made.append(("a terabyte of nothing", "x.ckpt", _sparse, False))
    made.append(("a terabyte of nothing", "x.safetensors", _sparse, False))
    made.append(
        ("a git lfs pointer", "x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", False)
    )
    made.append(("a picture", "x.ckpt", encoded("PNG"), False))
    return made


def _is_deep(value: Any) -> bool:
    return isinstance(value, list | dict)


DIFFUSERS_CONFIGS: tuple[dict[str, Any], ...] = (
    {"sample_size": 10**9}, {"sample_size": [8] * 999}, {"sample_size": 8192}, {"sample_size": float("nan")},
    {"sample_size": float("inf")},
    {"sample_size": True}, {"in_channels": 10**30}, {"in_channels": 2}, {"out_channels": float("inf")},
    {"block_out_channels": [65536] * 500},
    {"block_out_channels": [16384]}, {"block_out_channels": []}, {"block_out_channels": {}},
    {"block_out_channels": "8"},
    {"layers_per_block": 65536}, {"norm_num_groups": 65536}, {"norm_eps": float("nan")}, {"norm_eps": "x"},
    {"dropout": "x"}, {"dropout": [1]},
    {"down_block_types": ["x" * 10**5]}, {"down_block_types": [{}]}, {"_class_name": ["x"] * 9},
    {"_class_name": "\x1b[31m\n" * 99},
    {"attention_head_dim": []}, {"flip_sin_to_cos": "x"}, {"freq_shift": [1]}, {"downsample_padding": {}},
    {"act_fn": ["silu"]},
    {"time_embedding_type": nested(300)},
)  # fmt: skip
SCHEDULERS: tuple[dict[str, Any], ...] = (
    {"num_train_timesteps": 10**12}, {"num_train_timesteps": 10**400}, {"num_train_timesteps": -1},
    {"num_train_timesteps": float("nan")},
    {"trained_betas": [0.5] * 10**6}, {"trained_betas": "x"}, {"trained_betas": [[1]]}, {"trained_betas": {}},
    {"trained_betas": [float("nan")]},
    {"beta_start": "x"}, {"beta_start": float("nan")}, {"beta_end": 10**400}, {"beta_start": -1}, {"beta_schedule": {}},
    {"beta_schedule": ["linear"]},
    {"prediction_type": {}}, {"prediction_type": None}, {"_class_name": "x\n" * 9}, {"_class_name": []},
    {"clip_sample_range": "x" * 10**5},
    {"clip_sample": nested(300)}, {"thresholding": "x"}, {"rescale_betas_zero_snr": True},
)  # fmt: skip
RAW: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"3", b"null", b"NaN", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", b"{}" * 9, b'"x"', b"{}",
    b'{"a": 1e999}',
    b'{"sample_size": ' + b"9" * 5000 + b"}",
)  # fmt: skip
CONFIG, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


def _uses(what: str, path: str, files: Mapping[str, Content], valid: bool | None, place: int) -> Case:
    """A checkpoint given to one of the commands."""
    what = f"checkpoint: {what}"
    name = Path(path).name
    match place % 4:
        case 0:
            return Case(what=what, argv=(*SAMPLE, "--ckpt", path), files=files, valid=valid, names=(name, "--"))
        case 1:
            export = ("export", path, "--to", "safetensors", f"{OUT}/x.safetensors")
            return Case(what=what, program="checkpoints", argv=export, files=files, valid=valid, names=(name,))
        case _:
            return Case(what=what, program="checkpoints", argv=("inspect", path), files=files,
                        valid=valid, names=(name,))  # fmt: skip


def _folder(valid: Valid, path: str, content: Content) -> dict[str, Content]:
    return {**{f"in/d/{name}": data for name, data in valid.diffusers.items()}, f"in/d/{path}": content}


def _changed(data: bytes, change: Mapping[str, Any]) -> bytes:
    return json.dumps({**json.loads(data), **change}).encode()


def checkpoints_by_hand(valid: Valid) -> list[Case]:
    made = []
    for place, (what, name, content, is_one) in enumerate(hostile_checkpoints(valid)):
        made.append(_uses(what, f"in/{name}", {f"in/{name}": content}, None if is_one else is_one, place // 2))
    for place, (path, change) in enumerate(
        [*((CONFIG, c) for c in DIFFUSERS_CONFIGS), *((SCHEDULER, c) for c in SCHEDULERS)]
    ):
        content = _changed(valid.diffusers[path], change)
        made.append(_uses(f"{path} {str(change)[:60]}", "in/d", _folder(valid, path, content), None, place))
    for place, raw in enumerate(RAW):
        for path in (CONFIG, SCHEDULER):
            made.append(_uses(f"{path} {raw[:20]!r}", "in/d", _folder(valid, path, raw), None, place))
    weights = next(name for name in valid.diffusers if name.endswith(".safetensors"))
    for place, (what, odd) in enumerate({
        "a FIFO": os.mkfifo, "zeros": lambda path: path.symlink_to("/dev/zero"), "sparse": _sparse,
        "a folder": lambda path: path.mkdir(),
    }.items()):  # fmt: skip
        for path in (CONFIG, SCHEDULER, weights):
            made.append(_uses(f"{path} is {what}", "in/d", _folder(valid, path, odd), None, place))
    return made


def mutated_checkpoint(valid: Valid, random: Random) -> Case:
    what, name, content, broken = _mutated_checkpoint(valid, random)
    files = {f"in/{name}": content} if isinstance(content, bytes) else content
    path = "in/d" if name == "d" else f"in/{name}"
    return _uses(what, path, files, False if broken else None, random.randrange(4))


def _mutated_checkpoint(valid: Valid, random: Random) -> tuple[str, str, bytes | dict[str, Content], bool]:
    """(what, name, content or a folder's files, whether it cannot be valid)."""
    which = random.choice(("ckpt", "safetensors", "pt"))
    data = {"ckpt": valid.checkpoint, "safetensors": valid.safetensors, "pt": valid.adm}[which]
    match random.randrange(9):
        case 0:
            kilobytes = random.randrange(len(data) // 1024 + 1)
            return f"{which} truncated at {kilobytes} kB", f"x.{which}", data[: 1024 * kilobytes], True
        case 1:
            return f"{which} with bytes changed", f"x.{which}", mutated_bytes(random, data), False
        case 2:
            packed = valid.adm if which == "pt" else valid.checkpoint
            changed = rezipped(
                packed, lambda name, entry: mutated_bytes(random, entry) if name.endswith("data.pkl") else entry
            )
            return "pickle changed, checksum right", "x.ckpt", changed, False
        case 3 | 4:
            content = mutated_value(random, loaded(valid.checkpoint), PICKLED)
            return "content changed", "x.ckpt", saved(content, random.random() < 0.8), False
        case 5:
            state = mutated_value(random, loaded(valid.adm), PICKLED)
            return "state dict changed", "x.pt", saved(state), False
        case 6:
            header, tensors = _header(valid.safetensors)
            text = mutated_json(random, json.dumps(header)).encode()
            return "safetensors header changed", "x.safetensors", safetensors(text, tensors), False
        case 7:
            header, tensors = _header(valid.safetensors)
            header["__metadata__"]["ilvr_lightning"] = mutated_json(random, header["__metadata__"]["ilvr_lightning"])
            return "description changed", "x.safetensors", safetensors(header, tensors), False
        case _:
            path = random.choice(list(valid.diffusers))
            old = valid.diffusers[path]
            new = mutated_json(random, old).encode() if path.endswith("json") else mutated_bytes(random, old)
            return f"{path} changed", "d", _folder(valid, path, new), False


def resumes_by_hand(valid: Valid) -> list[Case]:
    made = []
    for place, (what, name, content, is_one) in enumerate(hostile_checkpoints(valid)):
        key = ("resume", "init_from")[place // 2 % 2]
        made.append(_resume(f"{key}: {what}", key, name, content, None if is_one else is_one))
    names = (
        "",
        " ",
        "nothing.ckpt",
        "images",
        "a\\0b",
        "x" * 300,
        "../../../etc/passwd",
        "/dev/zero",
        "[1]",
        "{a: 1}",
        "~",
        "auto ",
    )
    for name in names:
        for key in ("resume", "init_from"):
            argv = (*TRAIN, f'{key}="{name}"')
            made.append(
                Case(
                    what=f"{key}={name[:40]}",
                    program="train",
                    argv=argv,
                    valid=False,
                    names=(key, "checkpoint", "cannot read or write"),
                )
            )
    return made


def _resume(what: str, key: str, name: str, content: Content, valid: bool | None) -> Case:
    return Case(what=what, program="train", argv=(*TRAIN, f"{key}=in/{name}"), files={f"in/{name}": content},
    valid=valid,
                names=(key, name, "data.", "model.", "trainer"))  # fmt: skip


def mutated_resume(valid: Valid, random: Random) -> Case:
    what, name, content, broken = _mutated_checkpoint(valid, random)
    key = random.choice(("resume", "init_from"))
    if isinstance(content, bytes):
        return _resume(f"{key}: {what}", key, name, content, False if broken else None)
    argv = (*TRAIN, "init_from=in/d")
    return Case(what=f"init_from: {what}", program="train", argv=argv, files=content, names=("init_from", "in/d"))


# --- a picture's recipe, the output folder, file names


def _reproduce(valid: Valid, what: str, picture: Content, is_one: bool | None, **more: Content) -> Case:
    files: dict[str, Content] = {f"in/references/{name}": data for name, data in valid.references.items()}
    return Case(what=f"reproduce: {what}", argv=("--reproduce", "in/x.png", "--ckpt", "tiny.safetensors", "--out", OUT),
                files={**files, "in/x.png": picture, **more}, valid=is_one, names=("--", "recipe", "x.png", "override",
                "in/"))  # fmt: skip


def with_recipe(
    picture: bytes, text: str | bytes, size: tuple[int, int] | None = None, compressed: bool = False
) -> bytes:
    """A picture with another text for its recipe."""
    with Image.open(io.BytesIO(picture)) as image:
        info, file = PngInfo(), io.BytesIO()
        info.add_text(
            "ilvr_lightning", text if isinstance(text, bytes) else text.encode("latin-1", "replace"), compressed
        )
        (image if size is None else image.resize(size)).save(file, "PNG", pnginfo=info)
        return file.getvalue()


def recipe_of(picture: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(picture)) as image:
        return dict(json.loads(image.info["ilvr_lightning"]))


def reproductions_by_hand(valid: Valid) -> list[Case]:
    recipe = recipe_of(valid.picture)
    made = [_reproduce(valid, "as it is", valid.picture, True)]
    value: Any
    for name in recipe:
        for value in (-1, 10**400, "x" * 10**5, None, [], {"a": 1}, "../../x", True, 1.5, nested(400)):
            if name == "compiled" and value in (True, -1):
                continue  # which starts a compiler, as it may
            text = json.dumps(recipe | {name: value})
            made.append(_reproduce(valid, f"{name}={value!r:.30}", with_recipe(valid.picture, text), None))
    for name in recipe["plan"]:
        for value in (-1, 10**400, [1] * 10**4, "x", None, float("nan")):
            text = json.dumps(recipe | {"plan": recipe["plan"] | {name: value}})
            made.append(_reproduce(valid, f"plan.{name}={value!r:.30}", with_recipe(valid.picture, text), None))
    good, free = json.dumps(recipe), recipe | {"reference": None, "reference_sha256": None}
    for what, picture in {
        "a large batch": with_recipe(valid.picture, json.dumps(recipe | {"batch_size": 4096})),
        "many threads": with_recipe(valid.picture, json.dumps(recipe | {"threads": 1024})),
        "a large picture": with_recipe(valid.picture, json.dumps(free), (4096, 4096)),
        "a large batch of large pictures": with_recipe(valid.picture, json.dumps(free | {"batch_size": 1024}), (16,
        16)),
        "another size": with_recipe(valid.picture, good, (9, 9)), "one pixel": with_recipe(valid.picture, good, (1, 1)),
    }.items():  # fmt: skip
        made.append(_reproduce(valid, what, picture, None))
    bad_texts = {
        "no json": "x", "deep": "[" * 10**5, "empty": "", "a list": "[]", "null": "null",
        "another key": json.dumps(recipe | {"x": 1}),
        "a large int": "9" * 5000, "nothing in it": "{}",
    }  # fmt: skip
    for what, text in bad_texts.items():
        made.append(_reproduce(valid, what, with_recipe(valid.picture, text), False))
    bomb = with_recipe(valid.picture, b" " * 2**25 + good.encode(), compressed=True)
    made.append(_reproduce(valid, "a compressed bomb", bomb, None))
    made.append(_reproduce(valid, "none", encoded("PNG"), False))
    for name, content, _ in hostile_pictures()[30:]:
        made.append(_reproduce(valid, f"the picture is {name}", content, False))
    for name, data in valid.references.items():
        for what, odd in (
            ("broken", data[:40]),
            ("another", encoded("PNG")),
            ("a FIFO", os.mkfifo),
            ("gone", lambda path: None),
        ):
            place = f"in/references/{name}"
            made.append(_reproduce(valid, f"its reference is {what}", valid.picture, False, **{place: odd}))
    made.append(_reproduce(valid, "a FIFO beside it", valid.picture, True, **{"in/x.ckpt": os.mkfifo}))
    return made


def mutated_reproduction(valid: Valid, random: Random) -> Case:
    if random.random() < 0.2:
        return _reproduce(valid, "bytes changed", mutated_bytes(random, valid.picture), None)
    text = mutated_json(random, json.dumps(recipe_of(valid.picture)))
    text = re.sub(r'"compiled": (true|-?[1-9]\d*)', '"compiled": false', text)
    return _reproduce(valid, "recipe changed", with_recipe(valid.picture, text), None)


def folders_by_hand(valid: Valid) -> list[Case]:
    line = valid.metadata.splitlines()[0]

    def changed(**values: object) -> bytes:
        return json.dumps(json.loads(line) | values).encode() + b"\n"

    indices: dict[str, Content] = {
        "empty": b"", "half a line": line[:40], "noise": bytes(range(256)), "deep": b"[" * 10**6, "a list": b"[]\n",
        "null": b"null\n",
        "a file that is a list": changed(file_name=[]), "a file out of the folder": changed(file_name="../canary.png"),
        "an absolute file": changed(file_name="/dev/zero"), "a null byte in a file": changed(file_name="a\0"),
        "a seed that is text": changed(seed="0"), "more columns": changed(x=[1]),
        "numbers": b"9" * 5000,
        "many lines": line * 9 + b"\n", "a long line": changed(file_name="x" * 10**7),
        "ten thousand lines": (line + b"\n") * 10**4,
        "latin 1": "é".encode("latin-1"), "a folder": lambda path: path.mkdir(), "a FIFO": os.mkfifo,
        "a loop": lambda path: path.symlink_to(path.name), "a null byte": b"\0" * 100, "deep objects": b'{"a":' * 10**5,
        "a link out": lambda path: path.symlink_to("../cwd/canary"),
        "zeros": lambda path: path.symlink_to("/dev/zero"),
    }  # fmt: skip
    made = [
        Case(what=f"index: {what}", argv=(*SAMPLE, *more), files={f"{OUT}/metadata.jsonl": content}, names=("--out",
        "metadata"))
        for what, content in indices.items() for more in ((), ("--overwrite",))
    ]  # fmt: skip
    odd: dict[str, Content] = {
        "empty": b"", "half": valid.picture[:60], "another": encoded("PNG"), "a folder": lambda path: path.mkdir(),
        "a FIFO": os.mkfifo,
        "a link out": lambda path: path.symlink_to("../cwd/canary.png"),
        "a dangling link out": lambda path: path.symlink_to("../cwd/x.png"),
        "a bomb": png(50_000, 50_000), "zeros": lambda path: path.symlink_to("/dev/zero"), "text": b"mine",
        "a loop": lambda p: p.symlink_to(p.name),
    }  # fmt: skip
    for what, content in odd.items():
        for name in (
            "00_N2_0.png",
            "00_grid.png",
            "references",
            f"references/{next(iter(valid.references))}",
            "00_N2_0_steps.png",
            "index.html",
            "low_pass",
        ):
            argv = (*SAMPLE, "--overwrite") if what in ("another", "a link out") else SAMPLE
            case_ = Case(
                what=f"{name} is {what}", argv=argv, files={f"{OUT}/{name}": content}, names=("--out", name, OUT)
            )
            made.append(case_)
        for name in (
            "tiny",
            "tiny/x",
            "tiny/x/checkpoints",
            "tiny/x/config.yaml",
            ".decoded",
            "tiny/x/checkpoints/last.ckpt",
        ):
            for more in ((), ("resume=auto",)):
                made.append(Case(what=f"{name} is {what} {more}", program="train", argv=(*TRAIN, *more),
                                 files={f"{OUT}/{name}": content}, names=("trainer.default_root_dir", "run.name",
                                 "resume", OUT)))  # fmt: skip
    return made


def mutated_folder(valid: Valid, random: Random) -> Case:
    more = random.choice(((), ("--overwrite",), ("--trajectory",)))
    files: dict[str, Content] = {}
    if random.random() < 0.5:
        lines = [mutated_json(random, line).encode("utf-8", "replace") for line in valid.metadata.splitlines()]
        files[f"{OUT}/metadata.jsonl"] = b"\n".join(lines)
    else:
        files[f"{OUT}/metadata.jsonl"] = mutated_bytes(random, valid.metadata)
    if random.random() < 0.4:
        files[f"{OUT}/00_N2_0.png"] = mutated_bytes(random, valid.picture)
    if random.random() < 0.3:
        text = mutated_json(random, json.dumps(recipe_of(valid.picture)))
        files[f"{OUT}/00_N2_0.png"] = with_recipe(valid.picture, text)
    return Case(what="an output folder changed", argv=(*SAMPLE, *more), files=files, names=("--out", OUT))


NAMES = (
    "a\nb", "-rf", "--out", "-", "a b", " a", "a ", ".", "..", "...", "....", "x" * 200, "x" * 240, "é" * 120, "日本語",
    "\u202egnp", "a\x1b[31m",
    "\t", "a\x7f", "%s%n", "{0}", "${oc.env:SECRET}", "$(touch executed)", "`touch executed`", ";touch executed", "a'b",
    'a"b', "a\\b", "*", "?", "[a]",
    "[", "a:b", "a:train", "a:train[0:1]", "con", "nul", "grid", "references", "metadata", "00", "\udcff\udcfe", "a=b",
    "#", "~", "~root", "&", "|", "<>",
    "\u2028", "😀", "\u0301", "..\\..\\x", "a.b.c", "a.", "0", "None", "@a", "!", "%00", "a,b", "a\rb", "\x01",
)  # fmt: skip
"""File names without their ending, in a folder of the case's own."""


def _named(name: str, use: int, valid: Valid) -> Case:
    good, name = encoded("PNG"), "..." if name in (".", "..") else name  # another folder's name, which may be meant
    what = f"the name {name[:30]!r}"
    path = f"in/{name}"
    match use % 9:
        case 0:
            return Case(what=f"{what} of --ref", argv=(*SAMPLE, "--ref", f"{path}.png"), files={f"{path}.png": good})
        case 1:
            return Case(
                what=f"{what} of a picture in --ref", argv=(*SAMPLE, "--ref", "in"), files={f"{path}.png": good}
            )
        case 2:
            return Case(what=f"{what} of --mask", argv=(*SAMPLE, "--mask", f"{path}.png"), files={f"{path}.png": good})
        case 3:
            argv: tuple[str, ...] = (*SAMPLE, "--ckpt", f"{path}.safetensors")
            return Case(what=f"{what} of --ckpt", argv=argv, files={f"{path}.safetensors": valid.safetensors})
        case 4:
            path = "in/.." if name == "..." else path  # whose stem is another folder
            config = {f"{path}.yaml": valid.config.encode()}
            return Case(what=f"{what} of a config", program="train", argv=(f"{path}.yaml", *TRAIN[1:]), files=config)
        case 5:
            return Case(what=f"{what} of --out", argv=(*SAMPLE, "--out", f"{OUT}/{name}"))
        case 6:
            argv = (*TRAIN, "run.name=" + json.dumps(name, ensure_ascii=False))
            return Case(what=f"{what} of a run", program="train", argv=argv)
        case 7:
            files: dict[str, Content] = {f"in/references/{n}": data for n, data in valid.references.items()}
            argv = ("--reproduce", f"{path}.png", "--ckpt", "tiny.safetensors", "--out", OUT)
            return Case(what=f"{what} of --reproduce", argv=argv, files={**files, f"{path}.png": valid.picture})
        case _:
            argv = ("export", "tiny.safetensors", "--to", "safetensors", f"{OUT}/{name}")
            return Case(what=f"{what} of an export", program="checkpoints", argv=argv)


def names_by_hand(valid: Valid) -> list[Case]:
    return [_named(name, use, valid) for name in NAMES for use in range(9)]


def mutated_name(valid: Valid, random: Random) -> Case:
    pieces = [
        random.choice((*NAMES, "a", "b", chr(random.randrange(1, 0x2FFF)))) for _ in range(random.choice((1, 2, 3)))
    ]
    name = "".join(pieces).replace("/", "_").replace("\0", "_")[:80]
    return _named(name, random.randrange(9), valid)


KINDS: dict[str, tuple[Callable[[Valid], list[Case]], Callable[[Valid, Random], Case]]] = {
    "images": (images_by_hand, mutated_picture),
    "masks": (masks_by_hand, mutated_mask),
    "configs": (configs_by_hand, mutated_config),
    "overrides": (overrides_by_hand, mutated_override),
    "flags": (flags_by_hand, mutated_flags),
    "checkpoints": (checkpoints_by_hand, mutated_checkpoint),
    "resume": (resumes_by_hand, mutated_resume),
    "reproduce": (reproductions_by_hand, mutated_reproduction),
    "output": (folders_by_hand, mutated_folder),
    "names": (names_by_hand, mutated_name),
}
"""By kind: those by hand, and a mutation."""
