"""How fast sampling and training are on this machine, and what precision, memory format and compilation contribute.

    python -m benchmarks.speed [--device cpu|cuda] [--network NAME ...] [--only KIND ...] [--repeats 7] [--compile]
        [--ckpt CKPT] [--json FILE]

Kinds:

- sampling: evaluations of the network per second, and from them the seconds per image of each preset;
- training: forward pass, backward pass, optimizer and average of the weights, without data;
- fit: images per second of train.py's own loop, data and logs included, and the share of the time that it waits for
  data;
- overhead: the share of a run of the preset `fast` that is not the network, by a network that does nothing;
- quality: images sampled in bf16 against float32 from the same seeds (needs --ckpt).

The rows of a table are timed in turn, A B C A B C, and the medians are printed. --compile adds the rows of
torch.compile, which take minutes on a CPU. Memory is what the GPU's allocator reached; on a CPU it is not measured.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.config.load import load_config
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.hardware import (
    CompiledForward,
    cast_for_sampling,
    fast_bf16,
    training_precision,
    use_channels_last,
)
from ilvr_lightning.runtime.trainer import silence_lightning
from ilvr_lightning.training.module import DDPM

KINDS = ("sampling", "training", "fit", "overhead", "quality")
Figures = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, and the batches that it is timed with on a CPU and on a GPU."""

    config: UNetConfig
    size: int
    sampling_batch: tuple[int, int]
    training_batch: tuple[int, int]


def subjects() -> dict[str, Subject]:
    """The bundled models' network, a small ADM network, and the one that the paper's authors published at 256 px."""
    bundled, published = (load_config([], default=f"configs/{name}.yaml").model for name in ("toon64", "ffhq256"))
    small = UNetConfig(channels=64, channel_mult=(1, 2, 2, 4))
    return {
        "bundled": Subject(config=bundled, size=64, sampling_batch=(16, 256), training_batch=(16, 128)),
        "small ADM": Subject(config=small, size=64, sampling_batch=(8, 128), training_batch=(8, 64)),
        "published": Subject(config=published, size=256, sampling_batch=(1, 16), training_batch=(1, 8)),
    }


def network_of(subject: Subject, device: torch.device) -> UNet:
    """The network on the device, with equal weights each time."""
    torch.manual_seed(0)
    return UNet(subject.config, (subject.size, subject.size)).to(device)


def evaluation(subject: Subject, device: torch.device, row: str) -> Callable[[], object]:
    """One evaluation of a batch: plain float32, or as sample.py does it in bf16, perhaps compiled."""
    network = network_of(subject, device).eval()
    cast_for_sampling(network, "bf16" in row)
    graphs = device.type == "cuda"
    run: Callable[[Tensor, Tensor], Tensor] = CompiledForward(network, graphs) if "compile" in row else network
    batch = subject.sampling_batch[device.type == "cuda"]
    x = torch.randn(batch, 3, subject.size, subject.size, device=device).to(next(network.parameters()).dtype)
    t = torch.full((batch,), 500, device=device)

    def call() -> None:
        with torch.no_grad():
            run(x, t)

    return call


