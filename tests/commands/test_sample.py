"""sample.py's command line: which model it takes, its help, and bad input in one line."""

import functools
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.references import find_images
from ilvr_lightning.diffusion.plan import DEFAULT_PRESET, SamplingPlan
from ilvr_lightning.sampling.arguments import make_parser, parse_arguments
from tests.support import cli
from tests.support.samples import pixels, recipe_text, sample_into

refused = functools.partial(cli.refused, sample.main)


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("references") / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return path


# Which model it takes


def test_the_newest_run_is_the_default(
    trained: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(trained.parents[1])
    command = ["--ref", reference, "--steps", 2, "--factor", 2, "--device", "cpu", "--num-samples", 1]
    assert sample.main(list(map(str, command))) == 0
    assert "checkpoint   runs/tiny/" in capsys.readouterr().out
    assert (tmp_path / "samples" / "a_N2_0.png").exists()


def test_a_bundled_model_where_there_is_no_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself, by its name, and behind a run; the checkpoint of an image of it is found again."""
    bundled = tmp_path / "data" / "pretrained"
    export(load_denoiser(checkpoint, say=None), "safetensors", bundled / "toon64")
    export(load_denoiser(checkpoint, "raw", say=None), "safetensors", bundled / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ilvr_lightning.checkpoints.find.BUNDLED", bundled)

    def said(*argv: object) -> str:
        asked = [] if "--reproduce" in argv else ["--steps", 2, "--num-samples", 1, "--unconditional", "--device=cpu"]
        assert sample.main(list(map(str, [*asked, *argv]))) == 0
        return capsys.readouterr().out

    assert "checkpoint   data/pretrained/toon64" in said("--out", "a")
    assert "checkpoint   data/pretrained/other" in said("--ckpt", "other", "--out", "b")
    assert "identical" in said("--reproduce", "b/unconditional_0.png", "--out", "again")
    Path("runs").symlink_to(checkpoint.parents[3])
    assert "checkpoint   runs/tiny/" in said("--out", "c")


def test_no_checkpoint_at_all(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ilvr_lightning.checkpoints.find.BUNDLED", tmp_path / "data" / "pretrained")
    assert "--ckpt is missing, there is no run" in refused(capsys, "--ref", reference)


def test_find_images_is_what_ref_uses(reference: Path) -> None:
    assert find_images([str(reference.parent)]) == [reference]


# Bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--ref is missing"),
        ("--ref a.png --unconditional", "give --ref or --unconditional, not both"),
        ("--ref a.png --preset finest", "--preset: invalid choice: 'finest'"),
        ("--ref a.png --sampler euler", "--sampler: invalid choice: 'euler'"),
        ("--ref a.png --steps 0", "--steps must be at least 1: got 0"),
        ("--ref a.png --steps many", "--steps/--num-steps: got 'many'; give an integer or all"),
        ("--ref a.png --steps 26", "--steps must be at most T=25: got 26"),
        ("--ref a.png --factor 3", "--factor must divide the image size: got factor=3 for 8 px; the nearest that do"),
        ("--ref a.png --factor 0", "--factor must be at least 1: got 0"),
        ("--ref a.png --factor 2 2", "--factor must list each value once"),
        ("--ref a.png --octave-gains 3", "--octave-gains must be between 0.5 and 2: got 3.0"),
        ("--ref a.png --factor 6 --octave-gains 1.1", "--octave-gains need factors that are powers of two: got 6"),
        ("--ref a.png --range 5:10", "--range: got '5:10', which is reversed; give the larger timestep first"),
        ("--ref a.png --range 25:0 5:10", "--range: got '5:10', which is reversed"),
        ("--ref a.png --range 30:0", "--range must be in [0, 25]: got 30"),
        ("--ref a.png --range 10", "--range: got '10'; give two timesteps A:B"),
        ("--ref a.png --range ²:0", "give two timesteps A:B"),
        ("--ref a.png --range 25:0 25:0", "--range must list each value once"),
        ("--unconditional --sweep", "--sweep needs --ref"),
        ("--unconditional --factor 4", "--factor needs --ref; --unconditional follows no reference"),
        ("--ref a.png --override num_heads", "--override: got 'num_heads'; give KEY=VALUE"),
        ("--ref a.png --override num_heads=2", "a checkpoint of ilvr_lightning has no such override"),
        ("--ref a.png --start-from 30", "--start-from must be in [1, 25]: got 30"),
        ("--ref a.png --preset paper --eps-extrapolation 1", "--eps-extrapolation needs --reference-noise=matched"),
        ("--ref a.png --sampler ddim --eta -1", "--eta must be between 0 and 1: got -1"),
        ("--ref a.png --sampler ddpm --eta 1", "--eta is a setting of --sampler ddim or dpmpp_2m; ddpm does not"),
        ("--ref a.png --variance small", "--variance is a setting of --sampler ddpm; dpmpp_2m does not read it"),
        ("--ref a.png --preset paper --eta 1", "--eta is a setting of --sampler ddim or dpmpp_2m"),
        ("--ref a.png --candidates 0", "--candidates must be from 1 to 1000: got 0"),
        ("--ref a.png --candidates 2 --trajectory", "--trajectory shows one run, and excludes --candidates"),
        ("--unconditional --candidates 2", "--candidates needs --ref"),
        ("--ref a.png --num-samples 0", "--num-samples must be at least 1: got 0"),
        ("--unconditional --num-samples 1000000000", "these are 1000000000 images, and a run makes at most 10000000"),
        ("--ref a.png b.png --num-samples 10000000", "these are 20000000 images, and a run makes at most 10000000"),
        ("--ref a.png --batch-size -2", "--batch-size must be at least 1: got -2"),
        ("--ref a.png --devices 0", "--devices must be at least 1: got 0"),
        ("--ref a.png --devices 1000", "this machine has"),
        ("--ref a.png --seed -1", "--seed must be from 0 to 4294967295: got -1"),
        ("--ref a.png --image-size big", "--image-size: got 'big'"),
        ("--ref a.png --ckpt toon64 --image-size 30", "--image-size must be"),
        ("--ref a.png --compile yes", "--compile: invalid choice: 'yes'"),
        ("--ref a.png --format jpg", "--format: invalid choice: 'jpg'"),
        ("--ref a.png --format parquet", "data_files={'train': 'OUT/metadata.jsonl'}).download_and_prepare("),
        ("--ref a.png --sampler ddpm --variance learned", "--variance learned needs a network that learned it"),
        ("--ref a.png --device mps --devices 99", "--device mps: this machine has none; give --device cpu"),
        ("--ref none.png", "--ref: there is no file or folder"),
        ("--ref empty", "--ref: no images in"),
        ("--ref text.png", "text.png cannot be read as an image"),
        ("--ref data/toon:dev", "'dev' is not in data/toon: it has train, test"),
        ("--ref data/toon:test[900:]", "it holds 500 images"),
        ("--ref a.png --out text.png/out", "--out: cannot write to"),
        ("--ref a.png --ckpt none.ckpt", "there is no checkpoint"),
        ("--ref a.png --ckpt toon32", "the bundled models are animals64, relief64, toon64"),
        ("a.png --unconditional", "a.png; a reference image is given by --ref"),
        ("--ref a.png --ckpt text.png", "text.png is no checkpoint"),
    ],
)  # fmt: skip
def test_bad_flags(
    flags: str, words: str, checkpoint: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    places = {"a.png": reference}
    for name in ("b.png", "text.png", "empty", "none.png", "none.ckpt", "text.png/out"):
        places[name] = tmp_path / name
    asked = [places.get(word, word) for word in flags.split()]
    common = ["--ckpt", checkpoint, "--device", "cpu", "--steps", 4, "--out", tmp_path / "out"]
    assert words in refused(capsys, *common, *asked)
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--seed 3", "--seed"), ("--steps 4", "--steps"), ("--factor 4", "--factor"), ("--range 25:0", "--range"),
        ("--sweep", "--sweep"), ("--unconditional", "--unconditional"), ("--preset draft", "--preset"),
        ("--devices 2", "--devices"),
        ("--num-samples 2", "--num-samples"), ("--weights raw", "--weights"), ("--format npz", "--format"),
        ("--candidates 2", "--candidates"),
        ("--trajectory", "--trajectory"), ("--image-size 8", "--image-size"), ("--override num_heads=2", "--override"),
    ],
)  # fmt: skip
def test_what_is_sampled_comes_from_the_image_alone(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--reproduce", "x.png", "--device", "cpu", "--batch-size", 2, *flags.split())
    assert (
        f"--reproduce cannot be combined with {named}, because what is sampled comes from the image; give only --ref"
        in error
    )


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["truncated", "pickle", "torch_pickle", "list"])
def test_a_checkpoint_that_is_none(
    kind: str, checkpoint: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, harm = tmp_path / "x.ckpt", tmp_path / "harm"
    match kind:
        case "truncated":
            path.write_bytes(checkpoint.read_bytes()[:5000])
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(harm), protocol=2))
        case "torch_pickle":
            torch.save({"state_dict": {}, "hyper_parameters": Evil(harm)}, path)
        case "list":
            torch.save([1, 2], path)
    error = refused(capsys, "--ref", reference, "--ckpt", path, "--out", tmp_path / "out")
    assert f"{path} is no checkpoint" in error
    assert not harm.exists()


# What the flags mean


def test_defaults_are_those_of_the_default_preset() -> None:
    args = parse_arguments(["--ref", "x"])
    assert args.plan == SamplingPlan.preset(DEFAULT_PRESET) == SamplingPlan()
    assert (args.num_samples, args.seed, args.batch_size, args.format, args.out) == (4, 0, 16, "png", "samples")


def test_every_setting_has_a_flag() -> None:
    argv = (
        "--ref x --sampler ddim --steps all --spacing quadratic --eta 0.5 --no-clip --kernel box --no-orthogonal "
        "--reference-noise fixed --octave-gains 1.1 0.9 --respaced-range-t 3 --start-from 9 --exact-low-band "
        "--timesteps 9 5 1"
    )
    assert parse_arguments(argv.split()).plan == SamplingPlan(
        sampler="ddim", num_steps="all", spacing="quadratic", eta=0.5, clip=False, kernel="box", orthogonal=False,
        reference_noise="fixed", octave_gains=(1.1, 0.9), respaced_range_t=3, start_from=9, exact_low_band=True,
        timesteps=(9, 5, 1),
    )  # fmt: skip
    more = "--ref x --sampler ddpm --variance large --eps-extrapolation 0.5 --num-steps 7"
    assert parse_arguments(more.split()).plan == SamplingPlan(
        sampler="ddpm", variance="large", eps_extrapolation=0.5, num_steps=7
    )


GROUPS = {
    "what is sampled": "--ref --ckpt --num-samples --unconditional --seed --image-size --fit --reproduce",
    "how closely the reference is followed": "--factor --check --range --sweep --mask --reference-sigma "
    "--candidates --start-from --exact-low-band",
    "how it is drawn": "--preset --sampler --steps --spacing --eta",
    "where it goes": "--out --format --trajectory --overwrite",
    "where it is computed": "--device --devices --batch-size --precision --compile",
    "advanced": "--variance --clip --kernel --orthogonal --reference-noise --eps-extrapolation --low-band-gain "
    "--low-band-decay --high-band-correction --octave-gains "
    "--respaced-range-t --timesteps --weights --override",
}


def test_help_lists_every_flag_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sample.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    found = {}
    for part in re.split(r"\n\n(?=\S)", text):
        flags = re.findall(r"^  (--[\w-]+)", part, re.MULTILINE)
        found[part.partition(":")[0].strip()] = flags
    assert {name: flags.split() for name, flags in GROUPS.items()} == {name: found.get(name, []) for name in GROUPS}
    known = {a.option_strings[0] for a in make_parser()._actions} - {"-h"}
    assert known == {flag for flags in GROUPS.values() for flag in flags.split()}


def test_a_plain_run_says_little(
    checkpoint: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_into(checkpoint, tmp_path / "out", "--ref", reference, "--factor", 2)
    said = capsys.readouterr()
    assert said.err == ""
    assert [line.partition(" ")[0] for line in said.out.splitlines()] == [
        "loading", "checkpoint", "model", "diffusion", "samples", "gallery", "images"
    ]  # fmt: skip


# Noisy references


def test_noise_is_estimated_for_each_reference_and_kept_in_the_png(
    checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    flags = ("--ref", reference, "--steps", 3, "--factor", 2, "--num-samples", 1)
    auto = sample_into(checkpoint, tmp_path / "auto", *flags, "--reference-sigma", "auto")
    given = sample_into(checkpoint, tmp_path / "given", *flags, "--reference-sigma", 0.5)
    plain = sample_into(checkpoint, tmp_path / "plain", *flags)
    sigmas = [recipe_text(folder / "a_N2_0.png")["plan"]["reference_sigma"] for folder in (auto, given, plain)]
    assert sigmas[0] > 0.1
    assert sigmas[1:] == [0.5, 0.0]
    assert sample.main(["--reproduce", str(auto / "a_N2_0.png"), "--out", str(tmp_path / "again"), "--ckpt",
                        str(checkpoint), "--ref", str(reference)]) == 0  # fmt: skip
    assert pixels(tmp_path / "again" / "a_N2_0.png").tolist() == pixels(auto / "a_N2_0.png").tolist()
    assert pixels(plain / "a_N2_0.png").tolist() != pixels(auto / "a_N2_0.png").tolist()
    before = (auto / "a_N2_0.png").stat().st_mtime_ns
    sample_into(checkpoint, auto, *flags, "--reference-sigma", "auto")
    assert (auto / "a_N2_0.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reference-sigma", "much"), "--reference-sigma: got 'much'; give a number, or auto"),
        (("--reference-sigma", "-1"), "--reference-sigma must be between 0 and 2: got -1"),
        (("--reference-sigma", "auto", "--exact-low-band"), "--exact-low-band keeps a reference's noise"),
        (("--reference-sigma", "0.1", "--exact-low-band"), "--exact-low-band keeps a reference's noise"),
    ],
)
def test_noise_that_cannot_be(
    flags: tuple[str, ...], message: str, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "--ref", reference, *flags)
