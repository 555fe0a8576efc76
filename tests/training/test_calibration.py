"""octave_gains: what it does to a prediction, how it is set, and how it goes from training to sample.py."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sample
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.diffusion.conditioning import ILVR
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import LowPassFilter, OctaveGains
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.metrics import calibration
from ilvr_lightning.metrics.bands import octave_energies
from ilvr_lightning.metrics.calibration import MAX_CHANGE, calibrate, calibrate_presets
from tests.support import cli, samples
from tests.support.oracles import GaussianDenoiser, RecordedNoise, make_plan

SCHEDULE = NoiseSchedule.linear()
PLAN = SamplingPlan.preset("fast", factor=4, clip=False)
VARIANCE = 0.1


def images(count: int) -> Tensor:
    white: Tensor = torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    scaled: Tensor = VARIANCE**0.5 * white
    return scaled


@pytest.mark.parametrize("noise", ["fresh", "matched", "fixed"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_gains_scale_octaves(noise: str, orthogonal: bool) -> None:
    """Three octaves above N=8, two above N=4; the finest last, and what is below phi as without gains."""
    filters = {n: LowPassFilter((16, 16), n, orthogonal=orthogonal) for n in (2, 4, 8)}
    phi, y, x0 = LowPassFilter((16, 16), (8, 4), orthogonal=orthogonal), images(2), images(4)[2:]
    settings = ILVR(reference=y, low_pass=phi, reference_noise=noise, octave_gains=((1.5, 0.75, 1.1),))  # type: ignore[arg-type]
    run = settings.start(SCHEDULE, RecordedNoise(), [1000, 500], x_T=torch.zeros_like(y))
    eps = torch.ones_like(x0)
    refined = run.refine_prediction(Prediction(x0=x0, eps=eps), 1000)
    two, four, eight = (filters[n](x0) for n in (2, 4, 8))
    high = 1.1 * (x0 - two) + 0.75 * (two - four)
    low = phi(x0) if noise == "fresh" else phi(x0) + phi(y - x0)
    torch.testing.assert_close(refined.x0[0], (low + 1.5 * (four - eight) + high)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(refined.x0[1], (low + high)[1], rtol=0, atol=1e-6)
    assert refined.eps is eps


def test_gains_an_image_and_fewer_than_octaves() -> None:
    x = images(2)
    phi = LowPassFilter((16, 16), 8)
    made = OctaveGains(phi, [(2.0,), (1.0, 1.0, 1.0, 1.0)])(x)
    finest = x - LowPassFilter((16, 16), 2)(x)
    torch.testing.assert_close(made[0], x[0] + finest[0], rtol=0, atol=1e-6)
    assert torch.equal(made[1], x[1])


def test_gains_of_a_batch_equal_single_runs() -> None:
    y = images(3)
    gains: Any = ((1.1, 0.9), (), (1.2,))
    denoise = GaussianDenoiser(SCHEDULE, 0.0, VARIANCE)
    together = generate(denoise, SCHEDULE, replace(PLAN, factor=(4, 4, 2), octave_gains=gains), seeds=[1, 1, 1],
                        shape=(3, 16, 16), reference=y)  # fmt: skip
    for i, factor in enumerate((4, 4, 2)):
        plan = replace(PLAN, factor=factor, octave_gains=gains[i])
        alone = generate(denoise, SCHEDULE, plan, seeds=[1], shape=(3, 16, 16), reference=y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"sampling\.octave_gains must be one list, or one per image: got 2"):
        generate(denoise, SCHEDULE, replace(PLAN, octave_gains=gains[:2]), seeds=[1, 1, 1], shape=(3, 16, 16),
                 reference=y)  # fmt: skip


def test_gains_need_the_timesteps() -> None:
    settings = ILVR(reference=images(1), low_pass=LowPassFilter((16, 16), 4), octave_gains=((1.1,),))
    with pytest.raises(ValueError, match=r"sampling\.octave_gains .* need the run's timesteps"):
        settings.start(SCHEDULE, RecordedNoise())


@pytest.mark.parametrize("gains", [(0.4,), (1.0, 2.1), (float("nan"),), ((1.0,), (3.0,))])
def test_gains_out_of_range(gains: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"sampling\.octave_gains must be between 0\.5 and 2: got"):
        make_plan(octave_gains=gains)


def test_gains_are_for_powers_of_two() -> None:
    assert make_plan(factor=6, octave_gains=(1.0,)).factor == 6
    with pytest.raises(ValueError, match=r"sampling\.octave_gains need factors that are powers of two: got 6"):
        make_plan(factor=6, octave_gains=(1.1,))
    with pytest.raises(ValueError, match="octave gains are for factors that are powers of two: got 6"):
        OctaveGains(LowPassFilter((12, 12), 6), [(1.1,)])


@pytest.mark.parametrize("believed", [0.08, 0.125])
def test_calibration_mends_a_wrong_energy(believed: float) -> None:
    """A denoiser that takes the data for narrower, or wider, than they are."""
    y = images(16)
    denoise = GaussianDenoiser(SCHEDULE, 0.0, believed)
    gains = calibrate(denoise, SCHEDULE, PLAN, [4], y, range(16))[4]
    assert len(gains) == 2
    assert all((gain > 1) == (believed < VARIANCE) for gain in gains)
    for given, expected in (((), believed / VARIANCE), (gains, 1.0)):
        plan = replace(PLAN, octave_gains=given)
        x = generate(denoise, SCHEDULE, plan, seeds=range(100, 116), shape=(3, 16, 16), reference=y)
        # The solver's own error is some percent at 20 evaluations.
        assert octave_energies(x, y, 4) == pytest.approx([expected] * 2, rel=0.1)


def test_calibration_goes_only_so_far() -> None:
    (gain,) = calibrate(GaussianDenoiser(SCHEDULE, 0.0, 1e-4), SCHEDULE, PLAN, [2], images(2), range(2))[2]
    assert gain == 1 + MAX_CHANGE


def test_octave_energies_by_hand() -> None:
    y = images(2)
    two = LowPassFilter((16, 16), 2, orthogonal=True)(y)
    assert octave_energies(y, y, 8) == pytest.approx([1, 1, 1])
    assert octave_energies(two + 3 * (y - two), y, 2) == pytest.approx([9], rel=1e-4)
    assert octave_energies(y, y, 1) == []


def test_images_without_detail_set_nothing() -> None:
    assert math.isnan(octave_energies(images(1), torch.zeros(1, 3, 16, 16), 2)[0])
    assert calibrate(GaussianDenoiser(SCHEDULE), SCHEDULE, PLAN, [4], torch.ones(2, 3, 16, 16), range(2)) == {
        4: (1.0, 1.0)
    }


def test_from_training_to_pictures(
    train_run: Callable[..., Path], tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from ilvr_lightning.checkpoints.__main__ import main as pretrained

    monkeypatch.setattr(calibration, "MAX_CHANGE", 0.4)  # a network of two epochs would go to the bound
    folder = train_run("calibrated", "calibration.images=3", "trainer.max_epochs=2")
    last = folder / "checkpoints" / "last.ckpt"
    loaded = load_denoiser(last, say=None)
    gains, components = loaded.description.octave_gains, loaded.components
    assert set(gains) == {"fast", "draft"}
    assert components is not None
    assert components.vectors.shape[1:] == (3, *loaded.image_shape[1:])
    assert loaded.fastest().components is components
    assert set(gains["fast"]) == {2, 4}
    assert [len(each) for each in gains["draft"].values()] == [1, 2]
    assert len({gain for of in gains.values() for each in of.values() for gain in each}) > 1

    def used(name: str, *flags: object) -> list[list[float]]:
        argv = ["--ckpt", last, "--ref", next(images.glob("*.png")), "--num-samples", 1, "--device", "cpu",
                "--out", tmp_path / name, *flags]  # fmt: skip
        assert sample.main(list(map(str, argv))) == 0
        return [line["recipe"]["plan"]["octave_gains"] for line in samples.index(tmp_path / name)]

    assert used("fast", "--factor", 2, 4, 8) == [list(gains["fast"][2]), list(gains["fast"][4]), []]
    assert used("draft", "--preset", "draft", "--factor", 4) == [list(gains["draft"][4])]
    assert used("given", "--factor", 2, 4, "--octave-gains", 1.25, 0.75) == [[1.25, 0.75]] * 2
    # Of another sampler than the preset's nothing is known.
    assert used("steps", "--factor", 2, "--steps", 5) == [[]]
    assert used("paper", "--factor", 2, "--preset", "paper") == [[]]
    again = ["--reproduce", tmp_path / "fast" / f"{next(images.glob('*.png')).stem}_N2_0.png", "--ckpt", last]
    capsys.readouterr()
    assert sample.main([*map(str, again), "--out", str(tmp_path / "again")]) == 0
    assert "identical" in capsys.readouterr().out

    exported = tmp_path / "model.safetensors"
    assert pretrained(["export", str(last), "--to", "safetensors", str(exported)]) == 0
    read = load_denoiser(exported, say=None)
    assert read.description.octave_gains == gains
    assert read.components is not None
    assert read.components.plain() == components.plain()
    assert pretrained(["inspect", str(last)]) == 0
    assert f"octave_gains N=2 {gains['fast'][2][0]:g}, N=4" in capsys.readouterr().out


def test_gains_of_other_weights_are_not_taken(train_run: Callable[..., Path]) -> None:
    """Trained on, a checkpoint has none until it is calibrated again."""
    folder = train_run("calibrated_once", "calibration.images=3")
    last = folder / "checkpoints" / "last.ckpt"
    assert load_denoiser(last, say=None).description.octave_gains
    train_run("calibrated_once", f"resume={last}", "trainer.max_epochs=2", "calibration.images=0")
    assert not load_denoiser(last, say=None).description.octave_gains


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("octave_gains", value) for value in ("3", '{"fast": {"0": [1.0]}}', '{"fast": {"4": [9.0]}}',
                                                '{"fast": {"4": 1.0}}', '{"fast": 1}')),
        *(("low_band", value) for value in ("3", '{"fast": 1}', '{"fast": {"low_band_gain": -1}}',
                                            '{"fast": {"eps_extrapolation": 7}}', '{"fast": {"low_band_gain": "x"}}')),
        *(("components", value) for value in ("3", "[1]", '{"shape": [1]}')),
        *(("spectrum", value) for value in ("3", "[-1.0]", '["x"]', "[NaN]", f"[{'1,' * 20_000}1]")),
    ],
)  # fmt: skip
def test_hostile_calibration_in_a_file(field: str, value: str, trained: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ilvr_lightning.checkpoints.export import export
    from ilvr_lightning.errors import UserError

    made = tmp_path / "model.safetensors"
    export(load_denoiser(trained / "checkpoints" / "last.ckpt", say=None), "safetensors", made)
    with safe_open(made, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        metadata = dict(file.metadata())
    description = json.loads(metadata["ilvr_lightning"])
    description[field] = json.loads(value)
    hostile = tmp_path / "hostile.safetensors"
    save_file(state, hostile, {**metadata, "ilvr_lightning": json.dumps(description)})
    with pytest.raises(UserError, match=r"hostile\.safetensors describes no network that loads: "):
        load_denoiser(hostile, say=None)


def test_a_correction_without_components_says_so(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--ckpt", trained / "checkpoints" / "last.ckpt", "--ref", next(images.glob("*.png")), "--factor", 4,
            "--high-band-correction", 1, "--steps", 3, "--num-samples", 1, "--out", tmp_path]  # fmt: skip
    assert sample.main(list(map(str, argv))) == 0
    assert "--high-band-correction changes nothing" in capsys.readouterr().out


def test_export_takes_components_of_training_images(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ilvr_lightning.checkpoints.__main__ import main as pretrained

    last, out = str(trained / "checkpoints" / "last.ckpt"), str(tmp_path / "model.safetensors")
    flags = ["--to", "safetensors", out, "--training-images", str(images)]
    assert pretrained(["export", last, *flags]) == 2
    assert "--training-images needs --calibrate" in capsys.readouterr().err
    assert pretrained(["export", last, *flags, "--calibrate", str(next(images.glob("*.png")))]) == 0
    assert load_denoiser(out, say=None).components is not None


def test_a_gain_without_a_spectrum_says_so(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--ckpt", trained / "checkpoints" / "last.ckpt", "--ref", next(images.glob("*.png")), "--low-band-gain", 2,
            "--factor", 4, "--steps", 3, "--num-samples", 1, "--device", "cpu", "--out", tmp_path]  # fmt: skip
    assert sample.main(list(map(str, argv))) == 0
    assert "natural images are assumed" in capsys.readouterr().out
    assert [line["recipe"]["plan"]["low_band_gain"] for line in samples.index(tmp_path)] == [2.0]


def test_bad_gain_on_the_command_line(trained: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", trained / "checkpoints" / "last.ckpt", "--ref", images, "--octave-gains", "3"]
    assert "--octave-gains must be between 0.5 and 2: got 3.0" in cli.refused(sample.main, capsys, *argv)


def test_calibrating_a_checkpoint_that_is_there(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ilvr_lightning.checkpoints.__main__ import main as pretrained

    last, made = str(trained / "checkpoints" / "last.ckpt"), tmp_path / "model.safetensors"
    pictures = [str(path) for path in sorted(images.glob("*.png"))[:3]]
    assert pretrained(["export", last, "--to", "safetensors", str(made), "--calibrate", *pictures]) == 0
    assert "octave_gains" in capsys.readouterr().out
    loaded = load_denoiser(made, say=None)
    assert set(loaded.description.octave_gains["draft"]) == {2, 4}
    assert {n: len(of) for n, of in loaded.fit_scores.items()} == {2: 3, 4: 3}
    to_adm = ["export", last, "--to", "adm", str(tmp_path / "model.pt"), "--calibrate", *pictures]
    assert "--calibrate needs --to safetensors" in cli.refused(pretrained, capsys, *to_adm)


def test_the_references_of_the_grids_are_checked(
    train_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end, where enough held-out images were scored: more than the few of this run."""
    train_run("few_scores", "calibration.images=3")
    assert "check        validation_0" not in capsys.readouterr().out
    monkeypatch.setattr("ilvr_lightning.training.calibration.are_enough", lambda scores: len(scores) == 2)
    monkeypatch.setattr("ilvr_lightning.metrics.fit.ALPHA", 0.5)
    monkeypatch.setattr("ilvr_lightning.metrics.fit.check_reference.__defaults__", (None, 0.5))
    train_run("checked", "calibration.images=3")
    said = capsys.readouterr().out
    assert all(f"check        validation_{i}: " in said for i in range(3)) and said.count("N=4") >= 3


