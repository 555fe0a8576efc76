"""
A sampler in one function
=========================

A sampler is a generator that goes from one timestep to the next. It calls the network through ``run.predict`` and
the conditioning through ``run.conditioning``; the noise schedule, the choice of timesteps and the reference are not
its business. One entry in a registry makes it available to ``sample.py --sampler`` and to the configs.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt

import ilvr_lightning
from ilvr_lightning import generate, load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.plan import SAMPLER_SETTINGS
from ilvr_lightning.diffusion.samplers import SAMPLERS, SamplerState


def restart(run, x):
    """Predict the image, and noise it again for the next timestep (Song et al. 2023, algorithm 1)."""
    for t, s, _, a_s in run.steps():
        x0 = run.predict(x, t).x0
        x = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * run.noise.draw("sampler", x) if s else x0
        x = run.conditioning.refine_sample(x, s)
        yield SamplerState(x=x, x0=x0, t=s)


SAMPLERS["restart"] = restart
SAMPLER_SETTINGS["restart"] = ()  # it reads no setting of its own, such as eta

# %%
# Four samples by it, and by the default sampler, from the same noise and in as many steps.

denoise = load_denoiser("animals64")
photo = Path(ilvr_lightning.__file__).parents[1] / "data" / "references" / "photo_cat.png"
reference = find_references([str(photo)], denoise.image_shape)[0].tensor[None]

samplers = ["restart", "dpmpp_2m"]
figure, axes = plt.subplots(2, 5, figsize=(8, 3.5), layout="constrained")
for row, sampler in zip(axes, samplers, strict=True):
    plan = denoise.preset("draft", factor=16, sampler=sampler)
    x = generate(denoise, plan, seeds=[0, 1, 2, 3], shape=denoise.image_shape, reference=reference)
    for axis, image in zip(row, [*reference, *x], strict=True):
        axis.imshow((image.movedim(0, -1) / 2 + 0.5).clamp(0, 1))
        axis.axis("off")
    row[1].set_title(sampler, loc="left")
plt.show()
