"""Draws the picture sets of this folder: `python data/tools/make_sets.py toon animals`.

toon: the style "ToonHead" by Johan Melin (CC BY 4.0) of dicebear-styles, drawn with dicebear-core.
animals: the shapes of the package animal-avatar (MIT), a port of Roman Lukashik's
animal-avatar-generator (MIT).
Both are cropped, recoloured, rasterised by resvg and composed over backgrounds made here.

A picture depends on its set, split and index alone. Every shape (the choice of parts, without its colours)
belongs to one split: what the test pictures show was never drawn for training.
"""

import argparse
import colorsys
import functools
import hashlib
import io
import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from animal_avatar import shapes as animal_shapes
from dicebear import Avatar, Style
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
SIZE = 64
SUPERSAMPLING = 3
COUNTS = {"toon": {"train": 5000, "test": 500}, "animals": {"train": 4000, "test": 400}}
TEST_SHARE = 11  # one shape in so many belongs to the test split

Colour = tuple[float, float, float]
Pixels = npt.NDArray[np.float64]

SKIN = "f6d7c3 f1c3a5 e8b48f dda27c c68e6a b98e6a a36b4f 8a5a3f 714630 5c3829 452a1f"
HAIR = "1b1412 2c1b18 4a2c20 724133 a55728 8c6239 b58143 d6b370 ecd9a0 c8452b 8d8d8d dedad4 3f3a45"
CLOTHES = "1f2a44 2b6f77 7a1f2b d9822b e3c34a 3f7d4e 6a4c93 b0b7bf ececec 26262b c94f7c 5b8bd0"
FUR = (
    "e07b2f c9682a f0a24a e8b96a d9b48a b98a5e 8a5a3a 6b4026 4a2c22 3a3a3f 6e6e72 9a9aa0 c4c4c8 f2eee6 "
    "7287b0 a3ac84 e88a90"
)

TOON_CROP = "122.88 92.16 522.24 522.24"  # (0.16, 0.12) to (0.84, 0.80) of the 768 x 768 avatar
ANIMAL_CROP = "40 20 420 420"
TOP_HAIR = ("bun", "sideComed", "undercut")
REAR_HAIR = ("longStraight", "longWavy", "neckHigh", "shoulderHigh")
BEARDS = ("chin", "chinMoustache", "fullBeard", "longBeard", "moustacheTwirl")
EXPRESSION = {
    "eyes": ("bow", "happy", "humble", "wide", "wink"),
    "eyebrows": ("angry", "happy", "neutral", "raised", "sad"),
    "mouth": ("agape", "angry", "laugh", "sad", "smile"),
}
ANIMAL_PARTS = {  # the order of drawing, and how often a part is there
    "FACES": 1.0,
    "PATTERNS": 0.5,
    "EARS": 1.0,
    "HAIRS": 0.35,
    "MUZZLES": 1.0,
    "EYES": 1.0,
    "BROWS": 1.0,
}


class Drawing(NamedTuple):
    """The parts of an avatar, "" for one that is missing, and its SVG over nothing."""

    parts: dict[str, str]
    svg: str


def jittered(colour: str, rng: random.Random, by: int = 9) -> str:
    """A colour near `colour` (both rrggbb)."""
    return "".join(f"{min(255, max(0, c + rng.randint(-by, by))):02x}" for c in bytes.fromhex(colour))


def maybe(names: Sequence[str], probability: float, rng: random.Random) -> str:
    return rng.choice(names) if rng.random() < probability else ""


def shape_is_for_test(parts: dict[str, str]) -> bool:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
    return int.from_bytes(digest) % TEST_SHARE == 0


def toon_parts(rng: random.Random) -> dict[str, str]:
    """Half with long hair and without a beard, half mostly with short hair and often with a beard."""
    long_haired = rng.random() < 0.5
    if long_haired:
        hair = "spiky" if rng.random() < 0.2 else rng.choice(TOP_HAIR)
    else:
        hair = maybe((*TOP_HAIR, "spiky"), 0.92, rng)
    rear = maybe(REAR_HAIR, 0.85 if long_haired else 0.08, rng)
    beard = maybe(BEARDS, 0.0 if long_haired else 0.55, rng)
    return {"hair": hair, "rearHair": rear, "beard": beard} | {k: rng.choice(v) for k, v in EXPRESSION.items()}


def animal_parts(rng: random.Random) -> dict[str, str]:
    """For each part the index of its shape."""
    return {
        name: maybe([str(i) for i in range(len(getattr(animal_shapes, name)))], probability, rng)
        for name, probability in ANIMAL_PARTS.items()
    }


@functools.cache
def toon_style() -> Style:
    import dicebear_styles  # a folder of JSON files, without an __init__.py

    return Style(json.loads((Path(next(iter(dicebear_styles.__path__))) / "toon-head.json").read_text("utf-8")))


def toon_svg(parts: dict[str, str], rng: random.Random) -> str:
    options: dict[str, Any] = {
        f"{part}Probability": 100 if parts[part] else 0 for part in ("hair", "rearHair", "beard")
    }
    options |= {f"{part}Variant": variant for part, variant in parts.items() if variant}
    for part, palette in (("skin", SKIN), ("hair", HAIR), ("clothes", CLOTHES)):
        options[f"{part}Color"] = "#" + jittered(rng.choice(palette.split()), rng)
    options["clothesVariant"] = rng.choice(("dress", "openJacket", "shirt", "tShirt", "turtleNeck"))
    return str(Avatar(toon_style(), options)).replace('viewBox="0 0 768 768"', f'viewBox="{TOON_CROP}"', 1)


