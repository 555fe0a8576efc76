"""Write the model card of a bundled model, from what its weights say: its README.md.

    python data/pretrained/make_card.py data/pretrained/toon64

The last section of the card (images, licence, limits) is written by hand, and kept; PNG files in the folder are shown.
"""

import sys
from pathlib import Path

from ilvr_lightning.checkpoints import push
from ilvr_lightning.checkpoints.load import identify


def model_card(folder: Path) -> str:
    """The card of a folder with model.safetensors, with the notes of the README.md that is there."""
    readme = folder / "README.md"
    notes = readme.read_text().partition(push.NOTES)[2] if readme.is_file() else ""
    pictures = [path.name for path in sorted(folder.glob("*.png"), reverse=True)]
    return push.model_card(identify(folder).description, notes, pictures)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (Path(name) / "README.md").write_text(model_card(Path(name)))
