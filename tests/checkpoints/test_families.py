"""The registry: a family is one object; loading, refusals, help and export know it from there alone."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ilvr_lightning.checkpoints.__main__ import main
from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.checkpoints.families import FAMILIES, export_formats
from ilvr_lightning.checkpoints.families.family import Family, FileContent, ParameterNames, StateDict, TensorDict
from ilvr_lightning.checkpoints.load import identify, load_denoiser
from ilvr_lightning.config.schema import DiffusionConfig
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig
from tests.support import cli
from tests.support.checkpoints import SMALL, adm_file, own_checkpoint, own_content, refused


class Dummy(Family):
    """A family whose names are UNet's in capitals, and whose folder says how many timesteps there are."""

    name = "dummy"
    loads = "a dummy folder, as nobody has one"
    overridable: Mapping[str, type] = {"num_head_channels": int}
    export_name = "dummies"
    writes = "a folder of capitals"

    def recognises(self, state: StateDict) -> bool:
        return "OUT.WEIGHT" in state.tensors

    def describe(self, state: StateDict, overrides: Overrides) -> ModelDescription:
        settings = json.loads((state.path.parent / "dummy.json").read_text())
        heads = overrides.get("num_head_channels", 32, "a guess")
        diffusion = DiffusionConfig(schedule="cosine", num_timesteps=settings["T"], prediction="eps")
        return ModelDescription(
            kind="dummy folder", model=replace(SMALL, num_head_channels=heads), image_shape=(3, 16, 16),
            diffusion=diffusion, assumed=tuple(overrides.assumed),
        )  # fmt: skip

    def names(self, parameters: Iterable[str], config: UNetConfig, in_file: Collection[str] = ()) -> ParameterNames:
        return {name: (name.upper(),) for name in parameters}

    def weights_in(self, folder: Path) -> Path | None:
        return folder / "dummy.pt" if (folder / "dummy.pt").is_file() else None

    def settings_files(self, path: Path) -> tuple[Path, ...]:
        return (path.parent / "dummy.json",)

    def exported_files(self, description: ModelDescription, weights: TensorDict, out: Path) -> dict[Path, FileContent]:
        if description.image_shape[1] != 16:
            raise UserError("dummies are 16 px")
        state = {name.upper(): value for name, value in weights.items()}
        return {out / "dummy.pt": (state, {}), out / "dummy.json": json.dumps({"T": description.diffusion.T})}

    def overrides_for(self, description: ModelDescription, weights: TensorDict) -> dict[str, Any]:
        return {"voice": "loud"}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "dummy", Dummy())


def test_it_is_exported_recognised_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = own_checkpoint(tmp_path), tmp_path / "out"
    assert main(["export", str(path), "--to", "dummies", str(out)]) == 0
    assert "note         read it with --override voice=loud" in capsys.readouterr().out
    loaded = load_denoiser(out, say=None)
    assert torch.equal(loaded.network.norm.weight, own_content()["state_dict"]["network.norm.weight"])
    assert loaded.schedule.num_timesteps == 1000 and loaded.image_shape == (3, 16, 16)
    assert identify(out / "dummy.pt").description.kind == "dummy folder"
    assert main(["inspect", str(out)]) == 0
    assert "num_head_channels=32 (a guess)" in capsys.readouterr().out
    before = loaded.found.sha256
    (out / "dummy.json").write_text('{"T": 100}')
    assert identify(out).sha256 != before and identify(out).description.diffusion.T == 100


def test_it_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "a dummy folder, as nobody has one" in " ".join(capsys.readouterr().out.split())
    assert "a dummy folder" in refused(tmp_path)
    assert "dummies" in cli.refused(main, capsys, "export", tmp_path, "--to", "x", tmp_path / "y")
    assert list(export_formats()) == ["safetensors", "adm", "diffusers", "dummies"]


def test_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = adm_file(tmp_path)
    error = cli.refused(main, capsys, "export", path, "--to", "dummies", out)
    assert "--to dummies: dummies are 16 px; --to safetensors holds everything" in error
    assert main(["export", str(own_checkpoint(tmp_path)), "--to", "dummies", str(out)]) == 0
    assert "override heads: a checkpoint of dummy has no such override" in refused(out, overrides={"heads": 3})
    (out / "dummy.json").write_text("{")
    assert f"{out}/dummy.pt describes no network that loads: Expecting" in refused(out)
