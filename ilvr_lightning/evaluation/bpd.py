"""bpd: bits per dimension of images under a model."""

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ilvr_lightning.checkpoints.find import find_checkpoint
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.images import to_pixels, to_tensor
from ilvr_lightning.diffusion.noise import PerImageNoise, derive_seed
from ilvr_lightning.errors import UserError
from ilvr_lightning.evaluation.features import device_of
from ilvr_lightning.evaluation.images import open_images
from ilvr_lightning.evaluation.ranks import joined
from ilvr_lightning.evaluation.table import Table
from ilvr_lightning.metrics.intervals import Figure
from ilvr_lightning.metrics.likelihood import Bits, bits_per_dimension
from ilvr_lightning.runtime.command import say

BATCH = 16
"""So many images are evaluated at once, on any number of ranks."""
MOST_LEVELS = 1000


def bpd(args: argparse.Namespace) -> int:
    """Print the bound and its parts."""
    if not 2 <= args.levels <= MOST_LEVELS:
        raise UserError(f"--levels must be from 2 to {MOST_LEVELS}: got {args.levels}")
    denoiser = load_denoiser(find_checkpoint(args.ckpt), args.weights, dict(args.override), say)
    channels, height, width = denoiser.image_shape
    images = open_images(args.data, (height, width), "--data", denoiser.value_range)
    device = device_of(args.device)
    denoiser.network.to(device)

    def batch(rows: Sequence[int]) -> Bits:
        pixels = images.pixels(rows)
        if channels == 1:
            pixels = np.stack([to_pixels(Image.fromarray(each).convert("L")) for each in pixels])
        noise = PerImageNoise([derive_seed("bpd", row) for row in rows])
        return bits_per_dimension(denoiser, denoiser.schedule, to_tensor(pixels).to(device), noise, args.levels)

    with joined() as ranks:
        parts = ranks.over_batches(len(images), batch, BATCH)
    prior, diffusion, decoders = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("prior", "diffusion", "decoder")
    )
    decoder = decoders[:, int(decoders.mean(0).argmin())]
    named = {"bound": prior + diffusion + decoder, "prior": prior, "diffusion": diffusion, "decoder": decoder}
    Table(
        columns={"bits per dimension": {name: _mean(values) for name, values in named.items()}},
        notes=[
            "± is half the width of the 95% interval over the images. The bound is above -log2 of the likelihood of "
            f"8-bit images; its integral has {args.levels} nodes"
        ],
        about={"checkpoint": args.ckpt, "data": args.data, "images": len(images), "levels": args.levels},
    ).show(args.json)
    return 0


def _mean(values: Tensor) -> Figure:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Figure(value=float(values.mean()), error=error, degrees=max(1, count - 1))
