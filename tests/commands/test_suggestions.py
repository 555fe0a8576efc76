"""Likely slips in a command's flags and keys, and the hint that each gets."""

import pytest

import sample
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
        ("a.png", "unknown argument a.png; a reference image is given by --ref"),
    ],
)
def test_sample_explains_what_is_no_slip(slip: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in cli.refused(sample.main, capsys, "--unconditional", slip)
