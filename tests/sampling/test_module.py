"""ILVRSampler: the same image in any batch, order and company; precision, compilation, sizes, channels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.images import to_tensor
from ilvr_lightning.data.references import find_references
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.sampling.module import ILVRSampler, SampleLoader
from ilvr_lightning.sampling.requests import SampleRequests
from tests.support import samples
from tests.support.samples import difference, index, listed, pixels, recipe_text

Run = Callable[..., Path]
TrainRun = Callable[..., Path]


# The same image


def test_batch_size_does_not_matter(run: Run, references: Path) -> None:
    asked = ["--ref", references / "a.png", references / "b.png", "--factor", 2, 4, "--num-samples", 2]
    one, four = run(*asked, "--batch-size", 1, out="one"), run(*asked, "--batch-size", 4, out="four")
    assert difference(samples.images(one), samples.images(four)) <= 1
    assert [{line["recipe"]["batch_size"] for line in index(out)} for out in (one, four)] == [{1}, {4}]


def test_order_and_company_of_references_do_not_matter(run: Run, references: Path) -> None:
    a, b = references / "a.png", references / "b.png"
    both = run("--ref", a, b, "--factor", 2, "--num-samples", 1, out="both")
    turned = run("--ref", b, a, "--factor", 2, "--num-samples", 1, out="turned")
    alone = run("--ref", b, "--factor", 2, "--num-samples", 3, out="alone")
    assert listed(turned) == listed(both)[::-1]
    assert difference(samples.images(both), samples.images(turned)) <= 1
    assert np.abs(pixels(both / "b_N2_0.png") - pixels(alone / "b_N2_0.png")).max() <= 1


def test_a_batch_may_hold_a_whole_sweep(run: Run, references: Path) -> None:
    flags = ("--ref", references / "a.png", "--num-samples", 1, "--sampler", "ddim")
    sweep = run(*flags, "--factor", 2, 4, "--range", "25:0", "25:12")
    alone = run(*flags, "--factor", 4, "--range", "25:12", out="alone")
    assert np.abs(pixels(sweep / "a_N4_t25-12_0.png") - pixels(alone / "a_N4_0.png")).max() <= 1


def test_the_ranks_share_the_work(references: Path) -> None:
    """Each image is made by one rank; a rank without any has one empty batch."""
    found = find_references([str(references / "a.png"), str(references / "b.png")], (3, 8, 8), "crop")
    requests = SampleRequests(
        found, [SamplingPlan(factor=2).resolved(25)], 2, seed=0, weights="ema", checkpoint_sha256="0" * 64, overrides={}
    )
    loader = SampleLoader(requests, np.array([0, 1, 3]), batch_size=2)
    shares = [loader.share(rank, 4).tolist() for rank in range(4)]
    assert shares == [[0], [1], [3], []]
    assert [[request.index for request in batch] for batch in loader.predict_dataloader()] == [[0, 1], [3]]
    loader.todo = np.arange(0)
    assert list(loader.predict_dataloader()) == [[]]


def test_the_low_band_follows_the_reference(run: Run, references: Path) -> None:
    """The last step is conditioned with t=0, where the reference has no noise: phi(sample) is phi(reference)."""
    out = run("--ref", references / "a.png", "--factor", 4, "--num-samples", 1, "--orthogonal", "--kernel", "box")
    low_pass = LowPassFilter((8, 8), 4, "box", True)
    found, wanted = (
        low_pass(to_tensor(pixels(p).astype(np.uint8))[None])
        for p in (out / "a_N4_0.png", next((out / "references").iterdir()))
    )
    near, far = (found - wanted).abs().mean(), (found + wanted).abs().mean()
    assert near < 0.1 < far  # clipping to 8 bits moves it a little


# What can be asked for


def test_the_sampler_knows_the_spectrum_of_the_training_images(checkpoint: Path) -> None:
    """Without it the gain of matched noise would be that of natural images."""
    denoiser = load_denoiser(checkpoint, say=None)
    denoiser.spectrum = (1.0, 0.5)
    sampler = ILVRSampler(denoiser, denoiser.image_shape, "32", False, torch.device("cpu"))
    assert sampler.denoiser.spectrum == (1.0, 0.5)


def test_unconditional(run: Run) -> None:
    out = run("--unconditional", "--num-samples", 3)
    assert listed(out) == [f"unconditional_{k}.png" for k in range(3)]
    assert {(line["recipe"]["reference"], line["recipe"]["reference_sha256"]) for line in index(out)} == {(None, None)}
    assert len({image.tobytes() for image in samples.images(out).values()}) == 3
    assert not (out / "references").exists()


@pytest.mark.parametrize(("size", "shape"), [("16", (16, 16, 3)), ("8x16", (8, 16, 3))])
def test_image_size(size: str, shape: tuple[int, ...], run: Run, references: Path) -> None:
    out = run("--ref", references / "a.png", "--image-size", size, "--factor", 4, "--num-samples", 1)
    assert pixels(out / "a_N4_0.png").shape == shape
    assert pixels(next((out / "references").iterdir())).shape == shape


def test_fit(run: Run, references: Path) -> None:
    out = run("--ref", references / "a.png", "--fit", "pad", "--factor", 2, "--num-samples", 1)
    assert (pixels(next((out / "references").iterdir()))[0] == 255).all()


def test_folders_globs_and_rows(run: Run, references: Path) -> None:
    out = run("--ref", references, references / "**/*.png", "data/toon:test[2:4]", "--factor", 2, "--num-samples", 1)
    assert len(listed(out)) == 5
    assert listed(out)[3:] == ["test_2_N2_0.png", "test_3_N2_0.png"]


def test_greyscale_and_learned_variance(train_run: TrainRun, references: Path, tmp_path: Path) -> None:
    folder = train_run("grey_learned", "data.channels=1", "model.learn_sigma=true")
    flags = (
        "--ref",
        references / "a.png",
        "--factor",
        2,
        "--num-samples",
        1,
        "--sampler",
        "ddpm",
        "--variance",
        "learned",
    )
    samples.sample_into(folder / "checkpoints" / "best.ckpt", tmp_path, *flags)
    with Image.open(tmp_path / "a_N2_0.png") as image:
        assert image.mode == "L"


def test_compiled(run: Run, references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile true compiles for the first batch and changes nothing; auto leaves a CPU alone."""
    shapes: list[tuple[int, ...]] = []

    def compile_(function: Callable[..., torch.Tensor], **_: Any) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return function(x, t)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    asked = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 3, "--batch-size", 2]
    plain, compiled = run(*asked, out="plain"), run(*asked, "--compile", "true", out="compiled")
    assert shapes == [(2, 3, 8, 8)] * 4
    assert difference(samples.images(plain), samples.images(compiled)) == 0
    found = [[line["recipe"]["compiled"] for line in index(out)] for out in (plain, compiled)]
    assert found == [[False] * 3, [True, True, False]]  # the last batch has another shape


