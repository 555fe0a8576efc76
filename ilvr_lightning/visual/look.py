"""train.py --look: a sheet of training images as the network will see them, their values, and what is left out."""

import functools
import textwrap
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.config.schema import Config
from ilvr_lightning.data.augment import augment, training_seeds
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.dataset import MAX_NAMED
from ilvr_lightning.data.images import SUFFIXES, Pixels, from_tensor
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.trainer import silence_lightning
from ilvr_lightning.visual.grids import Column, draw_grid

IMAGES, COLUMNS = 48, 8
"""So many images are shown, in rows of so many."""

SECONDS = 10.0
"""Further images are read for so long: for their values, and to find those that cannot be read."""

MARGIN, BARS, LINE = 12, 100, 20
"""Of the sheet, in pixels: its margin, the height of the histogram, and the height of a line of text."""


COLOURS = {1: ["black"], 3: ["firebrick", "green", "blue"]}
"""Of the lines of the histogram, by the number of channels."""


def look(config: Config) -> int:
    """Write the sheet to <trainer.default_root_dir>/<name>/look.png and print what is on it; returns the exit status.

    Raises:
        UserError: as ImageDataModule.
    """
    silence_lightning()
    # Decoding here, and only what is looked at, takes seconds for a data set of any size. The batches have no end.
    settings = replace(config.data, cache_mb=0, num_workers=0, epoch_images=10**9)
    data = ImageDataModule(settings, config.seed)
    data.setup()
    assert data.train is not None
    # A training refuses fewer images than a batch has; a look shows them.
    data.config = replace(data.config, batch_size=min(data.config.batch_size, len(data.train)))
    shown, histogram, broken = _read(data)
    height, width = config.data.size
    lines = [
        f"{config.data.path}: {data.counts}",
        _values(histogram, int(histogram[0].sum()) // (height * width)),
        *_left_out(broken, Path(config.data.path).expanduser()),
    ]
    rows = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)]
    which = (
        f"the first {len(shown)} images"
        if len(data.train) >= len(shown)
        else f"{len(data.train)} images, again and again"
    )
    label = f"{which} of the training as the network sees them, {height}x{width} px"
    sheet = _with_text(draw_grid([Column(label=label, rows=rows)], ""), histogram, lines)
    path = Path(config.trainer.default_root_dir) / config.name / "look.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, functools.partial(sheet.save, format="PNG"))
    say("data         " + "\n             ".join(lines))
    say(f"look         {path}: {len(shown)} images")
    return 0


def _read(data: ImageDataModule) -> tuple[list[Pixels], NDArray[np.int64], list[str]]:
    """The images to show, the histogram (C, 256) of all that were read, and what is wrong with those that are left out.

    The images are those of the first steps of a training, of one pass at most, unless fewer than IMAGES are in it.
    """
    assert data.train is not None
    data.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    shown: list[Pixels] = []
    histogram = np.zeros((data.config.channels, 256), dtype=np.int64)
    start, steps = time.perf_counter(), len(data.train) // data.config.batch_size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, batch in enumerate(data.train_dataloader()):
            seeds = training_seeds(data.seed, step, range(data.config.batch_size))
            pixels = from_tensor(augment(batch["image"], seeds, data.config))
            shown += list(pixels[: IMAGES - len(shown)])
            histogram += [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, -1, 0)]
            enough = step + 1 >= steps or time.perf_counter() - start > SECONDS
            if enough and len(shown) == IMAGES:
                break
    messages = (str(warning.message) for warning in caught if warning.category is UserWarning)
    return shown, histogram, list(dict.fromkeys(messages))


def _values(histogram: NDArray[np.int64], count: int) -> str:
    """The range of the values of so many images, in words."""
    by_value = histogram.sum(0)
    found = np.flatnonzero(by_value)
    mean = (by_value * np.arange(256)).sum() / by_value.sum()
    ends = 100 * by_value[[0, 255]] / by_value.sum()
    return (
        f"{count:,} images were read: values from {found[0]} to {found[-1]}, {mean:.0f} on average; {ends[0]:.1f}% of "
        f"them are 0 and {ends[1]:.1f}% are 255"
    )


def _left_out(broken: list[str], path: Path) -> list[str]:
    """What is not trained on, in words: images that cannot be read, and the files of a folder that are no images."""
    lines = broken[:MAX_NAMED] + [f"{len(broken)} images cannot be read"] * (len(broken) > MAX_NAMED)
    endings = Counter(file.suffix.lower() for file in path.rglob("*") if file.is_file()) if path.is_dir() else Counter()
    others = {ending: count for ending, count in endings.items() if ending not in SUFFIXES}
    if 0 < len(others) < len(endings):
        named = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in sorted(others.items()))
        lines.append(f"files that are no images by their endings: {named}")
    return ["left out: " + line for line in lines] or ["nothing was found that is left out"]


def _with_text(grid: Image.Image, histogram: NDArray[np.int64], lines: list[str]) -> Image.Image:
    """The grid with the histogram and lines of text below it."""
    font = ImageFont.load_default(14)
    wrapped = [part for line in lines for part in textwrap.wrap(line, max(40, (grid.width - 2 * MARGIN) // 8))]
    height = grid.height + BARS + 2 * LINE + LINE * len(wrapped) + MARGIN
    sheet = Image.new("RGB", (max(grid.width, 2 * MARGIN + 512), height), "white")
    sheet.paste(grid)
    draw, bottom = ImageDraw.Draw(sheet), grid.height + BARS
    # The square root shows rare values, too. Black and white, which may be most of a picture, are cut at the top.
    tall = np.sqrt(histogram / max(1, histogram[:, 1:255].max())).clip(0, 1)
    for values, colour in zip(tall, COLOURS[len(tall)], strict=True):
        draw.line([(MARGIN + 2 * v, bottom - BARS * float(h)) for v, h in enumerate(values)], fill=colour, width=2)
    draw.text((MARGIN, bottom + 2), "0", fill="black", font=font)
    draw.text((MARGIN + 512 - font.getlength("255"), bottom + 2), "255", fill="black", font=font)
    for number, line in enumerate(wrapped):
        draw.text((MARGIN, bottom + LINE + MARGIN // 2 + LINE * number), line, fill="black", font=font)
    return sheet