def training_step(subject: Subject, device: torch.device, row: str) -> Callable[[], object]:
    """Forward, backward, optimizer, average: plain float32, or as train.py does it in bf16, perhaps compiled."""
    network = network_of(subject, device)
    bf16 = "bf16" in row
    if bf16:
        use_channels_last(network, device)
    averages = [p.data for p in copy.deepcopy(network).parameters()]
    weights = [p.data for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=bf16, foreach=None if bf16 else False)
    run: Callable[[Tensor, Tensor], Tensor] = CompiledForward(network) if "compile" in row else network
    batch = subject.training_batch[device.type == "cuda"]
    x = torch.randn(batch, 3, subject.size, subject.size, device=device)
    t = torch.full((batch,), 500, device=device)

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = (run(x, t)[:, :3].float() - x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, weights, 0.01)

    return call


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, timed in turn after three rounds that warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 3):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if round_ >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_networks(kind: str, args: argparse.Namespace, device: torch.device) -> Figures:
    """The table of a kind for every network."""
    figures: Figures = []
    training = kind == "training"
    make = training_step if training else evaluation
    rows = ["float32", "bf16", *(["bf16, torch.compile"] if args.compile else [])]
    for name in args.network:
        subject = subjects()[name]
        batch = (subject.training_batch if training else subject.sampling_batch)[device.type == "cuda"]
        parameters = sum(p.numel() for p in network_of(subject, torch.device("cpu")).parameters())
        calls, memory, first = {}, {}, {}
        for row in rows:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            calls[row] = make(subject, device, row)
            calls[row]()
            _synchronize(device)
            first[row] = time.perf_counter() - start
            memory[row] = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
        seconds = interleaved(calls, args.repeats, device)
        print(f"\n{kind}, {name}: {parameters / 1e6:.1f} M parameters, {subject.size} px, batch {batch}")
        presets = "" if training else "".join(f" {preset}, s per image |" for preset in PRESETS)
        unit = "images/s" if training else "evaluations/s"
        print(f"| | ms | {unit} | times float32 | first call, s | MB |{presets}")
        print("|---|---|---|---|---|---|" + ("" if training else "---|" * len(PRESETS)), flush=True)
        for row, value in seconds.items():
            figure = {"kind": kind, "network": name, "row": row, "batch": batch, "ms": 1000 * value,
                      unit: batch / value, "times": seconds["float32"] / value, "first": first[row],
                      "mb": memory[row]}  # fmt: skip
            cells = [row, f"{1000 * value:.1f}", f"{batch / value:.4g}", f"{seconds['float32'] / value:.2f}",
                     f"{first[row]:.1f}", "" if memory[row] is None else f"{memory[row]:.0f}"]  # fmt: skip
            if not training:
                each = {p: value / batch * SamplingPlan.preset(p).resolved(1000).evaluations for p in PRESETS}
                cells += [f"{s:.3g}" for s in each.values()]
                figure["seconds_per_image"] = each
            figures.append(figure)
            print(f"| {' | '.join(cells)} |", flush=True)
    return figures


