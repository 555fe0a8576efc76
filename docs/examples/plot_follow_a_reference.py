"""
Follow a reference
==================

A bundled model draws faces that share their coarse structure with a painting. The smaller the factor N, the more of
the painting is kept.
"""

from pathlib import Path

import matplotlib.pyplot as plt

import ilvr_lightning
from ilvr_lightning import LowPassFilter, generate, load_denoiser
from ilvr_lightning.data.references import find_references

denoise = load_denoiser("toon64")
painting = Path(ilvr_lightning.__file__).parents[1] / "data" / "references" / "painting_blond_bob.png"
reference = find_references([str(painting)], denoise.image_shape)[0].tensor[None]  # (1, 3, 64, 64) in [-1, 1]

# %%
# Each row has another factor: the reference, what is kept of it, and four samples. The preset ``draft`` takes ten
# evaluations of the network per image.


def picture(x):
    """(3, H, W) in [-1, 1] as matplotlib wants it."""
    return (x.movedim(0, -1) / 2 + 0.5).clamp(0, 1)


factors = [32, 16, 8]
figure, axes = plt.subplots(len(factors), 6, figsize=(9, 4.9), layout="constrained")
for row, factor in zip(axes, factors, strict=True):
    x = generate(
        denoise, denoise.preset("draft", factor), seeds=[0, 1, 2, 3], shape=denoise.image_shape, reference=reference
    )
    kept = LowPassFilter((64, 64), factor, orthogonal=True)(reference)
    for axis, image in zip(row, [*reference, *kept, *x], strict=True):
        axis.imshow(picture(image))
        axis.axis("off")
    row[1].set_title(f"kept at N={factor}")
axes[0, 0].set_title("reference")
plt.show()
