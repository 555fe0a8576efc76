"""The benchmarks run, and their tables have what they say; what they measure is tested where it is defined."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import filters, side_by_side, trained
from benchmarks.features import WIDTH, Features, features_of, load_features
from ilvr_lightning.images import read_image
from ilvr_lightning.pretrained.load import load_denoiser


@pytest.fixture
def features(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Features(4).state_dict(), tmp_path / "features.pt")
    return tmp_path / "features.pt"


def arguments(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, argv)])


def test_table_of_a_trained_network(
    trained_run: Path, images: Path, features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments(monkeypatch, "--ckpt", trained_run, "--ref", images, "--real", images, "--features", features,
              "--factor", 2, "--seeds", 2, "--only", "draft", "DDPM as the paper, 1?")  # fmt: skip
    trained.main()
    lines = capsys.readouterr().out.splitlines()
    header, _, real, paper, draft = lines[lines.index("N=2, 21 references, 2 seeds") + 1 :]
    columns = [cell.strip() for cell in header.split("|")][1:-1]
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")][1:-1] for line in (real, paper, draft)}
    assert list(rows) == ["other real images", "DDPM as the paper, 10", "draft"]
    same = dict(zip(columns, rows["other real images"], strict=True))
    assert float(same["FID"]) == pytest.approx(0, abs=0.01)
    assert (same["energy"], same["low"], same["largest"]) == ("1.00", "0.0000", "1.0")
    made = dict(zip(columns, rows["draft"], strict=True))
    assert all("±" in made[name] for name in ("FID", "high", "energy", "low"))
    assert float(made["diversity"]) > 0
    assert float(made["s a picture"]) > 0
    assert len(made["spectrum"].split()) == 2  # two octaves at 8 px


@pytest.fixture
def trained_run(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


def test_rows_are_plans_of_their_names(trained_run: Path) -> None:
    table = trained.rows(load_denoiser(trained_run, say=None), 4)
    assert len(table) > 40
    for name, plan in table.items():
        assert plan.factor == 4
        if "," in name:
            assert plan.num_steps == int(name.rpartition(",")[2])
        if "eta 0.5" in name:
            assert plan.eta == 0.5
        assert ("kappa" in name) == (plan.eps_extrapolation > 0)
        assert ("fixed" in name) == (plan.reference_noise == "fixed")


def test_side_by_side(trained_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = tmp_path / "sheet.png"
    arguments(monkeypatch, "--ckpt", trained_run, "--ref", *sorted(images.glob("*.png"))[:2], "--out", sheet,
              "--factor", 2, "--rows", "draft", "2M, eta ?, 10", "--tile", 32)  # fmt: skip
    side_by_side.main()
    width, height = read_image(sheet).size
    assert width >= 4 * 32
    assert height >= 2 * 32


def test_features_are_the_same_again(features: Path) -> None:
    network = load_features(features)
    x = 2 * torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(0)) - 1
    found = features_of(network, x)
    assert found.shape == (3, WIDTH)
    assert torch.equal(found, features_of(load_features(features), x))
    assert network.classify(x).shape == (3, 4)
    assert features_of(network, x[:, :1, :16, :16]).shape == (3, WIDTH)  # greyscale, of another size


def test_table_of_filters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments(monkeypatch)
    filters.main()
    out = capsys.readouterr().out
    assert "| cubic, orthogonal | 0 | 0.079 | 0.071 | 0.052 | 0.017 |" in out
    assert "| ideal | 0 | 0 | 0 | 0 | 0 |" in out
