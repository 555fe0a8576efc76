"""Write the model card of a bundled model, from what its weights say: its README.md.

    python data/pretrained/make_card.py data/pretrained/toon64

The last section of the card (images, licence, limits) is written by hand, and kept; PNG files in the folder are shown.
"""

import sys
from pathlib import Path
from typing import Any

from ilvr_lightning.checkpoints.load import identify

CARD = """---
library_name: ilvr_lightning
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, ilvr]
---
# {title}
{pictures}
An unconditional diffusion model, {height}x{width} px, {channels} channels. A reference picture steers it by ILVR
(Choi et al., ICCV 2021), without retraining:

    python sample.py --ckpt model.safetensors --ref PICTURE --factor 8

or, as a library:

    from ilvr_lightning import generate, load_denoiser

    denoise = load_denoiser("model.safetensors")
    x = generate(denoise, denoise.preset("fast", factor=8),
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

"""
NOTES = "## Images, licence, limits\n"


def model_card(folder: Path) -> str:
    """The card of a folder with model.safetensors, with the notes of the README.md that is there."""
    description = identify(folder).description
    config = description.config
    assert config is not None, "only models of train.py have a configuration"
    channels, height, width = description.image_shape
    training: dict[str, Any] = {
        "data set": config["data"]["path"],
        **{name: fact for name, fact in description.facts.items() if name != "epoch"},
        "global batch": config["data"]["batch_size"],
        "learning rate": config["optim"]["lr"],
        "EMA decay": config["ema"]["decay"],
        "loss": config["diffusion"]["loss"],
        "precision": config["trainer"].get("precision", "32-true"),
    }
    settings = dict(line.split(None, 1) for line in [*description.lines()[1:], *description.gain_lines()])
    readme = folder / "README.md"
    notes = readme.read_text().partition(NOTES)[2] if readme.is_file() else ""
    card = CARD.format(
        title=f"{Path(training['data set']).name}, {height} px",
        channels=channels,
        height=height,
        width=width,
        pictures="".join(f"\n![{path.stem}]({path.name})\n" for path in sorted(folder.glob("*.png"), reverse=True)),
        training="\n".join(f"| {key} | {value} |" for key, value in training.items()),
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
    )
    return card + NOTES + notes


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (Path(name) / "README.md").write_text(model_card(Path(name)))
