"""Batches that fit: what is measured, what auto finds, and what is said where memory runs out for real."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import train
from ilvr_lightning.config.load import load_config
from ilvr_lightning.runtime.trainer import trainer_from
from ilvr_lightning.training import memory
from ilvr_lightning.training.memory import bytes_an_image, free_memory, is_out_of_memory
from ilvr_lightning.training.module import DDPM
from tests.support.cli import refused
from tests.support.paths import ROOT

TrainRun = Callable[..., Path]


def test_an_image_of_twice_the_side_keeps_four_times_as_much(recipe: Path) -> None:
    sizes = []
    for side in (16, 32):
        config, _ = load_config([str(recipe), f"data.image_size={side}"])
        sizes.append(bytes_an_image(DDPM(config), trainer_from(config.trainer, logger=False)))
    assert sizes[1] / sizes[0] == pytest.approx(4, rel=0.1)
    assert sizes[1] > 32 * 32 * 8 * 4 * 5  # the maps of five convolutions, at the least


def test_what_is_kept_is_what_autograd_keeps(recipe: Path) -> None:
    """Against the memory that the allocations of a forward pass take in truth."""
    config, _ = load_config([str(recipe), "data.image_size=32"])
    module, trainer = DDPM(config), trainer_from(config.trainer, logger=False)
    x, t = torch.zeros(8, *module.image_shape), torch.zeros(8, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        output = module.network(x, t)
    held = sum(event.self_cpu_memory_usage for event in profile.events())
    del output
    assert held / 8 == pytest.approx(bytes_an_image(module, trainer), rel=0.15)


@pytest.mark.parametrize(("room", "batch"), [(5, 4), (9, 8), (10**6, 16)])
def test_auto_takes_the_largest_power_of_two(
    room: int, batch: int, train_run: TrainRun, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 images are the set."""
    monkeypatch.setattr(memory, "images_that_fit", lambda module, trainer: room)
    folder = train_run(f"auto_{room}", "data.batch_size=auto")
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["batch_size"] == batch
    monkeypatch.setattr(memory, "images_that_fit", lambda module, trainer: 2)
    train_run(f"auto_{room}", "data.batch_size=auto", "trainer.max_epochs=2", "resume=auto")
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["config"]["data"]["batch_size"] == batch
    assert content["global_step"] == 2 * (18 // batch)


def test_not_even_one_image(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000.0)
    error = refused(train.main, capsys, str(recipe), "data.batch_size=auto", f"trainer.default_root_dir={tmp_path}")
    assert "out of memory with one image at once (8x8 px, 12,203 parameters): lower data.image_size" in error


LIMITED = """
import resource, sys
import torch, lightning.pytorch, datasets, tensorboard, torch.utils.tensorboard, torchvision
import train
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 1500 * 2**20,) * 2)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_value_that_would_fit_does(recipe: Path, tmp_path: Path) -> None:
    """Under a limit of 1.5 GB a batch of 16 of 128 px does not fit; what the message names does, and so does auto."""
    shared = [
        str(recipe), "data.image_size=128", "model.channels=32", "trainer.max_steps=1", "trainer.limit_val_batches=0",
        f"trainer.default_root_dir={tmp_path}", "sampling.num_steps=2",
    ]  # fmt: skip

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, *shared, *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    ended = run("data.batch_size=16", "run.name=large")
    assert ended.returncode == 1, ended.stderr
    found = re.search(
        r"out of memory with data.batch_size=16 .*: data.batch_size=(\d+) would fit, or data.batch_size=16 with "
        r"trainer.accumulate_grad_batches=(\d+), the same training; nothing was saved yet", ended.stderr
    )  # fmt: skip
    assert found is not None, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert int(found[1]) * int(found[2]) == 16
    for settings in (["data.batch_size=16", f"trainer.accumulate_grad_batches={found[2]}"], ["data.batch_size=auto"]):
        fits = run(*settings)
        assert fits.returncode == 0, (settings, fits.stderr)


def test_free_memory_is_known() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
