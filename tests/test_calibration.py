"""high_band_gain: what it does to a prediction, how it is set, and how it goes from training to sample.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sample
from ilvr_lightning import calibration
from ilvr_lightning.calibration import FARTHEST, calibrate
from ilvr_lightning.diffusion.conditioning import ILVR
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.evaluation.bands import high_band_energy
from ilvr_lightning.pretrained.load import load_denoiser
from tests import commands
from tests.known import GaussianDenoiser, RecordedNoise, make_plan

SCHEDULE = NoiseSchedule.linear()
PLAN = SamplingPlan.preset("fast", factor=4, clip=False)
VARIANCE = 0.1


def images(count: int) -> Tensor:
    white: Tensor = torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    scaled: Tensor = VARIANCE**0.5 * white
    return scaled


@pytest.mark.parametrize("noise", ["fresh", "matched", "fixed"])
def test_gain_scales_what_phi_leaves(noise: str) -> None:
    phi, y, x0 = LowPassFilter((16, 16), 4, orthogonal=True), images(2), images(4)[2:]
    gain = (1.5, 0.75)
    settings = ILVR(reference=y, low_pass=phi, reference_noise=noise, high_band_gain=gain)  # type: ignore[arg-type]
    run = settings.start(SCHEDULE, RecordedNoise(), [1000, 500], x_T=torch.zeros_like(y))
    eps = torch.ones_like(x0)
    refined = run.refine_prediction(Prediction(x0=x0, eps=eps), 1000)
    high = torch.tensor(gain).reshape(-1, 1, 1, 1) * (x0 - phi(x0))
    torch.testing.assert_close(refined.x0, (phi(x0) if noise == "fresh" else phi(y)) + high, rtol=0, atol=1e-6)
    assert refined.eps is eps


def test_gain_needs_the_timesteps() -> None:
    settings = ILVR(reference=images(1), low_pass=LowPassFilter((16, 16), 4), high_band_gain=1.1)
    with pytest.raises(ValueError, match=r"sampling\.high_band_gain .* need the run's timesteps"):
        settings.start(SCHEDULE, RecordedNoise())


@pytest.mark.parametrize("gain", [0.4, 2.1, float("nan"), (1.0, 3.0)])
def test_gain_out_of_range(gain: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"sampling\.high_band_gain must be between 0\.5 and 2: got"):
        make_plan(high_band_gain=gain)


@pytest.mark.parametrize("believed", [0.08, 0.125])
def test_calibration_mends_a_wrong_energy(believed: float) -> None:
    """A denoiser that takes the data for narrower, or wider, than they are."""
    y = images(16)
    denoise = GaussianDenoiser(SCHEDULE, 0.0, believed)
    gain, before = calibrate(denoise, SCHEDULE, PLAN, y, range(16))
    assert before == pytest.approx(believed / VARIANCE, rel=0.1)
    assert (gain > 1) == (believed < VARIANCE)
    plan = SamplingPlan.preset("fast", factor=4, clip=False, high_band_gain=gain)
    x = generate(denoise, SCHEDULE, plan, seeds=range(100, 116), shape=(3, 16, 16), reference=y)
    assert high_band_energy(x, y, 4) == pytest.approx(1, abs=0.05)


def test_calibration_leaves_an_exact_denoiser_nearly_alone() -> None:
    gain, before = calibrate(GaussianDenoiser(SCHEDULE, 0.0, VARIANCE), SCHEDULE, PLAN, images(32), range(32))
    assert before == pytest.approx(1, abs=0.08)  # of 20 steps of the solver
    assert gain == pytest.approx(1, abs=0.01)


def test_calibration_goes_only_so_far() -> None:
    gain, _ = calibrate(GaussianDenoiser(SCHEDULE, 0.0, 1e-4), SCHEDULE, PLAN, images(2), range(2))
    assert gain in (1.0, 1 + FARTHEST)


def test_from_training_to_pictures(
    train_run: Callable[..., Path], tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from ilvr_lightning.pretrained.__main__ import main as pretrained

    monkeypatch.setattr(calibration, "FARTHEST", 0.4)  # a network of two epochs would go to the bound everywhere
    folder = train_run("calibrated", "calibration.images=3", "trainer.max_epochs=2")
    last = folder / "checkpoints" / "last.ckpt"
    gains = load_denoiser(last, say=None).description.high_band_gain
    assert set(gains) == {"fast", "draft"}
    assert set(gains["fast"]) == {2, 4}
    assert all(abs(g - 1) <= 0.4 for of in gains.values() for g in of.values())
    assert len({g for of in gains.values() for g in of.values()}) > 1

    def used(name: str, *flags: object) -> list[float]:
        argv = ["--ckpt", last, "--ref", next(images.glob("*.png")), "--num-samples", 1, "--device", "cpu",
                "--out", tmp_path / name, *flags]  # fmt: skip
        assert sample.main(list(map(str, argv))) == 0
        lines = (tmp_path / name / "manifest.jsonl").read_text().splitlines()
        return [json.loads(line)["plan"]["high_band_gain"] for line in lines]

    assert used("fast", "--factor", 2, 4, 8) == [gains["fast"][2], gains["fast"][4], 1.0]
    assert used("draft", "--preset", "draft", "--factor", 4) == [gains["draft"][4]]
    assert used("given", "--factor", 2, 4, "--high-band-gain", 1.25) == [1.25, 1.25]
    # Of another sampler than the preset's nothing is known.
    assert used("steps", "--factor", 2, "--steps", 5) == [1.0]
    assert used("paper", "--factor", 2, "--preset", "paper") == [1.0]
    again = ["--reproduce", tmp_path / "fast" / f"{next(images.glob('*.png')).stem}_N2_0.png", "--ckpt", last]
    capsys.readouterr()
    assert sample.main([*map(str, again), "--out", str(tmp_path / "again")]) == 0
    assert "identical" in capsys.readouterr().out

    exported = tmp_path / "model.safetensors"
    assert pretrained(["export", str(last), "--to", "safetensors", str(exported)]) == 0
    assert load_denoiser(exported, say=None).description.high_band_gain == gains
    assert pretrained(["inspect", str(last)]) == 0
    assert f"high_band_gain {gains['fast'][2]:g} at N=2" in capsys.readouterr().out


def test_gains_of_other_weights_are_not_taken(train_run: Callable[..., Path]) -> None:
    """Trained on, a checkpoint has none until it is calibrated again."""
    folder = train_run("calibrated_once", "calibration.images=3")
    last = folder / "checkpoints" / "last.ckpt"
    assert load_denoiser(last, say=None).description.high_band_gain
    train_run("calibrated_once", f"resume={last}", "trainer.max_epochs=2", "calibration.images=0")
    assert not load_denoiser(last, say=None).description.high_band_gain


@pytest.mark.parametrize("value", ["3", '{"fast": {"0": 1.0}}', '{"fast": {"4": 9.0}}', '{"fast": 1}'])
def test_hostile_gains_in_a_file(value: str, trained: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ilvr_lightning.errors import UserError
    from ilvr_lightning.pretrained.export import export

    made = tmp_path / "model.safetensors"
    export(load_denoiser(trained / "checkpoints" / "last.ckpt", say=None), "safetensors", made)
    with safe_open(made, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        metadata = dict(file.metadata())
    description = json.loads(metadata["ilvr_lightning"])
    description["high_band_gain"] = json.loads(value)
    hostile = tmp_path / "hostile.safetensors"
    save_file(state, hostile, {**metadata, "ilvr_lightning": json.dumps(description)})
    with pytest.raises(UserError, match="its description is not of this version"):
        load_denoiser(hostile, say=None)


def test_bad_gain_on_the_command_line(trained: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", trained / "checkpoints" / "last.ckpt", "--ref", images, "--high-band-gain", "3"]
    assert "--high-band-gain must be between 0.5 and 2: got 3.0" in commands.refused(sample.main, capsys, *argv)


def test_calibrating_a_checkpoint_that_is_there(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ilvr_lightning.pretrained.__main__ import main as pretrained

    last, made = str(trained / "checkpoints" / "last.ckpt"), tmp_path / "model.safetensors"
    pictures = [str(path) for path in sorted(images.glob("*.png"))[:3]]
    assert pretrained(["export", last, "--to", "safetensors", str(made), "--calibrate", *pictures]) == 0
    assert "high_band_gain" in capsys.readouterr().out
    assert set(load_denoiser(made, say=None).description.high_band_gain["draft"]) == {2, 4}
    to_adm = ["export", last, "--to", "adm", str(tmp_path / "model.pt"), "--calibrate", *pictures]
    assert "--calibrate is for --to safetensors" in commands.refused(pretrained, capsys, *to_adm)