def fit(args: argparse.Namespace, device: torch.device) -> Figures:
    """train.py's loop on the embedded faces, enlarged where they are smaller."""
    figures: Figures = []
    silence_lightning()
    print("\nfit: data/toon, caches warm\n| px | batch | precision | compiled | images/s | MB | waiting for data, % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    sizes = {32: "toon32", 64: "toon64"} if device.type == "cpu" else {64: "toon64", 128: "toon64", 256: "toon64"}
    for size, config_name in sizes.items():
        batch = 16 if device.type == "cpu" else {64: 128, 128: 64, 256: 32}[size]
        compiled = args.compile
        config = load_config(
            [f"data.image_size={size}", f"data.batch_size={batch}", f"compile={str(compiled).lower()}",
             f"model.attention_resolutions=[{size // 8}]", "grid.factors=[4]", "data.cache_mb=4096"],
            default=f"configs/{config_name}.yaml",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            profiler = SimpleProfiler(dirpath=folder, filename="profile")
            data = ImageDataModule(config.data, cache=Path(folder))
            model = DDPM(config)
            speed = Speed(batch, args.steps)
            trainer = pl.Trainer(
                max_steps=2 * args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                devices=1, profiler=profiler, limit_val_batches=0, use_distributed_sampler=False, callbacks=[speed],
                default_root_dir=folder, accelerator="gpu" if device.type == "cuda" else "cpu",
                precision=training_precision("gpu" if device.type == "cuda" else "cpu"), enable_model_summary=False,
            )  # fmt: skip
            model.prepare(trainer)
            trainer.fit(model, datamodule=data)
        waits = next(v for k, v in profiler.recorded_durations.items() if k.endswith("train_dataloader_next"))[1:]
        steps = profiler.recorded_durations["run_training_batch"][1:]
        share = sum(waits) / (sum(waits) + sum(steps))
        memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
        figures.append({"kind": "fit", "size": size, "batch": batch, "compiled": compiled, "waiting": share,
                        "images/s": speed.images_per_second, "mb": memory})  # fmt: skip
        print(f"| {size} | {batch} | {trainer.precision} | {'yes' if compiled else 'no'} | "
              f"{speed.images_per_second:.4g} | {'' if memory is None else f'{memory:.0f}'} | {100 * share:.1f} |",
              flush=True)  # fmt: skip
    return figures


class Speed(pl.Callback):
    """Times the second half of a run."""

    def __init__(self, batch: int, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.images_per_second = 0.0
        self._start = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step in (self.steps, 2 * self.steps):
            _synchronize(pl_module.device)
            if trainer.global_step == 2 * self.steps:
                self.images_per_second = self.batch * self.steps / (time.perf_counter() - self._start)
            self._start = time.perf_counter()


def overhead(args: argparse.Namespace, device: torch.device) -> Figures:
    """The share of a run of `fast` that is not the network: 3.9 M parameters, 32 px, batch 16."""
    config = UNetConfig(channels=48, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8,))
    torch.manual_seed(0)
    network = UNet(config, (32, 32)).to(device).eval()
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    cast_for_sampling(network, dtype == torch.bfloat16)
    schedule = NoiseSchedule.cosine()
    reader = Denoiser(network, schedule, "v")
    reference = torch.rand(16, 3, 32, 32, device=device) * 2 - 1

    def run(network: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def denoise(x: Tensor, t: Tensor) -> Prediction:
            return reader.read(network(x.to(dtype), t - 1).to(x.dtype), x, t)

        return lambda: generate(
            denoise, schedule, SamplingPlan(factor=8), seeds=range(16), shape=(3, 32, 32), reference=reference,
            device=device,
        )  # fmt: skip

    seconds = interleaved({"all": run(network), "rest": run(lambda x, t: x)}, args.repeats, device)
    share = seconds["rest"] / seconds["all"]
    print(f"\noverhead: {1000 * seconds['rest']:.1f} of {1000 * seconds['all']:.1f} ms ({100 * share:.1f}%) of `fast` "
          "are not the network (3.9 M parameters, 32 px, batch 16)", flush=True)  # fmt: skip
    return [{"kind": "overhead", "share": share, **seconds}]


def quality(args: argparse.Namespace, device: torch.device) -> Figures:
    """Images of --ckpt in bf16 against float32, from the same seeds after the embedded references."""
    if args.ckpt is None:
        return []
    figures: Figures = []
    loaded = load_denoiser(args.ckpt, say=None)
    y = torch.stack([r.tensor for r in find_references(["data/references"], loaded.image_shape, "crop")])
    network = copy.deepcopy(loaded.network)
    cast_for_sampling(network, True)
    low = Denoiser(lambda x, t: network(x.to(torch.bfloat16), t), loaded.schedule, loaded.prediction_type)
    low.spectrum, low.components = loaded.spectrum, loaded.components
    for preset in ("draft", "fast"):
        plan = loaded.preset(preset, 8)
        a, b = (
            generate(d, loaded.schedule, plan, seeds=range(len(y)), shape=loaded.image_shape, reference=y).clamp(-1, 1)
            for d in (loaded, low)
        )
        psnr = -10 * ((a - b) / 2).square().mean((1, 2, 3)).log10()
        figures.append({"kind": "quality", "preset": preset, "psnr": float(psnr.mean()), "least": float(psnr.min())})
        print(f"quality: {preset}, N=8, {args.ckpt}, bf16 against float32: PSNR {float(psnr.mean()):.1f} dB on "
              f"average, {float(psnr.min()):.1f} dB at least, over {len(y)} images", flush=True)  # fmt: skip
    return figures


def cpu_name() -> str:
    """The CPU's name, and what it has for bfloat16."""
    name, about = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if about.exists():
        found = [line.partition(":")[2].strip() for line in about.read_text().splitlines() if "model name" in line]
        name = next(iter(found), name)
    has = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return ", ".join([name, *(key for key, available in has.items() if available)])


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--network", nargs="+", default=list(subjects()), choices=list(subjects()))
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="steps that the loop of train.py is timed over")
    parser.add_argument("--compile", action="store_true", help="add the rows of torch.compile")
    parser.add_argument("--ckpt", help="a trained model, for the images in bf16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures: Figures = [{"device": name, "torch": torch.__version__}]
    for kind in args.only:
        if kind in ("sampling", "training"):
            figures += time_networks(kind, args, device)
        else:
            figures += {"fit": fit, "overhead": overhead, "quality": quality}[kind](args, device)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
