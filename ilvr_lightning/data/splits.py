"""The images that a training sees and those that it validates on."""

import dataclasses
from pathlib import Path

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.dataset import ImageDataset
from ilvr_lightning.data.shards import open_shards
from ilvr_lightning.data.sources import open_source
from ilvr_lightning.data.survey import count_further_pages, find_range
from ilvr_lightning.runtime.command import say


def open_splits(
    config: DataConfig, seed: int = 0, cache: Path | None = None
) -> tuple[DataConfig, ImageDataset, ImageDataset]:
    """The images to train and to validate on, and the config with the range of values that was found.

    Args:
        config: the settings of the data.
        seed: of the choice of the images that are held out.
        cache: folder for decoded images; without one they are decoded in memory.

    Raises:
        UserError: the data set does not exist, is gated or empty, or has no image column.
    """
    train, validation = open_shards(config) if config.streaming else open_source(config, seed)
    same_pictures = validation.part == "held out"
    looked_at = [validation] if config.streaming else [train] if same_pictures else [train, validation]
    if config.known_range is None and (found := find_range(looked_at, config)) is not None:
        config = dataclasses.replace(config, value_range=found[0])
        say(f"values       {found[1]}")
    if config.pages == "first" and (further := sum(map(count_further_pages, looked_at))):
        say(f"pages        at least {further:,} pages of TIFFs are left out; data.pages=all takes them")
    # What is held out is cut into tiles where training crops at random, so that each validation sees the same.
    fixed = dataclasses.replace(config, crop="tiles", streaming=False) if config.crop == "random" else config
    images = ImageDataset(train, config, cache, keep=not config.streaming)
    return config, images, ImageDataset(validation, fixed, cache)
