"""The command: python -m ilvr_lightning.checkpoints inspect | export."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ilvr_lightning.checkpoints.__main__ import main
from ilvr_lightning.checkpoints.families import FAMILIES
from ilvr_lightning.checkpoints.load import load_denoiser
from tests.support import cli, golden
from tests.support.checkpoints import (
    PLAIN,
    adm_file,
    assert_same_weights,
    inputs,
    own_checkpoint,
    own_content,
    random_unet,
    save_folder,
)
from tests.support.paths import ROOT


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own_checkpoint(tmp_path))]) == 0
    said = capsys.readouterr().out
    for fact in ("ilvr_lightning checkpoint, 3x16x16", "channel_mult=1,2", "linear, T=1000, predicts eps",
                 "EMA          yes", "step         1234", "best val/loss 0.125"):  # fmt: skip
        assert fact in said
    assert main(["inspect", str(adm_file(tmp_path)), "--override", "num_heads=2"]) == 0
    said = capsys.readouterr().out
    state = golden.filled_state("ilvr")
    assert f"parameters   {sum(v.numel() for v in state.values()):,}" in said
    assert "EMA          the file does not say" in said and "num_head_channels=-1 num_heads=2" in said
    content = own_content()
    del content["current_model_state"]
    torch.save(content, tmp_path / "last.ckpt")
    assert main(["inspect", str(tmp_path / "last.ckpt")]) == 0
    assert "EMA          no" in capsys.readouterr().out


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no checkpoint" in cli.refused(main, capsys, "inspect", tmp_path / "missing")
    path = adm_file(tmp_path)
    assert "did you mean num_heads?" in cli.refused(main, capsys, "inspect", path, "--override", "num_head=2")
    assert "give KEY=VALUE" in cli.refused(main, capsys, "inspect", path, "--override", "num_heads")
    folder = save_folder(tmp_path / "d", random_unet(PLAIN))
    (folder / "unet" / "config.json").write_text("{")
    assert "config.json cannot be read" in cli.refused(main, capsys, "inspect", folder)


def test_export_of_raw_weights_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = own_checkpoint(tmp_path), tmp_path / "raw.safetensors"
    assert main(["export", str(path), "--to", "safetensors", str(out), "--weights", "raw"]) == 0
    assert f"wrote        {out}" in capsys.readouterr().out
    assert_same_weights(load_denoiser(path, "raw", say=None), load_denoiser(out, say=None))


def test_a_folder_of_safetensors_holds_the_weights_alone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["export", str(own_checkpoint(tmp_path)), "--to", "safetensors", str(out), "--half"]) == 0
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_an_adm_file_says_what_it_must_be_read_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = own_checkpoint(tmp_path), tmp_path / "a.pt"
    assert main(["export", str(path), "--to", "adm", str(out)]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note == "note         read it with --override image_size=16 --override num_head_channels=32"
    again = tmp_path / "b.safetensors"
    flags = note.split("read it with ")[1].split()
    assert main(["export", str(out), "--to", "safetensors", str(again), *flags]) == 0
    x, t = inputs((3, 16, 16))
    with torch.no_grad():
        a, b = (load_denoiser(p, say=None).network(x, t) for p in (path, again))
    assert torch.equal(a, b)


def test_exports_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_checkpoint(tmp_path)
    assert "invalid choice: 'onnx'" in cli.refused(main, capsys, "export", path, "--to", "onnx", tmp_path / "x")
    assert "--to" in cli.refused(main, capsys, "export", path, tmp_path / "x")
    assert "already exists" in cli.refused(main, capsys, "export", path, "--to", "adm", path)
    calibrated = ("export", path, "--to", "adm", tmp_path / "x.pt", "--calibrate", "images")
    assert "--calibrate needs --to safetensors, because adm cannot hold what is calibrated" in cli.refused(
        main, capsys, *calibrated
    )
    nothing = ("export", path, "--to", "safetensors", tmp_path / "x", "--calibrate", tmp_path / "none")
    assert "--calibrate" in cli.refused(main, capsys, *nothing)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_help_lists_what_loads_and_what_is_written(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    said = said.replace("guided- diffusion", "guided-diffusion")  # argparse breaks lines there
    for family in FAMILIES.values():
        assert family.loads in said
        if command == "export" and family.export_name is not None:
            assert f"{family.export_name}: {family.writes}" in said


HELP = """
import sys
from ilvr_lightning.checkpoints.__main__ import main
try:
    main(["export", "--help"])
finally:
    loaded = {"torch", "lightning", "datasets"} & set(sys.modules)
    assert not loaded, loaded
"""


def test_help_does_not_wait_for_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
