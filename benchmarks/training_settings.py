"""Training settings at equal time: which settings learn the most in so many seconds on this machine.

    python -m benchmarks.training_settings [CONFIG.yaml] --seconds 150 --features FEATURES.pt \\
        --variant NAME [key=value ...] ...

Each variant changes the configuration. Its steps are timed first, then it trains for as many of them as the seconds
hold, the learning rate falling to 0 at the last. Measured on held-out images, so that parametrisations compare:

- bound: the diffusion part of the variational bound in bits per dimension, 1/2 integral of SNR E|x_0 - x^_0|^2 over the
  log-SNR from -9 to 9 (Kingma et al. 2021, equation 17), which the weights' average reaches;
- FD: Frechet distance of unconditional samples (2M, 20 evaluations) from the held-out images in the feature space that
  `benchmarks.features` made;
- grain: power of the finest octave over that of the held-out images.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import train
from benchmarks.features import features_of, load_features
from ilvr_lightning.checkpoints.load import LoadedDenoiser, load_denoiser
from ilvr_lightning.config.load import load_config
from ilvr_lightning.config.schema import Config
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.diffusion.denoiser import Denoise
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import PerImageNoise, derive_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics.bands import frechet_distance, octave_ratios
from ilvr_lightning.metrics.likelihood import diffusion_bits
from ilvr_lightning.runtime.hardware import training_precision
from ilvr_lightning.training.module import DDPM

LOG_SNR = 9.0
LEVELS = 24


def seconds_a_step(config: Config, repeats: int = 8) -> float:
    """Median time of an optimizer step, without data or logs."""
    module = DDPM(config)
    optimizer = torch.optim.AdamW(module.parameters(), config.optim.lr, fused=True)
    bf16 = (config.trainer.precision or training_precision("cpu")) == "bf16-mixed"
    x = torch.randn(config.data.batch_size, *module.image_shape)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module.denoiser.raw(x, torch.ones(len(x), dtype=torch.int64)).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def bound(denoise: Denoise, schedule: NoiseSchedule, x0: Tensor) -> float:
    """Mean of the diffusion part of the bound in bits per dimension, over log-SNRs of LOG_SNR at most."""
    parts = []
    for rows in torch.split(torch.arange(len(x0)), 128):
        noise = PerImageNoise([derive_seed("bound", int(row)) for row in rows])
        parts.append(diffusion_bits(denoise, schedule, x0[rows], noise, LEVELS, LOG_SNR))
    return float(torch.cat(parts).mean())


def unconditional(loaded: LoadedDenoiser, count: int, batch: int = 100) -> Tensor:
    """(count, C, H, W) samples by 2M in 20 evaluations."""
    plan = SamplingPlan.preset("fast")
    made = []
    for first in range(0, count, batch):
        seeds = [derive_seed("recipe", i) for i in range(first, first + batch)]
        made.append(generate(loaded, loaded.schedule, plan, seeds=seeds, shape=loaded.image_shape))
    return torch.cat(made).clamp(-1, 1)


def held_out(config: Config, count: int) -> Tensor:
    """(count, C, H, W) validation images."""
    data = ImageDataModule(config.data, config.seed)
    data.setup()
    assert data.validation is not None
    return torch.stack([data.validation[i][0] for i in range(min(count, len(data.validation)))])


def run(config_file: str, changes: list[str], seconds: float, features: str, images: int) -> list[str]:
    """Train one variant and measure it: the cells of its row."""
    config = load_config([config_file, *changes], default=config_file)
    if not any(change.startswith("trainer.max_steps=") for change in changes):
        steps = int(seconds / seconds_a_step(config))
        changes = ["optim.decay_steps=auto", *changes, f"trainer.max_steps={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        status = train.main([
            config_file, *changes, f"trainer.default_root_dir={folder}", "run.name=run",
            "grid.every_n_epochs=0", "calibration.images=0", "trainer.enable_progress_bar=false",
            "checkpoint.every_n_steps=1000000", "trainer.limit_val_batches=0",
        ])  # fmt: skip
        assert status == 0, changes
        spent = time.perf_counter() - start
        loaded = load_denoiser(next(Path(folder).rglob("last.ckpt")))
        steps = int(next(change for change in changes if change.startswith("trainer.max_steps=")).partition("=")[2])
    real = held_out(config, images)
    fake = unconditional(loaded, images)
    space = load_features(features)
    distance = frechet_distance(features_of(space, fake), features_of(space, real))
    bits = bound(loaded, loaded.schedule, real[:256])
    return [
        f"{spent:.0f}", f"{steps:,}", f"{steps * config.data.batch_size:,}", f"{bits:.3f}",
        f"{distance:.2f}", f"{octave_ratios(fake, real)[-1]:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Print the table, a row as it is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/toon32.yaml")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--features", required=True, help="what benchmarks.features saved, or a name such as efflite")
    parser.add_argument("--images", type=int, default=500, help="samples, and held-out images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", nargs="+", action="append", metavar=("NAME", "KEY=VALUE"), required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| variant | s | steps | images | bound, bits/dim | FD | grain |\n|---|---|---|---|---|---|---|", flush=True)
    for name, *changes in args.variant:
        cells = run(args.config, changes, args.seconds, args.features, args.images)
        print(f"| {' | '.join([name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
