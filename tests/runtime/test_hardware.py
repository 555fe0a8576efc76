"""Precision, memory format and compilation by hardware, never at the cost of a run."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilvr_lightning.models.blocks import attend
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime import hardware
from ilvr_lightning.runtime.hardware import CompiledForward, should_compile, training_precision
from tests.support.oracles import small_unet
from tests.support.runs import TrainRun

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "device", "passes", "expected"),
    [
        (True, CPU, 1, True), (False, CUDA, 1e6, False), ("auto", CUDA, 1e6, True), ("auto", CUDA, 20, False),
        ("auto", CPU, 1e6, False),
    ],
)  # fmt: skip
def test_when_to_compile(asked: hardware.Compile, device: torch.device, passes: float, expected: bool) -> None:
    assert should_compile(asked, device, passes) is expected


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_training_precision_follows_the_cpu(fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "fast_bf16", lambda device: fast and device.type == "cpu")
    assert training_precision("cpu") == expected


@pytest.mark.parametrize(
    ("accelerator", "there", "kind"),
    [
        ("auto", ("cuda",), "cuda"), ("auto", ("mps",), "mps"), ("auto", (), "cpu"), ("gpu", ("cuda",), "cuda"),
        ("gpu", ("mps",), "mps"), ("mps", ("cuda", "mps"), "mps"), ("cuda", ("cuda",), "cuda"),
        ("cpu", ("cuda",), "cpu"),
    ],
)  # fmt: skip
def test_precision_is_that_of_the_device_that_lightning_takes(
    accelerator: str, there: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int("cuda" in there))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(hardware, "fast_bf16", lambda device: asked.append(device.type))
    training_precision(accelerator)
    assert asked == [kind]


def test_moments_take_the_memory_format_of_their_weights() -> None:
    """Restored from a run on another kind of device: the fused step would mix up their elements."""
    steps = []
    for last in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        optimizer = torch.optim.AdamW([weight], 0.1, fused=True)
        for _ in range(2):
            weight.grad = torch.randn(4, 3, 3, 3)
            optimizer.step()
        state = optimizer.state_dict()
        if last:
            for moments in state["state"].values():
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = moments[name].to(memory_format=torch.channels_last)
        optimizer.load_state_dict(state)
        hardware.restore_memory_format(optimizer)
        weight.grad = torch.randn(4, 3, 3, 3)
        optimizer.step()
        steps.append(weight.detach().clone())
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=0)


def test_memory_format_of_training_follows_the_width() -> None:
    for channels, device, expected in (
        (32, CPU, False),
        (128, CPU, True),
        (32, CUDA, True),
        (128, torch.device("mps"), False),
    ):
        made = UNet(
            UNetConfig(channels=channels, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()), (8, 8)
        )
        hardware.use_channels_last(made, device)
        weight = next(p for p in made.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) is expected


def test_precision_that_is_given_rules(train_run: TrainRun, capsys: pytest.CaptureFixture[str]) -> None:
    train_run("bf16", "trainer.precision=bf16-mixed", "trainer.max_steps=1")
    assert "precision bf16-mixed" in capsys.readouterr().out
    train_run("float64", "trainer.precision=64-true", "trainer.max_steps=1")
    assert "precision 64-true" in capsys.readouterr().out


def failing(*_: Any, **__: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nand a long story")

    return run


def test_what_does_not_compile_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", failing)
    made, x, t = small_unet(), torch.randn(2, 3, 8, 8), torch.tensor([0, 5])
    compiled = CompiledForward(made)
    torch.testing.assert_close(compiled(x, t), made(x, t))
    compiled(x, t)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "torch.compile failed (no compiler)" in said
    assert "compile=false" in said


def test_compiled_for_the_first_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def compile_(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
        def run(x: Tensor, t: Tensor) -> Tensor:
            seen.append(len(x))
            return function(x, t)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    made = small_unet()
    compiled = CompiledForward(made)
    for batch in (2, 1, 2):
        x, t = torch.randn(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64)
        torch.testing.assert_close(compiled(x, t), made(x, t))
    assert seen == [2, 2]


def test_compiling_leaves_the_names_of_the_weights(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = (
        torch.load(train_run(name, f"compile={word}") / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name, word in (("not compiled", "false"), ("compiled", "true"))
    )
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_is_attention(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 3, 16, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    fused = [x.detach().float().requires_grad_() for x in qkv]
    out, expected = attend(*qkv), F.scaled_dot_product_attention(fused[0], fused[1], fused[2])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)
    ours = torch.autograd.grad(out.float().square().sum(), qkv)
    theirs = torch.autograd.grad(expected.square().sum(), fused)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=5 * tolerance)


def test_results_are_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph gives the same memory each time."""
    buffer = torch.zeros(2, 3, 8, 8)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x, t: buffer.copy_(x))
    compiled, t = CompiledForward(small_unet()), torch.tensor([0, 5])
    with torch.no_grad():
        first = compiled(torch.ones(2, 3, 8, 8), t)
        compiled(torch.zeros(2, 3, 8, 8), t)
    assert first.min() == 1
