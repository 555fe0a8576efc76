"""The commands on third-party checkpoints: sample.py --ckpt, train.py init_from=."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from ilvr_lightning.checkpoints.export import export
from ilvr_lightning.checkpoints.load import file_sha256, load_denoiser
from tests.support import cli, golden

TrainRun = Callable[..., Path]
HEADS = ("--override", "num_head_channels=16")


@pytest.fixture(scope="module")
def adm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adm") / "ffhq_10m.pt"
    torch.save(golden.filled_state("ilvr"), path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def run(checkpoint: Path, reference: Path, out: Path, *argv: str) -> list[dict[str, Any]]:
    """Sample one picture in two steps; gives the recipe of each line of the index, with its file."""
    status = sample.main(["--ckpt", str(checkpoint), "--ref", str(reference), "--out", str(out), "--steps", "2",
                          "--num-samples", "1", "--device", "cpu", *argv])  # fmt: skip
    assert status == 0
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return [{**json.loads(line["recipe"]), "file": line["file_name"]} for line in lines]


def test_sample_from_an_adm_file(
    adm_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = run(adm_file, reference, tmp_path, *HEADS)
    said = capsys.readouterr().out
    assert "ADM state dict, 3x32x32" in said and "image_size=32" in said and "num_head_channels=64" not in said
    assert line["checkpoint_sha256"] == file_sha256(adm_file)
    assert line["overrides"] == {"num_head_channels": 16}
    lines = run(adm_file, reference, tmp_path)  # other heads: another picture, under another name
    assert len({entry["file"] for entry in lines}) == 2
    pictures = [np.asarray(Image.open(tmp_path / entry["file"])) for entry in lines]
    assert (pictures[0] != pictures[1]).any()


def test_a_picture_of_an_adm_file_is_reproduced_with_its_overrides(
    adm_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = run(adm_file, reference, tmp_path / "out", *HEADS)
    capsys.readouterr()
    picture = tmp_path / "out" / line["file"]
    status = sample.main(["--reproduce", str(picture), "--ckpt", str(adm_file), "--out", str(tmp_path / "again")])
    assert status == 0
    assert "identical" in capsys.readouterr().out


def test_all_formats_of_one_model_make_one_picture(adm_file: Path, reference: Path, tmp_path: Path) -> None:
    loaded = load_denoiser(adm_file, overrides={"num_head_channels": 16}, say=None)
    pictures = []
    for kind, name in (("safetensors", "folder"), ("safetensors", "file.safetensors"), ("adm", "again.pt"),
                       ("diffusers", "diffusers")):  # fmt: skip
        export(loaded, kind, tmp_path / name)
        flags = HEADS if kind == "adm" else ()
        (line,) = run(tmp_path / name, reference, tmp_path / f"from_{name}", *flags)
        pictures.append(np.asarray(Image.open(tmp_path / f"from_{name}" / line["file"])).astype(int))
    assert max(np.abs(picture - pictures[0]).max() for picture in pictures) <= 1


def test_clipping_follows_the_folders_scheduler(adm_file: Path, reference: Path, tmp_path: Path) -> None:
    export(load_denoiser(adm_file, overrides=golden.overrides("ilvr"), say=None), "diffusers", tmp_path / "d")
    config = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}))
    (line,) = run(tmp_path / "d", reference, tmp_path / "a")
    assert line["plan"]["clip"] is False
    (line,) = run(tmp_path / "d", reference, tmp_path / "b", "--clip")
    assert line["plan"]["clip"] is True


def test_preset_of_the_released_code(adm_file: Path, reference: Path, tmp_path: Path) -> None:
    (line,) = run(adm_file, reference, tmp_path, *HEADS, "--preset", "ilvr_adm", "--respaced-range-t", "1")
    assert (line["plan"]["reference_noise"], line["plan"]["respaced_range_t"]) == ("fresh_released", 1)


FINE_TUNE = (
    "model.channels=32", "model.channel_mult=[1,2]", "model.attention_resolutions=[16]", "model.resblock_updown=true",
    "model.num_head_channels=16", "data.image_size=32", "grid.factors=[4]", "trainer.max_epochs=1",
    "trainer.limit_train_batches=1", "optim.decay_steps=null", "ema.decay=0", "diffusion.schedule=linear",
    "diffusion.num_timesteps=1000",
)  # fmt: skip


def test_fine_tuning_from_an_adm_file(adm_file: Path, train_run: TrainRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_run("fine", *FINE_TUNE, "model.learn_sigma=true", f"init_from={adm_file}", "optim.lr=1e-12")
    said = capsys.readouterr().out
    assert "init_from" in said and "ADM state dict" in said and "weights copied" in said
    trained = load_denoiser(folder / "checkpoints" / "last.ckpt", say=None).network.state_dict()
    expected = golden.network("ilvr").state_dict()
    assert max(float((trained[name] - value).abs().max()) for name, value in expected.items()) < 1e-6


def test_fine_tuning_that_does_not_fit(
    adm_file: Path, tiny_config: Path, train_run: TrainRun, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = functools.partial(cli.refused, train.main, capsys, tiny_config)
    assert "init_remake_head=true" in refused(*FINE_TUNE, f"init_from={adm_file}")
    assert "model.num_res_blocks=1" in refused(
        *FINE_TUNE, "model.learn_sigma=true", "model.num_res_blocks=2", f"init_from={adm_file}"
    )
    folder = train_run("remade", *FINE_TUNE, f"init_from={adm_file}", "init_remake_head=true")
    assert "output layer was re-made" in capsys.readouterr().out
    assert not load_denoiser(folder / "checkpoints" / "last.ckpt", say=None).network.config.learn_sigma
