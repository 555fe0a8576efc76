"""How fast an evaluation and a training step are, step by step from plain float32, on this machine.

    python -m benchmarks.speed [--device cpu|cuda] [--network NAME ...] [--repeats 7] [--compile] [--json FILE]
        [--only sampling training overhead quality loader] [--ckpt CKPT]

Every row adds to the one above it. The rows of a network are timed in turn, A B C A B C, and the medians stand. MFU is
counted floating-point operations a second over what the device can do: a GPU's published dense bf16 figure, and on a
CPU what one large bf16 matrix product reaches here. Peak memory is a CPU process's largest resident size, each row in a
process of its own, or what the GPU's allocator reached.

- sampling: images times evaluations a second, and from them the seconds a picture for each preset;
- training: forward, backward, optimizer, average of the weights;
- overhead: what of a run is not the network (sampler, phi, noise, conversion): the same run with a network that does
  nothing;
- quality: pictures in bf16 against float32 from the same seeds, and how far rounding a network's output to bf16 moves
  the samples of the exact benchmark: their mean squared distance over the conditional's variance, which is at least
  what the 2-Wasserstein error can grow by;
- loader: the share of an epoch's time that its loop waits for data.
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.exact import SCHEDULE, solver, spectrum_1d
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.config.load import load_config
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import low_pass_matrix
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.models import blocks
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.hardware import Compiled, cast_for_sampling, fast_bf16

DENSE_BF16 = {
    "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "4090": 165e12,
}  # fmt: skip
"""Published dense bf16 operations a second."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and the batches that it is timed with."""

    config: UNetConfig
    size: int
    sampling_batch: int
    training_batch: int


