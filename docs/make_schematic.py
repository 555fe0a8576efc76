"""Draw the schematic of ILVR, docs/pictures/schematic.png: python docs/make_schematic.py (needs matplotlib)

The pictures in it are those of one step of the bundled model toon64, near t = 600.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from ilvr_lightning.checkpoints.find import BUNDLED
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.generate import generate_steps
from ilvr_lightning.diffusion.low_pass import LowPassFilter

ROOT = Path(__file__).parents[1]
INK, KEPT, DRAWN = "#24292f", "#1f6f8b", "#b5502b"


def picture(
    axes: Axes, x: Tensor, left: float, bottom: float, label: str, colour: str = INK, size: float = 1.5
) -> None:
    """One image (C, H, W) with a line under it."""
    pixels = (x.detach().movedim(0, -1) / 2 + 0.5).clamp(0, 1)
    axes.imshow(pixels, extent=(left, left + size, bottom, bottom + size), interpolation="nearest", zorder=2)
    axes.text(left + size / 2, bottom - 0.12, label, ha="center", va="top", fontsize=12, color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: float = 0) -> None:
    """From one point to another."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, lw=1.8, color=colour, connectionstyle=style)
    )


def box(axes: Axes, left: float, bottom: float, width: float, text: str, colour: str = INK) -> None:
    """A step of the computation."""
    axes.add_patch(FancyBboxPatch((left, bottom), width, 0.9, boxstyle="round,pad=0.05", fc="white", ec=colour, lw=1.6))
    axes.text(left + width / 2, bottom + 0.45, text, ha="center", va="center", fontsize=12, color=colour)


def draw() -> None:
    """Write the file."""
    denoise = load_denoiser(BUNDLED / "toon64", say=None)
    path = ROOT / "data" / "references" / "painting_blond_bob.png"
    y = find_references([str(path)], denoise.image_shape)[0].tensor[None]
    phi = LowPassFilter((64, 64), 8, orthogonal=True)
    plan = denoise.preset("draft", 8)
    states = list(generate_steps(denoise, plan, seeds=[3], shape=denoise.image_shape, reference=y))
    at = min(range(1, len(states)), key=lambda i: abs(states[i].t - 600))
    x_t, next_x = states[at - 1].x, states[at].x
    free = denoise(x_t, x_t.new_full((1,), states[at - 1].t).long()).x0.clamp(-1, 1)

    figure, axes = plt.subplots(figsize=(11, 4.3))
    axes.set_xlim(0, 14.6)
    axes.set_ylim(-0.1, 5.2)
    axes.set_aspect("equal")
    axes.axis("off")
    # above: the reference
    picture(axes, y[0], 4.2, 3.5, "reference", KEPT)
    arrow(axes, (5.8, 4.25), (6.4, 4.25), KEPT)
    box(axes, 6.5, 3.8, 1.7, "low-pass\nfilter, N", KEPT)
    arrow(axes, (8.3, 4.25), (8.9, 4.25), KEPT)
    picture(axes, phi(y)[0], 9.0, 3.5, "coarse structure", KEPT)
    arrow(axes, (9.75, 3.05), (9.75, 1.95), KEPT)
    # below: one step
    picture(axes, x_t[0], 0.1, 0.5, f"noise, t = {states[at - 1].t}")
    arrow(axes, (1.7, 1.25), (2.2, 1.25))
    box(axes, 2.3, 0.8, 1.5, "trained\nnetwork", DRAWN)
    arrow(axes, (3.9, 1.25), (4.4, 1.25), DRAWN)
    picture(axes, free[0], 4.5, 0.5, "prediction", DRAWN)
    arrow(axes, (6.1, 1.25), (6.6, 1.25), DRAWN)
    picture(axes, (free - phi(free))[0] * 1.5, 6.7, 0.5, "fine detail", DRAWN)
    axes.text(8.55, 1.25, "+", ha="center", va="center", fontsize=22)
    picture(axes, phi(y)[0], 9.0, 0.5, "coarse structure", KEPT, 1.35)
    axes.text(10.72, 1.25, "=", ha="center", va="center", fontsize=22)
    picture(axes, (free - phi(free) + phi(y))[0], 11.0, 0.5, "corrected")
    arrow(axes, (12.6, 1.25), (13.0, 1.25))
    picture(axes, next_x[0], 13.05, 0.5, f"t = {states[at].t}")
    figure.savefig(ROOT / "docs" / "pictures" / "schematic.png", dpi=120, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw()
