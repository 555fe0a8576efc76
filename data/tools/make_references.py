"""Makes the reference pictures in references/ and maps/: `python data/tools/make_references.py`.

Two are crops of photographs in scikit-image's package: astronaut.png (NASA, public domain) and chelsea.png
(a cat, CC0 by Stefan van der Walt). One is a held-out toon with strokes painted over it.
All others are drawn here. Their heads lie where those of the toon set lie. The maps are flat drawings of land and sea.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import skimage
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from make_sets import HERE, draw, write_checksums

SIZE = 256
CANVAS = 3 * SIZE  # everything is drawn at three times the size; coordinates run from 0 to 1

Point = tuple[float, float]
Rgb = tuple[int, int, int]

PHOTOGRAPHS = {"astronaut": (129, 3, 323, 197), "cat": (75, 0, 375, 300)}
PHOTOGRAPH_FILES = {"astronaut": "astronaut.png", "cat": "chelsea.png"}
EDITED_TOON = 53  # its index in the test split

FACE = ((0.5, 0.2), (0.7, 0.25), (0.785, 0.42), (0.78, 0.62), (0.73, 0.79), (0.62, 0.92), (0.5, 0.965))
SHADE = (
    (0.66, 0.2),
    (0.8, 0.35),
    (0.8, 0.65),
    (0.72, 0.85),
    (0.6, 0.96),
    (0.66, 0.8),
    (0.7, 0.6),
    (0.68, 0.4),
)


def rgb(colour: str) -> Rgb:
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue


def shaded(colour: Rgb, factor: float) -> Rgb:
    red, green, blue = (min(255, max(0, round(c * factor))) for c in colour)
    return red, green, blue


def in_shadow(colour: Rgb) -> Rgb:
    """Darker and warmer."""
    red, green, blue = colour
    return round(0.88 * red), round(0.77 * green), round(0.7 * blue)


def mirrored(half: Sequence[Point]) -> list[Point]:
    """A closed outline from its right half, listed from the top middle to the bottom middle."""
    return [*half, *((1 - x, y) for x, y in reversed(half) if x != 0.5)]


def catmull_rom(a: float, b: float, c: float, d: float, t: float) -> float:
    """From b at t = 0 to c at t = 1, with a before and d after them."""
    return b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


def curve(points: Sequence[Point], closed: bool = False, steps: int = 12) -> list[Point]:
    """A Catmull-Rom spline through the points."""
    count = len(points)

    def at(i: int) -> Point:
        return points[i % count if closed else min(max(i, 0), count - 1)]

    result = []
    for i in range(count if closed else count - 1):
        a, b, c, d = at(i - 1), at(i), at(i + 1), at(i + 2)
        for t in (step / steps for step in range(steps)):
            x, y = (catmull_rom(a[k], b[k], c[k], d[k], t) for k in (0, 1))
            result.append((x, y))
    return result if closed else [*result, points[-1]]


def scaled(points: Iterable[Point]) -> list[Point]:
    return [(x * CANVAS, y * CANVAS) for x, y in points]


def blank_mask() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", (CANVAS, CANVAS))
    return mask, ImageDraw.Draw(mask)


class Painter:
    """A canvas with a bristly brush; its hand trembles by its own seed."""

    def __init__(self, seed: str, ground: Rgb | Image.Image) -> None:
        self.rng = random.Random(seed)
        if isinstance(ground, Image.Image):
            self.picture = ground.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        else:
            self.picture = Image.new("RGB", (CANVAS, CANVAS), ground)

    def varied(self, colour: Rgb, by: float) -> Rgb:
        return shaded(colour, 1 + self.rng.uniform(-by, by))

    def stroke(self, points: Sequence[Point], width: float, colour: Rgb, variation: float = 0.08) -> None:
        """A brush stroke of parallel bristles, each with its own lightness and ends."""
        path = curve(points)
        bristles = max(4, round(width * 160))
        drawer = ImageDraw.Draw(self.picture)
        for bristle in self.rng.sample(range(bristles), bristles):
            offset = width * ((bristle + 0.5) / bristles - 0.5)
            first, last = self.rng.randint(0, 2), len(path) - self.rng.randint(0, 2)
            line = scaled(shifted(path, offset)[first:last])
            thickness = round(CANVAS * width / bristles * 1.9)
            drawer.line(line, self.varied(colour, variation), thickness, joint="curve")

    def fill(self, mask: Image.Image, colour: Rgb, angle: float = 0.6) -> None:
        """Covers a mask with short strokes in about one direction."""
        left, top, right, bottom = (side / CANVAS for side in mask.getbbox() or (0, 0, 0, 0))
        covered = Painter(str(self.rng.random()), colour)
        for _ in range(2 + round(110 * (right - left) * (bottom - top))):
            x, y = self.rng.uniform(left, right), self.rng.uniform(top, bottom)
            turn = angle + self.rng.gauss(0, 0.3)
            dx, dy, bend = 0.14 * math.cos(turn), 0.14 * math.sin(turn), self.rng.uniform(-0.02, 0.02)
            ends = ((x - dx, y - dy), (x + bend, y - bend), (x + dx, y + dy))
            covered.stroke(ends, 0.07, self.varied(colour, 0.06), 0.025)
        self.picture.paste(covered.picture, mask=mask)

    def shape(
        self, points: Sequence[Point], colour: Rgb, inside: Image.Image | None = None, angle: float = 0.6
    ) -> Image.Image:
        """A filled outline, drawn with a trembling hand; returns where it lies."""
        trembled = [(x + self.rng.gauss(0, 0.003), y + self.rng.gauss(0, 0.003)) for x, y in points]
        mask, drawer = blank_mask()
        drawer.polygon(scaled(curve(trembled, closed=True)), fill=255)
        if inside is not None:
            mask = ImageChops.multiply(mask, inside)
        self.fill(mask, colour, angle)
        return mask

    def dab(self, x: float, y: float, width: float, height: float, colour: Rgb) -> None:
        around = [2 * math.pi * i / 8 for i in range(8)]
        self.shape([(x + width * math.cos(a), y + height * math.sin(a)) for a in around], colour)

    def finished(self) -> Image.Image:
        return self.picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def shifted(path: Sequence[Point], offset: float) -> list[Point]:
    """The path moved sideways."""
    result = []
    for i, (x, y) in enumerate(path):
        (x0, y0), (x1, y1) = path[max(i - 1, 0)], path[min(i + 1, len(path) - 1)]
        length = math.hypot(x1 - x0, y1 - y0) or 1
        result.append((x - offset * (y1 - y0) / length, y + offset * (x1 - x0) / length))
    return result


class Look(NamedTuple):
    skin: str
    hair: str
    background: tuple[str, str]
    clothes: str
    lips: str
    back_hair: Sequence[Point] = ()
    front_hair: Sequence[Point] = ()
    curls: int = 0
    beard: bool = False


LONG = mirrored(((0.5, 0.05), (0.72, 0.08), (0.86, 0.28), (0.87, 0.6), (0.93, 0.85), (0.9, 1.05), (0.5, 1.1)))
BOB = mirrored(((0.5, 0.05), (0.73, 0.09), (0.86, 0.28), (0.88, 0.55), (0.9, 0.78), (0.76, 0.88), (0.5, 0.8)))
AFRO = mirrored(((0.5, 0.07), (0.7, 0.1), (0.84, 0.25), (0.84, 0.42), (0.78, 0.5), (0.5, 0.5)))
SHORT = mirrored(((0.5, 0.07), (0.7, 0.1), (0.81, 0.25), (0.83, 0.45), (0.79, 0.52), (0.5, 0.5)))
PARTED = (
    (0.42, 0.08), (0.62, 0.07), (0.78, 0.2), (0.83, 0.42), (0.8, 0.6), (0.745, 0.45), (0.66, 0.33),
    (0.45, 0.2), (0.36, 0.34), (0.26, 0.45), (0.2, 0.6), (0.17, 0.42), (0.22, 0.2),
)  # fmt: skip
FRINGE = (
    (0.5, 0.06), (0.7, 0.09), (0.83, 0.25), (0.84, 0.5), (0.79, 0.62), (0.765, 0.45), (0.62, 0.41),
    (0.5, 0.43), (0.36, 0.4), (0.235, 0.45), (0.21, 0.62), (0.16, 0.5), (0.17, 0.25), (0.3, 0.09),
)  # fmt: skip
SWEPT = (
    (0.3, 0.12), (0.5, 0.05), (0.7, 0.08), (0.81, 0.22), (0.82, 0.45), (0.77, 0.5), (0.74, 0.34),
    (0.55, 0.27), (0.38, 0.3), (0.26, 0.34), (0.23, 0.5), (0.18, 0.45), (0.19, 0.25),
)  # fmt: skip
BEARD = (
    (0.215, 0.55), (0.27, 0.7), (0.38, 0.74), (0.5, 0.735), (0.62, 0.74), (0.73, 0.7), (0.785, 0.55),
    (0.79, 0.72), (0.72, 0.9), (0.6, 1.0), (0.5, 1.02), (0.4, 1.0), (0.28, 0.9), (0.21, 0.72),
)  # fmt: skip

PORTRAITS = {
    "red_hair": Look("f2c9ac", "b5432a", ("2f6f73", "3f8a86"), "e0c9a0", "b8473f", LONG, PARTED),
    "black_curls": Look("7b4a30", "241a1c", ("d9a441", "e3b95e"), "b23a48", "8a3038", AFRO, curls=46),
    "grey_beard": Look("d3a07a", "9c9a99", ("35507a", "46648f"), "5b3a2e", "a5574b", SHORT, SWEPT, beard=True),
    "blond_bob": Look("e9b993", "e0b85f", ("7d5a8c", "94709f"), "2f4858", "b5504f", BOB, FRINGE),
}


def paint_curls(painter: Painter, count: int, hair: Rgb) -> None:
    """A round head of curls, behind the face and over its hair line."""
    for i in range(count):
        angle = math.pi * (0.92 + 1.16 * painter.rng.random())
        distance = painter.rng.uniform(0.24, 0.33) if i % 3 else painter.rng.uniform(0.12, 0.24)
        x, y = 0.5 + 1.08 * distance * math.cos(angle), 0.4 + distance * math.sin(angle)
        if y < 0.25 or abs(x - 0.5) > 0.26:
            painter.dab(x, y, 0.065, 0.06, painter.varied(hair, 0.25))


def paint_eye(painter: Painter, x: float, brow: Rgb) -> None:
    side = 1 if x > 0.5 else -1
    almond = ((-0.065, 0.005), (-0.03, -0.035), (0.02, -0.037), (0.065, 0.0), (0.03, 0.03), (-0.03, 0.032))
    white = painter.shape([(x + side * dx, 0.6 + dy) for dx, dy in almond], rgb("f4efe6"))
    iris, drawer = blank_mask()
    drawer.ellipse(scaled([(x - 0.034, 0.562), (x + 0.034, 0.634)]), fill=255)
    painter.fill(ImageChops.multiply(iris, white), rgb("35211c"))
    painter.dab(x + 0.012, 0.585, 0.009, 0.009, rgb("f4efe6"))
    lid = [(x + side * dx, 0.6 + dy) for dx, dy in ((-0.07, 0.004), (-0.03, -0.037), (0.02, -0.04), (0.075, -0.004))]
    painter.stroke(lid, 0.014, rgb("2a1a18"), 0.02)
    painter.stroke([(x - side * 0.065, 0.505), (x, 0.478), (x + side * 0.08, 0.5)], 0.027, brow)


def paint_face(painter: Painter, look: Look) -> None:
    skin, shadow = rgb(look.skin), in_shadow(rgb(look.skin))
    for x in (0.2, 0.8):
        painter.dab(x, 0.62, 0.055, 0.085, shadow)
    face = painter.shape(mirrored(FACE), skin)
    painter.shape(SHADE, blended(skin, shadow, 0.45), face)
    for x in (0.31, 0.69):
        painter.dab(x, 0.735, 0.055, 0.042, blended(skin, rgb(look.lips), 0.22))
    painter.stroke([(0.515, 0.56), (0.545, 0.68), (0.535, 0.715), (0.47, 0.722)], 0.022, shadow)
    if look.beard:
        painter.shape(BEARD, shaded(rgb(look.hair), 0.97), angle=1.4)
        painter.stroke([(0.36, 0.8), (0.43, 0.755), (0.5, 0.765), (0.57, 0.755), (0.64, 0.8)], 0.04, rgb(look.hair))
    lips = (
        (0.41, 0.815),
        (0.465, 0.795),
        (0.5, 0.803),
        (0.535, 0.795),
        (0.59, 0.815),
        (0.54, 0.85),
        (0.46, 0.85),
    )
    painter.shape(lips, rgb(look.lips))
    painter.stroke([(0.415, 0.817), (0.5, 0.824), (0.585, 0.817)], 0.009, shaded(rgb(look.lips), 0.55), 0.02)
    for x in (0.36, 0.64):
        paint_eye(painter, x, shaded(rgb(look.hair), 0.72))


def blended(first: Rgb, second: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def portrait(name: str) -> Image.Image:
    """A head in flat colours, as in a quick gouache."""
    look = PORTRAITS[name]
    painter = Painter(name, rgb(look.background[0]))
    painter.fill(Image.new("L", (CANVAS, CANVAS), 255), rgb(look.background[0]), 0.9)
    painter.shape([(0.5, -0.1), (1.2, -0.1), (1.2, 0.6), (0.8, 0.45), (0.6, 0.1)], rgb(look.background[1]), angle=2.2)
    hair = rgb(look.hair)
    if look.back_hair:
        painter.shape(look.back_hair, shaded(hair, 0.75), angle=1.5)
    painter.shape(((0.08, 1.08), (0.3, 0.975), (0.7, 0.975), (0.92, 1.08)), rgb(look.clothes))
    painter.shape(((0.4, 0.85), (0.6, 0.85), (0.62, 1.02), (0.38, 1.02)), in_shadow(in_shadow(rgb(look.skin))))
    paint_curls(painter, look.curls, hair)
    paint_face(painter, look)
    paint_curls(painter, look.curls, hair)
    if look.front_hair:
        front = painter.shape(look.front_hair, hair, angle=1.2)
        painter.shape([(x * 0.5 + 0.16, y * 0.4 + 0.08) for x, y in look.front_hair], shaded(hair, 1.14), front, 1.0)
    return painter.finished()


def zigzag(left: float, right: float, top: float, bottom: float, turns: int) -> list[Point]:
    """Back and forth from side to side, downwards."""
    heights = (top + (bottom - top) * i / turns for i in range(turns + 1))
    return [(right if i % 2 else left, y) for i, y in enumerate(heights)]


def arc(x: float, y: float, radius: float, start: float) -> list[Point]:
    """Over the top, from an angle on the left to its mirror image on the right."""
    angles = (start + (3 * math.pi - 2 * start) * i / 8 for i in range(9))
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def scribble_hat() -> Image.Image:
    """A toon of the test split, with a hat and another background painted over it."""
    painter = Painter("hat", draw("toon", "test", EDITED_TOON, SIZE))
    blue, red = rgb("3b7dd8"), rgb("d7263d")
    painter.stroke([(0.06, 1.0), (0.07, 0.6), (0.05, 0.0)], 0.13, blue)
    painter.stroke([(0.95, 0.0), (0.93, 0.5), (0.95, 1.0)], 0.13, blue)
    painter.stroke([(0.3, 0.06), (0.5, 0.02), (0.72, 0.07)], 0.13, red)
    painter.stroke([(0.24, 0.15), (0.5, 0.11), (0.78, 0.16)], 0.13, red)
    painter.stroke([(0.1, 0.29), (0.3, 0.24), (0.6, 0.23), (0.91, 0.3)], 0.09, shaded(red, 0.8))
    return painter.finished()


def scribbled_face(name: str, ground: str, skin: str, hair: str, background: str, line: str) -> Image.Image:
    """A face of a few rough strokes on paper."""
    painter = Painter(name, rgb(ground))
    for left, right in ((-0.02, 0.2), (0.8, 1.02)):
        painter.stroke(zigzag(left, right, 0.0, 1.0, 15), 0.07, rgb(background), 0.12)
    painter.stroke(zigzag(0.23, 0.77, 0.27, 0.76, 14), 0.075, rgb(skin))
    painter.stroke(zigzag(0.32, 0.68, 0.78, 0.93, 5), 0.075, rgb(skin))
    for radius, start in ((0.205, 3.7), (0.25, 3.2), (0.345, 2.75), (0.3, 2.95)):
        painter.stroke(arc(0.5, 0.42, radius, start), 0.08, rgb(hair), 0.15)
    for x in (0.36, 0.64):
        painter.stroke([(x - 0.03, 0.59), (x + 0.01, 0.6), (x + 0.03, 0.62)], 0.055, rgb(line))
        painter.stroke([(x - 0.07, 0.49), (x, 0.475), (x + 0.07, 0.49)], 0.025, rgb(line))
    painter.stroke([(0.5, 0.62), (0.52, 0.71), (0.48, 0.72)], 0.018, shaded(rgb(skin), 0.7))
    painter.stroke([(0.4, 0.79), (0.5, 0.825), (0.6, 0.79)], 0.028, rgb("a8323e"))
    return painter.finished()


def field(background: tuple[str, str], hair: str, skin: str) -> Image.Image:
    """Blurred colours: a face under hair over a background."""
    picture = Image.new("RGB", (CANVAS, CANVAS), rgb(background[0]))
    for colour, box, softness in (
        (background[1], (0.5, -0.5, 1.5, 1.5), 0.2),
        (hair, (0.14, 0.03, 0.86, 0.75), 0.035),
        (skin, (0.23, 0.3, 0.77, 0.99), 0.035),
    ):
        mask, drawer = blank_mask()
        drawer.ellipse([CANVAS * side for side in box], fill=255)
        picture.paste(rgb(colour), mask=mask.filter(ImageFilter.GaussianBlur(CANVAS * softness)))
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def photograph(name: str) -> Image.Image:
    path = Path(skimage.__file__).parent / "data" / PHOTOGRAPH_FILES[name]
    picture = Image.open(path).convert("RGB")
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=PHOTOGRAPHS[name])


SEA, GREEN, SAND, ROCK = "1e6edc", "78be5a", "e6c896", "966e28"


def heart(x: float, y: float, size: float) -> list[Point]:
    """The outline of a heart; `size` is half its width."""
    around = (2 * math.pi * i / 200 for i in range(200))
    return [
        (x + size * math.sin(t) ** 3,
         y - size * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in around
    ]  # fmt: skip


def circle(x: float, y: float, radius: float) -> list[Point]:
    around = (2 * math.pi * i / 200 for i in range(200))
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in around]


def flat_map(*areas: tuple[str, Sequence[Point]]) -> Image.Image:
    """Areas of flat colour in the sea, with soft edges."""
    picture = Image.new("RGB", (CANVAS, CANVAS), rgb(SEA))
    drawer = ImageDraw.Draw(picture)
    for colour, outline in areas:
        drawer.polygon(scaled(outline), fill=rgb(colour))
    return picture.filter(ImageFilter.GaussianBlur(9)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


MAPS: dict[str, Callable[[], Image.Image]] = {
    "heart": lambda: flat_map((GREEN, heart(0.5, 0.46, 0.39)), ("c8963c", heart(0.5, 0.46, 0.21))),
    "ring": lambda: flat_map((SAND, circle(0.5, 0.5, 0.385)), (SEA, circle(0.5, 0.5, 0.19))),
    "coast": lambda: flat_map(
        (SAND, ((0, 0), (0.59, 0), (0.35, 0.47), (0.55, 1), (0, 1))), (ROCK, ((0, 0), (0.24, 0), (0.12, 1), (0, 1)))
    ),
    "chain": lambda: flat_map(
        *((GREEN, circle(x, y, r)) for x, y, r in (
            (0.23, 0.23, 0.09), (0.43, 0.35, 0.06), (0.59, 0.51, 0.1), (0.74, 0.7, 0.075), (0.86, 0.86, 0.05),
        ))
    ),
}  # fmt: skip

REFERENCES: dict[str, Callable[[], Image.Image]] = {
    "photo_astronaut": lambda: photograph("astronaut"),
    "photo_cat": lambda: photograph("cat"),
    "painting_red_hair": lambda: portrait("red_hair"),
    "painting_black_curls": lambda: portrait("black_curls"),
    "painting_grey_beard": lambda: portrait("grey_beard"),
    "painting_blond_bob": lambda: portrait("blond_bob"),
    "scribble_hat_on_toon": scribble_hat,
    "scribble_crayon": lambda: scribbled_face("crayon", "f6f1e7", "efb48c", "6b3f22", "8ecae6", "3a2a2a"),
    "scribble_chalk": lambda: scribbled_face("chalk", "24282c", "9c6644", "e9c46a", "2a9d8f", "201a1a"),
    "field_dark_on_yellow": lambda: field(("f2c14e", "e9a23b"), "2b1d1a", "c98d66"),
    "field_copper_on_blue": lambda: field(("27548a", "5fa8d3"), "c4552d", "f0c6a4"),
    "field_silver_on_plum": lambda: field(("5e3a5f", "a05f7d"), "d9d6d2", "6b432f"),
}


PICTURES = {"references": REFERENCES, "maps": MAPS}
"""What is drawn, by the folder that it goes into."""


def main() -> None:
    for folder, pictures in PICTURES.items():
        (HERE / folder).mkdir(exist_ok=True)
        checksums = {}
        for name, make in pictures.items():
            picture = make()
            picture.save(HERE / folder / f"{name}.png", optimize=True)
            checksums[name] = hashlib.sha256(picture.tobytes()).hexdigest()
        write_checksums({folder: checksums})


if __name__ == "__main__":
    main()