def subjects() -> dict[str, Subject]:
    """The shipped model's network, the small ADM, the published one of 256 px, and that of the overhead figure."""
    shipped, _ = load_config([], default="configs/toon64.yaml")
    published, _ = load_config([], default="configs/ffhq256.yaml")
    return {
        "shipped": Subject(config=shipped.model, size=64, sampling_batch=16, training_batch=32),
        "small ADM": Subject(
            config=UNetConfig(channels=64, channel_mult=(1, 2, 2, 4)), size=64, sampling_batch=8, training_batch=8
        ),
        "published": Subject(config=published.model, size=256, sampling_batch=1, training_batch=1),
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run a network."""

    bf16: bool = False
    cast_weights: bool = False
    channels_last: bool = False
    written_out: bool = False
    fused: bool = False
    compile: bool = False

    def network(self, subject: Subject, device: torch.device) -> UNet:
        """Made anew, equal weights each time."""
        torch.manual_seed(0)
        network = UNet(subject.config, (subject.size, subject.size)).to(device)
        if self.cast_weights:
            network.to(torch.bfloat16)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        return network

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """As training does it, or sampling did."""
        if self.bf16 and not self.cast_weights:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


SAMPLING = {
    "float32": Row(),
    "+ bf16, weights cast at every evaluation": Row(bf16=True),
    "+ weights cast once": Row(bf16=True, cast_weights=True),
    "+ channels_last": Row(bf16=True, cast_weights=True, channels_last=True),
    "+ torch.compile": Row(bf16=True, cast_weights=True, channels_last=True, compile=True),
}
TRAINING = {
    "float32": Row(),
    "+ fused AdamW": Row(fused=True),
    "+ bf16-mixed": Row(fused=True, bf16=True),
    "+ attention written out": Row(fused=True, bf16=True, written_out=True),
    "+ channels_last": Row(fused=True, bf16=True, written_out=True, channels_last=True),
    "+ torch.compile, not channels_last": Row(fused=True, bf16=True, written_out=True, compile=True),
}
GPU_TRAINING = {
    "float32": Row(),
    "+ fused AdamW": Row(fused=True),
    "+ bf16-mixed": Row(fused=True, bf16=True),
    "+ channels_last": Row(fused=True, bf16=True, channels_last=True),
    "+ torch.compile": Row(fused=True, bf16=True, channels_last=True, compile=True),
}


def evaluation(subject: Subject, row: Row, device: torch.device) -> Callable[[], object]:
    """One network evaluation of a batch."""
    network = row.network(subject, device).eval()
    run: Callable[[Tensor, Tensor], Tensor] = Compiled(network) if row.compile else network
    x = torch.randn(subject.sampling_batch, 3, subject.size, subject.size, device=device)
    x = x.to(torch.bfloat16 if row.cast_weights else torch.float32)
    t = torch.full((len(x),), 500, device=device)

    def call() -> None:
        with torch.inference_mode(), row.autocast(device):
            run(x, t)

    return call


def training_step(subject: Subject, row: Row, device: torch.device) -> Callable[[], object]:
    """Forward, backward, optimizer, average."""
    network = row.network(subject, device)
    average = copy.deepcopy(network)
    run: Callable[[Tensor, Tensor], Tensor] = Compiled(network) if row.compile else network
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=row.fused, foreach=None if row.fused else False)
    x = torch.randn(subject.training_batch, 3, subject.size, subject.size, device=device)
    t = torch.full((len(x),), 500, device=device)
    averages, weights = [p.data for p in average.parameters()], [p.data for p in network.parameters()]

    def call() -> None:
        attend = blocks.attend
        if not row.written_out and device.type == "cpu":
            blocks.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)
        try:
            with row.autocast(device):
                loss = (run(x, t)[:, :3].float() - x).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            blocks.attend = attend
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, weights, 0.01)

    return call


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, timed in turn after two calls that warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def counted(call: Callable[[], object]) -> int:
    """Floating-point operations, two for a multiplication and addition."""
    attend = blocks.attend
    blocks.attend = lambda q, k, v: torch.softmax(q @ k.mT, dim=-1) @ v  # a fused one on a CPU counts as nothing
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        blocks.attend = attend
    return int(counter.get_total_flops())


def peak_of(device: torch.device) -> tuple[float | None, str]:
    """Operations a second that the device can do, None where nobody says, and where the figure comes from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((v for k, v in DENSE_BF16.items() if k in name), None), "published, dense bf16"
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    a = torch.randn(2048, 2048, dtype=dtype)
    seconds = min(interleaved({"": lambda: a @ a}, 1, device)[""] for _ in range(20))
    return 2 * 2048**3 / seconds, f"a 2048x2048 matrix product in {str(dtype).partition('.')[2]}, the best of 20"


def processor() -> str:
    """The CPU's name and what it has for bfloat16."""
    name, about = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if about.exists():
        named = [line.partition(":")[2].strip() for line in about.read_text().splitlines() if "model name" in line]
        name = next(iter(named), name)
    has = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return ", ".join([name, *(key for key, there in has.items() if there)])


def peak_memory(kind: str, network: str, name: str, device: torch.device) -> float:
    """MB of a process that does one row: what it allocates on a GPU, on a CPU its largest resident size."""
    command = [sys.executable, "-m", "benchmarks.speed", "--device", device.type, "--memory-of", kind, network, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


Figures = list[dict[str, Any]]


def time_networks(kind: str, args: argparse.Namespace, device: torch.device, peak: float | None) -> Figures:
    """Figures of every row of every network asked for; prints each."""
    figures: Figures = []
    training = kind == "training"
    make, table = of_kind(kind, device)
    rows = {name: row for name, row in table.items() if args.compile or not row.compile}
    for network in args.network:
        subject = subjects()[network]
        batch = subject.training_batch if training else subject.sampling_batch
        repeats = args.repeats if network != "published" or device.type == "cuda" else max(3, args.repeats // 2)
        calls = {name: make(subject, row, device) for name, row in rows.items()}
        flops = counted(calls["float32"])
        seconds = interleaved(calls, repeats, device)
        parameters = sum(p.numel() for p in UNet(subject.config, (subject.size, subject.size)).parameters())
        unit = "images/s" if training else "evaluations/s"
        print(f"\n{kind}, {network}: {parameters / 1e6:.1f} M parameters, {subject.size} px, batch {batch}")
        print(f"| | ms | {unit} | times float32 | MFU | peak MB |" + ("" if training else " s a picture |"))
        print("|---|---|---|---|---|---|" + ("" if training else "---|"), flush=True)
        for name, value in seconds.items():
            measured = args.memory and not (device.type == "cpu" and rows[name].compile)  # the compiler takes the most
            memory = peak_memory(kind, network, name, device) if measured else None
            pictures = {p: round(value / batch * min(v.get("num_steps", 1000), 1000), 3) for p, v in PRESETS.items()}
            figures.append({
                "kind": kind, "network": network, "row": name, "ms": 1000 * value, unit: batch / value,
                "times": seconds["float32"] / value, "mfu": peak and flops / value / peak, "peak_mb": memory,
            } | ({} if training else {"seconds_a_picture": pictures}))  # fmt: skip
            line = f"| {name} | {1000 * value:.1f} | {batch / value:.3g} | {seconds['float32'] / value:.2f} "
            mfu = f"{100 * flops / value / peak:.0f}%" if peak else ""
            line += f"| {mfu} | {'' if memory is None else f'{memory:.0f}'} |"
            if not training:
                line += f" {', '.join(f'{p} {s:.2f}' for p, s in pictures.items())} |"
            print(line, flush=True)
    return figures


def of_kind(kind: str, device: torch.device) -> tuple[Callable[..., Callable[[], object]], dict[str, Row]]:
    """What makes a call of a row, and the rows."""
    if kind == "sampling":
        return evaluation, SAMPLING
    return training_step, TRAINING if device.type == "cpu" else GPU_TRAINING


def print_memory(device: torch.device, kind: str, network: str, name: str) -> None:
    """What --memory-of does in its own process."""
    make, table = of_kind(kind, device)
    call = make(subjects()[network], table[name], device)
    for _ in range(2):
        call()
    status = Path("/proc/self/status")
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    elif status.exists():  # getrusage there counts what the parent had, too
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 2**10)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10))