def test_a_failed_calibration_loses_nothing(train_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ilvr_lightning.training.calibration.calibrate_presets", fails)
    with pytest.warns(UserWarning, match=r"the presets were not calibrated \(CUDA out of memory\); .* --calibrate"):
        folder = train_run("calibration_failed", "calibration.images=3")
    loaded = load_denoiser(folder / "checkpoints" / "last.ckpt", say=None)
    assert not loaded.description.octave_gains


@pytest.mark.parametrize("setting", ["limit_train_batches=2", "fast_dev_run=true"])
def test_a_trial_run_is_not_calibrated(setting: str, train_run: Callable[..., Path]) -> None:
    folder = train_run("trial", "calibration.images=3", f"trainer.{setting}")
    assert not load_denoiser(folder / "checkpoints" / "last.ckpt", say=None).description.octave_gains


def test_factors_that_are_no_powers_of_two_go_without_gains() -> None:
    """A batch of several factors has the gains of those that were calibrated."""
    plan = SamplingPlan(factor=(4, 6), octave_gains=((1.1, 1.2), ()))  # type: ignore[arg-type]
    x = images(2)[:, :, :12, :12]
    gains = OctaveGains(LowPassFilter((12, 12), plan.factor, orthogonal=True), plan.octave_gains)  # type: ignore[arg-type]
    alone = OctaveGains(LowPassFilter((12, 12), 4, orthogonal=True), [(1.1, 1.2)])
    made = gains(x)
    assert torch.allclose(made[0], alone(x)[0]) and torch.equal(made[1], x[1])


def test_one_image_calibrates_nothing() -> None:
    lines: list[str] = []
    found = calibrate_presets(GaussianDenoiser(SCHEDULE, 0.0, 0.1), images(1), say=lines.append)  # type: ignore[arg-type]
    assert not (found.spectrum or found.low_band or found.octave_gains or found.fit_scores)
    assert lines == ["nothing was calibrated: it takes at least two held-out images"]


def test_calibration_of_a_network_that_makes_no_numbers() -> None:
    denoise = GaussianDenoiser(SCHEDULE, float("nan"), 0.1)
    assert calibrate(denoise, SCHEDULE, PLAN, [4], images(2), range(2)) == {4: (1.0, 1.0)}


def test_gains_are_used_where_they_were_set(train_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_CHANGE", 0.4)
    folder = train_run("calibrated_thrice", "calibration.images=3")
    loaded = load_denoiser(folder / "checkpoints" / "last.ckpt", say=None)
    gains = loaded.description.octave_gains["fast"]
    scores = loaded.fit_scores  # of the held-out images that the presets were not chosen on, if there are any
    assert set(scores) == {2, 4} and {len(of) for of in scores.values()} <= set(range(1, 13))
    chosen: dict[str, Any] = loaded.description.low_band["fast"]
    assert loaded.preset("fast", 4) == SamplingPlan.preset("fast", factor=4, octave_gains=gains[4], **chosen)
    assert loaded.preset("best", 4) == SamplingPlan.preset("best", factor=4, octave_gains=gains[4], **chosen)
    assert loaded.preset("fast", 4, low_band_gain=0.125).octave_gains == ()
    assert loaded.preset("fast", 4, num_steps=19).low_band_gain == 0
    assert loaded.preset("fast", 4, octave_gains=(1.0,)).octave_gains == (1.0,)
    for other in ({"clip": False}, {"num_steps": 19}, {"eta": 0.5}, {"factor": 8}):
        assert loaded.preset("fast", **{"factor": 4, **other}).octave_gains == ()  # type: ignore[arg-type]
    raw = load_denoiser(folder / "checkpoints" / "last.ckpt", "raw", say=None).description
    assert not raw.octave_gains and not raw.low_band and raw.spectrum