def animal_svg(parts: dict[str, str], rng: random.Random) -> str:
    colour = "#" + jittered(rng.choice(FUR.split()), rng)
    drawn = "".join(getattr(animal_shapes, name)[int(index)](colour) for name, index in parts.items() if index)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{ANIMAL_CROP}">{drawn}</svg>'


def drawing(name: str, split: str, index: int) -> Drawing:
    """The avatar of one picture: parts are drawn again until their shape belongs to the split."""
    rng = random.Random(f"{name}/{split}/{index}")
    choose, to_svg = {"toon": (toon_parts, toon_svg), "animals": (animal_parts, animal_svg)}[name]
    parts = choose(rng)
    while shape_is_for_test(parts) != (split == "test"):
        parts = choose(rng)
    return Drawing(parts, to_svg(parts, rng))


def bounded(value: float) -> float:
    return min(1.0, max(0.0, value))


def background_colour(rng: random.Random, neutral: bool) -> Colour:
    """Of any hue; or near white, grey or black."""
    if neutral:
        value = rng.choice((rng.uniform(0.85, 1), rng.uniform(0.3, 0.75), rng.uniform(0, 0.18)))
        return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.1), value)
    return colorsys.hsv_to_rgb(rng.random(), bounded(rng.gauss(0.45, 0.25)), bounded(rng.gauss(0.65, 0.22)))


def gradient(size: int, angle: float, first: Colour, second: Colour) -> Pixels:
    axis = (np.arange(size) + 0.5) / size - 0.5
    along = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    reach = (abs(math.cos(angle)) + abs(math.sin(angle))) / 2
    return mix(np.broadcast_to(np.array(first), (size, size, 3)), second, along / (2 * reach) + 0.5)


def mix(pixels: Pixels, colour: Colour, share: Pixels) -> Pixels:
    return pixels + share[..., None] * (np.array(colour) - pixels)


def blob(size: int, x: float, y: float, radius: float) -> Pixels:
    """1 in the middle, falling softly to 0 at the radius."""
    axis = (np.arange(size) + 0.5) / size
    squared = ((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2) / radius**2
    return np.clip(1 - squared, 0, 1) ** 2


def background(rng: random.Random, size: int) -> Image.Image:
    """A gradient of two colours at any angle, a sixth of them plain, two fifths with soft blobs over it."""
    neutral = rng.random() < 0.25
    first = background_colour(rng, neutral)
    second = first if rng.random() < 1 / 6 else background_colour(rng, neutral)
    pixels = gradient(size, rng.uniform(0, 2 * math.pi), first, second)
    for _ in range(rng.randint(1, 4) if rng.random() < 0.4 else 0):
        colour = background_colour(rng, neutral)
        share = blob(size, rng.uniform(-0.1, 1.1), rng.uniform(-0.1, 1.1), rng.uniform(0.25, 0.7))
        pixels = mix(pixels, colour, share * rng.uniform(0.5, 1))
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def rasterised(svg: str, size: int) -> Image.Image:
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def draw(name: str, split: str, index: int, size: int = SIZE) -> Image.Image:
    """One picture, before its compression."""
    rng = random.Random(f"{name}/{split}/{index}/background")
    picture = background(rng, SUPERSAMPLING * size)
    avatar = rasterised(drawing(name, split, index).svg, SUPERSAMPLING * size)
    picture.paste(avatar, mask=avatar)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90, method=6)
    return buffer.getvalue()


def decoded(data: bytes) -> bytes:
    """The RGB pixels of a compressed picture."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def checksum(pictures: Iterable[bytes]) -> str:
    """SHA-256 over the decoded RGB pixels of compressed pictures, in order."""
    digest = hashlib.sha256()
    for data in pictures:
        digest.update(decoded(data))
    return digest.hexdigest()


def write_checksums(changes: dict[str, Any]) -> None:
    path = HERE / "checksums.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes, indent=2, sort_keys=True) + "\n")


def parquet_path(name: str, split: str) -> Path:
    return HERE / name / f"{split}-00000-of-00001.parquet"


def write_split(name: str, split: str, count: int) -> dict[str, Any]:
    """Writes one file in the Hub's layout and returns its checksum."""
    pictures = [encoded(draw(name, split, index)) for index in range(count)]
    rows = [{"bytes": data, "path": f"{name}-{split}-{i:05d}.webp"} for i, data in enumerate(pictures)]
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    column = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", column)], metadata={"huggingface": json.dumps(features)})
    path = parquet_path(name, split)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(rows, column)}, schema=schema), path, row_group_size=1000)
    return {"count": count, "sha256": checksum(pictures)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=sorted(COUNTS))
    for name in parser.parse_args(arguments).sets:
        write_checksums({name: {split: write_split(name, split, count) for split, count in COUNTS[name].items()}})
        print(f"data/{name}: {sum(f.stat().st_size for f in (HERE / name).glob('*.parquet')) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
