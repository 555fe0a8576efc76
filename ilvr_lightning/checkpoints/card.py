"""The model card that goes with exported weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ilvr_lightning.checkpoints.description import ModelDescription, gain_lines
from ilvr_lightning.checkpoints.families.native import data_set_of
from ilvr_lightning.config.load import config_from_dict

CARD = """---
library_name: ilvr_lightning
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, ilvr]
---
# {title}
{pictures}
An unconditional diffusion model, {height}x{width} px, {channels} channels. ILVR (Choi et al., ICCV 2021) steers it with
a reference picture and no retraining:

    python sample.py --ckpt model.safetensors --ref PICTURE --factor 8

or, as a library:

    from ilvr_lightning import generate, load_denoiser

    denoise = load_denoiser("model.safetensors")
    x = generate(denoise, denoise.schedule, denoise.preset("fast", factor=8),
                 seeds=[0, 1, 2, 3], shape=denoise.image_shape, reference=y)    # y: (1, C, H, W) in [-1, 1]

## Training
| | |
|---|---|
{training}

## Settings
| | |
|---|---|
{settings}

The weights' metadata holds the whole configuration.

## Images, licence, limits
{notes}
"""


NO_NOTES = "Licence and limits of the training images apply to what the model makes; say here which they are."


def model_card(description: ModelDescription, notes: str = "", pictures: Sequence[str] = ()) -> str:
    """README.md for a folder of exported weights.

    Args:
        description: the model's.
        notes: Markdown on its training images and their licence, on what it can do and cannot.
        pictures: files beside the card, shown in it.
    """
    channels, height, width = description.image_shape
    training: dict[str, Any] = {"data set": data_set_of(description), **description.facts}
    if description.config is not None:
        config = config_from_dict(description.config)
        training["global batch"] = config.data.batch_size
        training["learning rate"] = config.optim.lr
        training["EMA decay"] = config.ema.decay
        training["loss"] = config.diffusion.loss
        training["precision"] = config.trainer.precision or "32-true"
    else:
        training["converted from"] = description.kind
    settings = dict(line.split(None, 1) for line in [*description.lines()[1:], *gain_lines(description)])
    name = data_set_of(description).rstrip("/").split("/")[-1] if description.config else description.kind
    return CARD.format(
        title=f"{name}, {height} px",
        channels=channels,
        height=height,
        width=width,
        pictures="".join(f"\n![{Path(name).stem}]({quote(name)})\n" for name in pictures),
        notes=notes.strip() or NO_NOTES,
        training="\n".join(f"| {key} | {value} |" for key, value in training.items()),
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
    )