def overhead(args: argparse.Namespace, device: torch.device) -> Figures:
    """Share of a run of `fast` that is not the network: 3 M parameters, 32 px, batch 16."""
    config = UNetConfig(channels=48, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8,))
    torch.manual_seed(0)
    network = UNet(config, (32, 32)).to(device).eval()
    bf16 = fast_bf16(device)
    cast_for_sampling(network, bf16)
    schedule = NoiseSchedule.cosine()
    plan = SamplingPlan.preset("fast", factor=8)
    reference = torch.rand(16, 3, 32, 32, device=device) * 2 - 1

    def run(denoise: Callable[[Tensor, Tensor], Prediction]) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                generate(denoise, schedule, plan, seeds=range(16), shape=(3, 32, 32), reference=reference,
                         device=device)  # fmt: skip

        return call

    def whole(x: Tensor, t: Tensor) -> Prediction:
        output = network(x.to(torch.bfloat16) if bf16 else x, t - 1)
        return reader.read(output.to(x.dtype), x, t)

    def empty(x: Tensor, t: Tensor) -> Prediction:
        return reader.read((x.to(torch.bfloat16) if bf16 else x).to(x.dtype), x, t)

    reader = Denoiser(network, schedule, "v")
    seconds = interleaved({"whole": run(whole), "rest": run(empty)}, args.repeats, device)
    share = seconds["rest"] / seconds["whole"]
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"\noverhead: {1000 * seconds['rest']:.1f} of {1000 * seconds['whole']:.1f} ms ({100 * share:.1f}%) of `fast` "
        f"are not the network ({parameters / 1e6:.1f} M parameters, 32 px, batch 16)",
        flush=True,
    )
    return [{"kind": "overhead", "share": share, **seconds}]


