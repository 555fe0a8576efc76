"""Peak memory and seconds of loading a full-size checkpoint: the 93.6 M parameters of the published 256 px files.

    python -m benchmarks.loading [--repeats 3] [--folder DIR]

The files are made from names and shapes alone (random weights). Each is loaded in a process of its own; memory is the
peak resident size (Linux's VmHWM) above that of an interpreter which has imported torch and load_denoiser.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ilvr_lightning.checkpoints.families import adm
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet

PUBLISHED = UNetConfig(
    channels=128,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=1,
    attention_resolutions=(16,),
    num_head_channels=64,
    resblock_updown=True,
    learn_sigma=True,
)
"""FFHQ, AFHQ-dog, CelebA-HQ, CUB, Flowers and MetFaces (Choi et al. 2021)."""

CHILD = """
import re, sys, time
import torch
from ilvr_lightning.checkpoints.load import load_denoiser
def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = kib("VmRSS")
start = time.perf_counter()
loaded = load_denoiser(sys.argv[1], say=None)
seconds = time.perf_counter() - start
print(kib("VmHWM") - before, seconds, sum(p.numel() for p in loaded.network.parameters()))
"""


def published_state() -> dict[str, Tensor]:
    """Random weights under the published files' names."""
    ours = UNet(PUBLISHED, (256, 256)).state_dict()
    state = {}
    for name, (theirs,) in adm.FAMILY.names(ours, PUBLISHED).items():
        value = torch.randn(ours[name].shape)
        state[theirs] = value[..., None] if re.search(r"(qkv|proj_out)\.weight$", theirs) else value
    return state


def main() -> None:
    """Make the files, load each in processes of its own, print a line per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go for the while; a temporary one unless given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        state = published_state()
        half = {name: value.half() for name, value in state.items()}
        files = {
            name: Path(folder) / name for name in ("float32.pt", "half.pt", "float32.safetensors", "old_zipless.pt")
        }
        torch.save(state, files["float32.pt"])
        torch.save(half, files["half.pt"])
        save_file(state, files["float32.safetensors"])
        torch.save(state, files["old_zipless.pt"], _use_new_zipfile_serialization=False)
        del state, half
        print(f"{'file':22}{'peak MiB':>10}{'of float32 weights':>20}{'seconds':>10}")
        for name, path in files.items():
            runs = [measure(path) for _ in range(args.repeats)]
            kib, seconds = (statistics.median(values) for values in list(zip(*runs, strict=True))[:2])
            weights = 4 * runs[0][2]
            print(f"{name:22}{kib / 1024:10.0f}{kib * 1024 / weights:20.2f}{seconds:10.2f}")
        print(f"{runs[0][2]:,} parameters")


def measure(path: Path) -> tuple[float, float, int]:
    """KiB above idle, seconds and parameters of one load."""
    out = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True).stdout
    kib, seconds, parameters = out.split()
    return float(kib), float(seconds), int(parameters)


if __name__ == "__main__":
    main()
