"""Likely slips in a command's flags and keys, and the hint that each gets."""

import pytest

import sample
import train
from tests.support import cli

SAMPLE_SLIPS = {
    "--factors": "--factor",
    "--refs": "--ref",
    "--reference": "--ref",
    "--input": "--ref",
    "--ckp": "--ckpt",
    "--model": "--ckpt",
    "--output": "--out",
    "--save_dir": "--out",
    "--n": "--num-samples",
    "--num_samples": "--num-samples",
    "--down_N": "--factor",
    "--step": "--steps",
    "--sampling-steps": "--steps",
    "--image_size": "--image-size",
    "--batchsize": "--batch-size",
    "--uncond": "--unconditional",
    "--gpus": "--devices",
    "--ranges": "--range",
}
"""sample.py's unknown flags, and the one that is meant."""


TRAIN_SLIPS = {
    "trainer.gpus=1": "did you mean trainer.devices?",
    "gpus=2": "did you mean trainer.devices?",
    "lr=1": "did you mean optim.lr?",
    "optim.learning_rate=1": "did you mean optim.lr?",
    "epochs=3": "did you mean trainer.max_epochs?",
    "trainer.max_epoch=3": "did you mean trainer.max_epochs?",
    "steps=100": "did you mean trainer.max_steps?",
    "batch_size=8": "did you mean data.batch_size?",
    "resolution=64": "did you mean data.image_size?",
    "data.imagesize=64": "did you mean data.image_size?",
    "data.pth=x": "did you mean data.path?",
    "--data.path=x": "did you mean data.path?",
    "model.chanels=32": "did you mean model.channels?",
    "trainer.gradient_clip_val=1": "did you mean optim.grad_clip?",
    "ckpt=last.ckpt": "did you mean resume?",
    "ema.dcay=0.99": "did you mean ema.decay?",
    "trainer.logger=x": "did you mean logger?",
    "trainer.callbacks=[x]": "callbacks are set in Python: see docs/lightning.md",
    "--config=x": "a config is the first argument of train.py, without a flag: python train.py configs/NAME.yaml",
    "toon64": "did you mean configs/toon64.yaml?",
    "--lr=1": "did you mean optim.lr?",
    "--epochs=3": "did you mean trainer.max_epochs?",
    "--gpus 2": "did you mean trainer.devices?",
    "--config x.yaml": "a config is the first argument of train.py, without a flag: python train.py configs/NAME.yaml",
    "trainer.nosuch=1": "--help-all lists what is known",
}
"""Arguments that train.py does not know, and the hint that each gets."""


@pytest.mark.parametrize("slip", TRAIN_SLIPS)
def test_train_suggests_the_key_that_is_meant(slip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert TRAIN_SLIPS[slip] in cli.refused(train.main, capsys, *slip.split())


@pytest.mark.parametrize("slip", SAMPLE_SLIPS)
@pytest.mark.parametrize("written", ["{} 4", "{}=4"])
def test_sample_suggests_the_flag_that_is_meant(slip: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = cli.refused(sample.main, capsys, "--unconditional", *written.format(slip).split())
    assert f"unknown flag {slip}" in error
    assert f"did you mean {SAMPLE_SLIPS[slip]}?" in error


@pytest.mark.parametrize(
    ("slip", "hint"),
    [
        ("--xyzzy", "--help lists what is known"),
        ("--nosuch", "--help lists what is known"),
        ("a.png", "unknown argument a.png; a reference image is given by --ref"),
        ("\n", "a reference image is given by --ref"),
    ],
)
def test_sample_explains_what_is_no_slip(slip: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in cli.refused(sample.main, capsys, "--unconditional", slip)
