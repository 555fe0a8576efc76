"""The same references by several samplers, side by side: blur and grain are seen before they are measured.

    python -m benchmarks.side_by_side --ckpt CKPT --ref IMAGES... --out grid.png [--factor 8] [--tile 128]
        [--rows 'DDPM as the paper, 1000' 'DDPM as the paper, 20' '2M, eta 0, 20' 'draft*' 'fast*' ...]

Rows are those of `benchmarks.trained`; every sampler begins with the same x_T.
"""

import argparse
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.trained import rows, sample
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.images import from_tensor
from ilvr_lightning.data.references import find_references
from ilvr_lightning.visual.grids import Column, draw_grid

ROWS = [
    "DDPM as released, 20", "DDPM as the paper, 20", "DDPM as the paper, 1000", "DDIM, fresh noise, 20",
    "2M, eta 0, 20", "draft*", "fast*",
]  # fmt: skip


def main() -> None:
    """Draw the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--ref", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--tile", type=int, default=128, help="pixels; tiles are enlarged by a whole number")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="GLOB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = load_denoiser(args.ckpt)
    references = find_references(args.ref, loaded.image_shape, "crop")
    y, hashes = torch.stack([r.tensor for r in references]), [r.sha256 for r in references]
    columns = [Column(label="reference", rows=[[r.pixels] for r in references])]
    table = rows(loaded, args.factor)
    for pattern in args.rows:
        for name in (name for name in table if fnmatch(name, pattern)):
            made = from_tensor(sample(loaded, table[name], y, hashes, args.seed, len(y)))
            label = name.replace("DDPM as ", "").replace(", fresh noise", "").replace("gain ", "g=")
            columns.append(Column(label=label, rows=[[tile] for tile in made]))
            print(name, flush=True)
    draw_grid(columns, f"N={args.factor}, one x_T a reference", args.tile).save(args.out)


if __name__ == "__main__":
    main()