def test_bf16(run: Run, references: Path) -> None:
    """The network alone is rounded: the low band is met as in float32, the rest is a little off."""
    asked = ["--ref", references / "a.png", "--factor", 2, "--num-samples", 1]
    full, half = run(*asked, out="full"), run(*asked, "--precision", "bf16", out="half")
    assert [recipe_text(out / "a_N2_0.png")["precision"] for out in (full, half)] == ["32", "bf16"]
    assert 0 < difference(samples.images(full), samples.images(half)) < 64
    low_pass = LowPassFilter((8, 8), 2, orthogonal=True)
    a, b = (low_pass(torch.tensor(pixels(out / "a_N2_0.png")).permute(2, 0, 1)[None].double()) for out in (full, half))
    assert float((a - b).abs().max()) < 3


def test_a_sampler_without_a_trainer(checkpoint: Path, references: Path, run: Run) -> None:
    """As reproduce, benchmarks and other people's code use it."""
    out = run("--ref", references / "a.png", "--factor", 2, "--num-samples", 2)
    denoiser = load_denoiser(checkpoint, say=None)
    found = find_references([str(references / "a.png")], (3, 8, 8), "crop")
    plan = replace(SamplingPlan(factor=2, num_steps=4), octave_gains=()).resolved(25)
    requests = SampleRequests(
        found, [plan], 2, seed=0, weights="ema", checkpoint_sha256=denoiser.found.sha256, overrides={}
    )
    sampler = ILVRSampler(denoiser, (3, 8, 8), "auto", "auto", torch.device("cpu"))
    steps: list[int] = []
    sampler.on_step = lambda t, state: steps.append(t)
    x = sampler.predict_step(requests[:])
    assert (x.shape, steps[0], len(steps)) == ((2, 3, 8, 8), 25, 4)
    assert (
        np.abs(samples.pixels(out / "a_N2_0.png") - ((x[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()).max()
        <= 1
    )
    assert sampler.predict_step([]).shape == (0, 3, 8, 8)
    assert sampler.environment(2)["device"] == "cpu"