@torch.no_grad()
def quality(args: argparse.Namespace, device: torch.device) -> Figures:
    """bf16 against float32."""
    figures: Figures = []
    data = spectrum_1d()
    print("\nquality: rounding the network's output to bf16 moves exact samples (1/f^2, 64 px, 256 samples) by")
    for factor in (4, 8):
        plan = replace(solver(20, eta=1.0), factor=factor)

        def rounded(x: Tensor, t: Tensor) -> Prediction:
            p = data.denoise(x, t)
            eps = p.eps.to(torch.bfloat16).to(x.dtype)
            signal, sigma = SCHEDULE.signal_and_noise(t, x)
            return Prediction(x0=(x - sigma * eps) / signal, eps=eps)

        y = torch.randn(256, 64, dtype=torch.float64) @ torch.linalg.cholesky(data.covariance).mT
        made = [
            generate(d, SCHEDULE, plan, seeds=range(256), shape=(1, 1, 64), reference=y.reshape(256, 1, 1, 64),
                     x_T=torch.randn(256, 1, 1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
            for d in (data.denoise, rounded)
        ]  # fmt: skip
        _, true = data.conditional(low_pass_matrix(64, factor))
        moved = float((made[0] - made[1]).square().sum((1, 2, 3)).mean() / true.trace())
        figures.append({"kind": "quality", "factor": factor, "moved": moved})
        print(f"  N={factor}: {moved:.1e} of the conditional's variance", flush=True)
    if args.ckpt is None:
        return figures
    loaded = load_denoiser(args.ckpt, say=None)
    shape = loaded.image_shape
    y = torch.stack([r.tensor for r in find_references(["data/references"], shape, "crop")])
    network = copy.deepcopy(loaded.network)
    cast_for_sampling(network, True)
    low = Denoiser(lambda x, t: network(x.to(torch.bfloat16), t), loaded.schedule, loaded.prediction_type)
    for preset in ("draft", "fast"):
        plan = loaded.preset(preset, 8)
        a, b = (
            generate(d, loaded.schedule, plan, seeds=range(len(y)), shape=shape, reference=y).clamp(-1, 1)
            for d in (loaded, low)
        )
        mse = ((a - b) / 2).square().mean((1, 2, 3))
        psnr = -10 * mse.log10()
        figures.append({"kind": "quality", "preset": preset, "psnr": float(psnr.mean()), "least": float(psnr.min())})
        print(f"  {preset}, N=8, {args.ckpt}: PSNR {float(psnr.mean()):.1f} dB on average, "
              f"{float(psnr.min()):.1f} at least, over {len(y)} pictures", flush=True)  # fmt: skip
    return figures


def loader(args: argparse.Namespace, device: torch.device) -> Figures:
    """The share of an epoch that is spent waiting for the next batch, after the first."""
    import lightning.pytorch as pl

    from ilvr_lightning.data.datamodule import ImageDataModule
    from ilvr_lightning.runtime.hardware import training_precision
    from ilvr_lightning.training.module import DDPM

    figures: Figures = []
    for recipe in ("toon32", "toon64"):
        for cached in (True, False):
            config, _ = load_config([f"data.cache_mb={1024 if cached else 0}"], default=f"configs/{recipe}.yaml")
            with tempfile.TemporaryDirectory() as folder:
                profiler = SimpleProfiler(dirpath=folder, filename="profile")
                data = ImageDataModule(config.data, cache=Path(folder))
                trainer = pl.Trainer(
                    max_steps=60, logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1,
                    profiler=profiler, limit_val_batches=0, use_distributed_sampler=False, default_root_dir=folder,
                    accelerator=device.type, precision=training_precision(device.type), enable_model_summary=False,
                )  # fmt: skip
                trainer.fit(DDPM(config), datamodule=data)
            times = profiler.recorded_durations
            waits = next(v for k, v in times.items() if k.endswith("train_dataloader_next"))[1:]
            steps = next(v for k, v in times.items() if k == "run_training_batch")[1:]
            share = sum(waits) / (sum(waits) + sum(steps))
            kind = "decoded once" if cached else "decoded by workers"
            figures.append({"kind": "loader", "recipe": recipe, "cached": cached, "share": share})
            print(f"loader: {recipe}, {kind}: {100 * share:.2f}% of the time is spent waiting for data", flush=True)
    return figures


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--network", nargs="+", default=list(subjects()), choices=list(subjects()))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="the row of torch.compile: minutes each on a CPU")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    kinds = ("sampling", "training", "overhead", "quality", "loader")
    parser.add_argument("--only", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--ckpt", help="a trained model, for the pictures in bf16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_memory(torch.device(args.device), *args.memory_of)
    device = torch.device(args.device)
    peak, source = peak_of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          + (f"peak {peak / 1e12:.2f} TFLOP/s ({source})" if peak else "peak unknown"))  # fmt: skip
    figures: Figures = [{"device": name, "torch": torch.__version__, "peak": peak, "peak_source": source}]
    for kind in args.only:
        if kind in ("sampling", "training"):
            figures += time_networks(kind, args, device, peak)
        else:
            figures += {"overhead": overhead, "quality": quality, "loader": loader}[kind](args, device)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
