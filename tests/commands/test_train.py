"""train.py's command line: every bad input gives status 2 and one line that names the setting."""

import functools
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from ilvr_lightning.config.describe import FIRST_KEYS, all_keys
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.errors import UserError
from tests.support import cli

refused = functools.partial(cli.refused, train.main)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("trainer.device=2", "unknown key trainer.device; did you mean trainer.devices?"),
        ("optim.lr=fast", "optim.lr"),
        ("data.batch_size=1.5", "data.batch_size"),
        ("data.flip=perhaps", "data.flip"),
        ("diffusion.schedule=quadratic", "diffusion.schedule"),
        ("optim.lr=-1e-3", "optim.lr must be above 0: got -0.001"),
        ("optim.weight_decay=-1", "optim.weight_decay must be at least 0: got -1"),
        ("ema.decay=1", "ema.decay must be in [0, 1): got 1"),
        ("data.batch_size=0", "data.batch_size must be above 0: got 0"),
        ("data.batch_size=19", "data.batch_size must be at most the number of training images, 18: got 19"),
        ("trainer.accumulate_grad_batches=3", "data.batch_size is the global batch, and must be a multiple of"),
        ("data.channels=4", "data.channels must be 3 or 1: got 4"),
        ("data.path=/no/such/folder", "data.path=/no/such/folder: there is no such folder or file"),
        ("grid.factors=[3]", "grid.factors must divide the image size: got factor=3 for 8 px; the nearest"),
        ("grid.references=[/no/such.png]", "grid.references: there is no file or folder /no/such.png"),
        ("grid.preset=papr", "grid.preset must be one of"),
        ("sampling.num_steps=0", "sampling.num_steps must be at least 1: got 0"),
        ("sampling.num_steps=26", "sampling.num_steps must be at most T=25: got 26"),
        ("sampling.condition_from=26", "sampling.condition_from must be in [0, 25]: got 26"),
        ("sampling.condition_to=-1", "sampling.condition_to must be at least 0: got -1"),
        ("resume=/no/such.ckpt", "resume=/no/such.ckpt: there is no such checkpoint"),
        ("init_from=/no/such.ckpt", "/no/such.ckpt"),
        ("trainer.accelerator=gpu", "invalid trainer.* setting"),
        ("trainer.precision=8", "precision"),
        ("trainer.max_epochs=many", "max_epochs"),
        ("lr", "neither a config (CONFIG.yaml) nor key=value without spaces; did you mean optim.lr?"),
        ("toon32", "did you mean configs/toon32.yaml?"),
        ("run.name=${oc.env:HOME}", "run.name must be a plain value"),
        ("run.name=../escape", "run.name must be the name of one folder: got '../escape'"),
        ("trainer.default_root_dir=null", "trainer.default_root_dir"),
        ("seed=99999999999", "seed must be from 0 to 4294967295: got 99999999999"),
        ("data.image_size=1000000", "data.image_size must be one integer from 1 to 8192"),
        ("model.attention_resolutions=[3]", "model.attention_resolutions must be heights of the levels, 8: got 3"),
        ("optim.betas=[0.9]", "optim.betas: TupleConfig length 1"),
        ("trainer.detect_anomaly=null", "trainer.detect_anomaly"),
        ("trainer.enable_progress_bar=maybe", "trainer.enable_progress_bar"),
        ("trainer.strategy=nothing", "invalid trainer.* setting"),
        ("trainer.devices=99", "trainer.devices=99: this machine has"),
    ],
)  # fmt: skip
def test_bad_setting(
    override: str, words: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if override == "trainer.accelerator=gpu" and torch.cuda.is_available():
        override = "trainer.devices=99"
    assert words in refused(capsys, str(tiny_config), f"trainer.default_root_dir={tmp_path}", override)


def test_range_reversed(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, str(tiny_config), "sampling.condition_from=5", "sampling.condition_to=10")
    assert "the range is reversed: sampling.condition_from=5 is below sampling.condition_to=10" in error


@pytest.mark.parametrize("arguments", [[], ["configs/own_images.yaml", "trainer.max_steps=1"]])
def test_data_path_is_required(arguments: list[str], monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: pytest.fail("nothing is opened"))
    error = refused(capsys, *arguments)
    assert "data.path is not set; give data.path=PATH/TO/IMAGES" in error
    with pytest.raises(UserError, match=r"data\.path is not set"):
        ImageDataModule(image_size=8).setup()


def test_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no config nothing.yaml" in refused(capsys, "nothing.yaml")


def test_config_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("data: [1")
    assert "broken.yaml cannot be read as YAML" in refused(capsys, str(tmp_path / "broken.yaml"))


def test_empty_folder(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no images in this folder" in refused(capsys, str(tiny_config), f"data.path={tmp_path}", "run.name=x")


def test_files_that_are_no_images(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no picture")
    settings = [str(tiny_config), f"data.path={tmp_path}", "run.name=no_images"]
    assert "no image in it can be read" in refused(capsys, *settings)
    error = refused(capsys, str(tiny_config), "run.name=no_images", f"grid.references=[{tmp_path / 'a.png'}]")
    assert "a.png cannot be read as an image" in error


def test_run_folder_that_cannot_be_made(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, str(tiny_config), f"trainer.default_root_dir={tmp_path / 'file' / 'runs'}")
    assert "trainer.default_root_dir: cannot write to" in error


@pytest.mark.parametrize("override", ["trainer.accumulate_grad_batches=3", "data.batch_size=64"])
def test_refused_before_there_is_a_folder(
    override: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data.batch_size" in refused(capsys, str(tiny_config), f"trainer.default_root_dir={tmp_path}/runs", override)
    assert not list(tmp_path.glob("runs/tiny/*"))


def test_what_it_resumes_is_printed(tiny_config: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "checkpoints" / "last.ckpt"
    assert train.main([str(tiny_config), "trainer.max_epochs=2", f"resume={path}"]) == 0
    out = capsys.readouterr().out
    assert f"resume       {path}, step 8\n" in out
    assert "done         step 8, nothing was left to do\n" in out


def test_folder_to_resume(tiny_config: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, str(tiny_config), f"resume={trained}")
    assert f"give the newest in that folder, {trained / 'checkpoints' / 'last.ckpt'}" in error


def test_the_last_step_is_validated_within_an_epoch_too(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for steps in (4, 6):  # 4 are an epoch
        assert train.main([str(tiny_config), f"run.name=validated_{steps}", f"trainer.max_steps={steps}"]) == 0
        losses += re.findall(rf"done         step {steps}, val/loss ([0-9.]+)\n", capsys.readouterr().out)
    assert len(set(losses)) == 2
    assert train.main([str(tiny_config), "run.name=not", "trainer.max_steps=2", "trainer.limit_val_batches=0"]) == 0
    assert "done         step 2, not validated\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["optim.decay_steps=2"], "the learning rate is 0 from step 2 on, and the run has 4 steps"),
        (["optim.decay_steps=4"], None),
        (["optim.decay_steps=auto"], None),
        (["optim.decay_steps=2", "trainer.max_steps=2"], None),
        (["optim.decay_steps=2", "trainer.limit_train_batches=2"], None),
    ],
)
def test_a_decay_that_ends_before_the_run(
    settings: list[str], note: str | None, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tiny_config.parent / "runs" / "tiny" / "decay", ignore_errors=True)
    assert train.main([str(tiny_config), "run.name=decay", *settings]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "optim.decay_steps" in line]
    assert len(notes) == (note is not None) and (note or "") in "".join(notes)


def test_no_run_to_resume(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, str(tiny_config), "resume=auto", f"trainer.default_root_dir={tmp_path}")
    assert "resume=auto: there is no checkpoint under" in error


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["resume", "init_from"])
@pytest.mark.parametrize("kind", ["text", "truncated", "pickle", "torch_pickle", "other"])
def test_checkpoint_that_is_none(
    key: str, kind: str, tiny_config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, harm = tmp_path / "x.ckpt", tmp_path / "harm"
    match kind:
        case "text":
            path.write_text("no checkpoint")
        case "truncated":
            data = (trained / "checkpoints" / "last.ckpt").read_bytes()
            path.write_bytes(data[: len(data) // 2])
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(harm)))
        case "torch_pickle":
            torch.save({"state_dict": Evil(harm)}, path)
        case "other":
            torch.save({"state_dict": {}}, path)
    error = refused(capsys, str(tiny_config), f"{key}={path}", "run.name=bad_checkpoint")
    assert f"{path} is no checkpoint" in error
    assert not harm.exists()


def test_checkpoint_of_another_network(tiny_config: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "checkpoints" / "last.ckpt"
    error = refused(capsys, str(tiny_config), f"init_from={path}", "model.channels=16", "run.name=other_network")
    assert "does not fit the network" in error
    error = refused(capsys, str(tiny_config), f"resume={path}", "model.channels=16", "run.name=other_network")
    assert f"resume={path}: its training state is damaged or does not fit the settings" in error


def test_weights_that_overflow(
    tiny_config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    state["state_dict"] = {name: value * 1e30 for name, value in state["state_dict"].items()}
    torch.save(state, tmp_path / "large.ckpt")
    error = refused(capsys, str(tiny_config), f"init_from={tmp_path / 'large.ckpt'}", "run.name=overflows")
    assert "large.ckpt: the loss is not finite with its weights, before any training" in error


def test_help_lists_the_first_keys_and_help_all_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help-all"]) == 0
    text = capsys.readouterr().out
    keys = list(all_keys())
    assert len(keys) > 60
    assert [key for key in keys if f"\n  {key}=" not in text] == []
    assert "optim.lr=0.001\n      Learning rate after the warm-up. (number)" in text
    assert "run.name=null\n" in text
    assert train.main(["--help"]) == 0
    short = capsys.readouterr().out
    assert [key for key in keys if f"\n  {key}=" in short] == [key for key in keys if key in FIRST_KEYS]
    assert set(FIRST_KEYS) <= set(keys)


def test_print_config_can_be_read_again(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(tiny_config), "--print-config", "optim.lr=0.5"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(first)
    assert "\n  lr: 0.5\n" in first
    (tmp_path / "again.yaml").write_text(first.replace("sampling:\n", "sampling:\n  factor: 8\n"))
    assert train.main([str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr() == (
        first, "note         sampling.factor is no longer a setting and is ignored; use grid.factors\n"
    )  # fmt: skip


def test_first_lines(tiny_config: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(tiny_config), "run.name=first_lines"]) == 0
    out = capsys.readouterr().out
    folder = tiny_config.parent / "runs" / "tiny" / "first_lines"
    for line in (
        f"data         {images}: 18 images to train on, 3 to validate on, 8x8 px",
        "network      12,203 parameters",
        "devices      1 (cpu), global batch 4",
        f"run          {folder}",
        f"tensorboard  tensorboard --logdir {folder}",
    ):
        assert line in out


def test_run_folder_holds_the_config(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(trained / "config.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == (trained / "config.yaml").read_text()


def test_few_lines_of_the_progress_bar_go_to_a_file(
    train_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch of 60 steps is written a few times, not once per step."""
    train_run("progress", "trainer.enable_progress_bar=true", "data.batch_size=1", "data.epoch_images=60")
    said = capsys.readouterr()
    assert "60/60" in said.out + said.err
    assert 0 < (said.out + said.err).count("Epoch 0:") < 10
