"""Push: a denoiser and its model card, uploaded to the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.errors import UserError, first_line

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
UNKNOWN = (
    "\nThe author has not yet written what the images are, under which licence they may be used, and what fails.\n"
)


def model_card(description: ModelDescription, notes: str = UNKNOWN, pictures: Sequence[str] = ()) -> str:
    """The text of a card, README.md.

    Args:
        description: of the checkpoint.
        notes: what follows the heading NOTES.
        pictures: names of files beside the card.
    """
    channels, height, width = description.image_shape
    facts: dict[str, Any] = {name: fact for name, fact in description.facts.items() if name != "epoch"}
    title = description.kind
    if (config := description.config) is not None:
        title = Path(config["data"]["path"]).name
        facts = {
            "data set": config["data"]["path"],
            **facts,
            "global batch": config["data"]["batch_size"],
            "learning rate": config["optim"]["lr"],
            "EMA decay": config["ema"]["decay"],
            "loss": config["diffusion"]["loss"],
            "precision": config["trainer"].get("precision", "32-true"),
        }
    settings = dict(line.split(None, 1) for line in [*description.lines()[1:], *description.gain_lines()])
    card = CARD.format(
        title=f"{title}, {height} px",
        channels=channels,
        height=height,
        width=width,
        pictures="".join(f"\n![{Path(name).stem}]({name})\n" for name in pictures),
        training="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
    )
    return card + NOTES + notes


def push(loaded: LoadedDenoiser, repository: str, private: bool = False, half: bool = False) -> str:
    """Upload model.safetensors and a card; a card that the repository has already is kept.

    Args:
        loaded: what load_denoiser returned.
        repository: USER/NAME on the Hub, which is made if it does not exist.
        private: make it private; a repository that exists stays what it is.
        half: upload the weights in float16.

    Returns:
        The address of the repository.

    Raises:
        UserError: the network cannot be exported, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        export(loaded, "safetensors", folder, half)
        try:
            hub = HfApi()
            url = hub.create_repo(repository, private=private, exist_ok=True)
            if not hub.file_exists(repository, "README.md"):
                (folder / "README.md").write_text(model_card(loaded.description))
            hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by ilvr_lightning")
        except Exception as error:  # the library of its connections, and so their errors, differ between versions
            raise UserError(
                f"push to {repository}: {first_line(error)}; log in by `hf auth login` with a token that may write"
            ) from None
    return str(url)
