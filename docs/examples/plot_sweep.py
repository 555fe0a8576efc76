"""
N and range, side by side
=========================

Two settings decide how closely samples follow a reference: the factor N, and the range of timesteps in which it is
followed. This draws one sample for each combination, all from the same noise. ``sample.py --sweep`` makes the same
sheet for your own pictures.
"""

from pathlib import Path

import matplotlib.pyplot as plt

import ilvr_lightning
from ilvr_lightning import generate, load_denoiser
from ilvr_lightning.data.references import find_references

denoise = load_denoiser("toon64")
path = Path(ilvr_lightning.__file__).parents[1] / "data" / "references" / "scribble_chalk.png"
reference = find_references([str(path)], denoise.image_shape)[0].tensor[None]

# %%
# All factors are sampled in one batch, because a plan takes one factor per image.

factors, ends = (4, 8, 16, 32), (0, 250, 500, 750)
figure, axes = plt.subplots(len(ends), len(factors) + 1, figsize=(8, 6.6), layout="constrained")
for row, end in zip(axes, ends, strict=True):
    plan = denoise.preset("draft", factors, condition_to=end, octave_gains=())
    x = generate(denoise, plan, seeds=[0] * len(factors), shape=denoise.image_shape, reference=reference)
    for axis, image in zip(row, [*reference, *x], strict=True):
        axis.imshow((image.movedim(0, -1) / 2 + 0.5).clamp(0, 1))
        axis.axis("off")
    row[0].set_title(f"range 1000:{end}", loc="left", fontsize=10)
for axis, factor in zip(axes[0, 1:], factors, strict=True):
    axis.set_title(f"N={factor}")
plt.show()
