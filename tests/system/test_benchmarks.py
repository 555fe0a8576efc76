"""The benchmarks run, and their tables have what they say; what they measure is tested where it is defined."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import fidelity, filters, mixture, posterior, rivals, side_by_side, speed, trained, training_settings
from benchmarks.attributes import Attributes
from benchmarks.features import WIDTH, Features, features_of, load_features
from benchmarks.fidelity import distances, images_of
from benchmarks.training_settings import LOG_SNR, bound
from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.data.datamodule import ImageDataModule
from ilvr_lightning.data.images import read_image
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.metrics.neighbours import copies
from ilvr_lightning.models.config import UNetConfig


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
    assert float(same["FD"]) == pytest.approx(0, abs=0.01)
    assert (same["energy"], same["low"], same["worst"]) == ("1.00", "0.0000", "1.00")
    made = dict(zip(columns, rows["draft"], strict=True))
    assert all("±" in made[name] for name in ("FD", "high", "energy", "low"))
    assert float(made["diversity"]) > 0
    assert float(made["s per image"]) > 0
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
    extract = load_features(features)
    x = 2 * torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(0)) - 1
    found = features_of(extract, x)
    assert found.shape == (3, WIDTH)
    assert torch.equal(found, features_of(load_features(features), x))
    assert Features(4).classify(x).shape == (3, 4)
    assert features_of(extract, x[:, :1, :16, :16]).shape == (3, WIDTH)  # greyscale, of another size
    assert features_of(load_features("pixels"), x).shape == (3, 3 * 32 * 32)


def test_table_of_filters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments(monkeypatch)
    filters.main()
    out = capsys.readouterr().out
    assert "| cubic, orthogonal | 0 | 0.079 | 0.071 | 0.052 | 0.017 |" in out
    assert "| ideal | 0 | 0 | 0 | 0 | 0 |" in out


def tables(out: str) -> list[list[list[str]]]:
    """The cells of each table, its header first."""
    rows = [[cell.strip() for cell in line.split("|")][1:-1] for line in out.splitlines() if line.startswith("|")]
    starts = [i for i, row in enumerate(rows) if row[0] == "sampler"]
    return [[rows[a], *rows[a + 2 : b]] for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]


def test_table_of_rivals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mixture, "CALIBRATION_IMAGES", 20)
    arguments(monkeypatch, "--data", "gaussian", "six", "mcgdiff8", "--samples", 20, "--references", 2,
              "--only", "exact*", "draft", "DDNM, 20 steps", "PiGDM, 10 *", "TDS, 4 particles, 20*")  # fmt: skip
    rivals.main()
    found = tables(capsys.readouterr().out)
    assert [header[2] for header, *_ in found] == [
        "W2² / variance, N=4", "total variation, N=4", "total variation, 1 dim.",
    ]  # fmt: skip
    for header, *rows in found:
        costs = {row[0]: int(row[1]) for row in rows}
        assert costs == {
            "exact draws (floor)": 0, "draft": 10, "DDNM, 20 steps": 20, "PiGDM, 10 steps": 30,
            "TDS, 4 particles, 20 steps": 232,
        }  # fmt: skip
        assert list(costs.values()) == sorted(costs.values())
        assert all(len(row) == len(header) for row in rows)
        assert all(math.isfinite(float(cell.split()[0])) for row in rows for cell in row[2:])


def test_table_of_rivals_on_a_trained_network(
    trained_run: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments(monkeypatch, "--data", "toon64", "--ckpt", trained_run, "--ref", *sorted(images.glob("*.png"))[:3],
              "--train", images, "--factor", 2, "--only", "draft", "JFPS, 20*", "PiGDM, 10 *", "MMPS, 1*")  # fmt: skip
    rivals.main()
    (table,) = tables(capsys.readouterr().out)
    header, *rows = table
    assert header == ["sampler", "evaluations", "energy score, N=2", "Fréchet distance, N=2", "energy, N=2",
                      "low-band error, N=2"]  # fmt: skip
    assert [row[1] for row in rows] == ["10", "20", "30", "100"]
    assert all(math.isfinite(float(cell.split()[0])) for row in rows for cell in row[2:])


def test_nearest_training_image_is_found_mirrored_too() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(20, 3, 8, 8, generator=generator) * 2 - 1
    x = torch.stack([train[3].flip(-1) + 0.1, torch.rand(3, 8, 8, generator=generator) * 2 - 1])
    first, second = distances(x, train).tolist()
    assert first == pytest.approx(0.1, abs=1e-4)
    assert second > 0.5


def test_ten_planted_copies_are_found() -> None:
    data = ImageDataModule(path="data/toon", image_size=32)
    data.setup()
    assert data.train is not None and data.validation is not None
    train, y = images_of(data.train, 1500), images_of(data.validation, 400)
    x, planted = y.clone(), slice(30, 40)
    noise = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[planted] = train[700:710].flip(-1) + 0.05 * noise  # as a network would remember them
    found = copies(distances(x, train), distances(y, train))
    assert bool(found[planted].all())
    assert int(found.sum()) <= 10 + 4  # 1% of the others


def test_bound_of_a_perfect_denoiser_is_nothing_and_of_a_blind_one_is_not() -> None:
    """0 where x_0 is known at every level; where it is taken for 0, half the integral of the SNR times E|x_0|^2."""
    x0 = torch.full((4, 1, 2, 2), 0.5)
    schedule = NoiseSchedule.cosine(1000)
    known = bound(lambda x, t: Prediction(x0=x0, eps=x), schedule, x0)
    blind = bound(lambda x, t: Prediction(x0=torch.zeros_like(x), eps=x), schedule, x0)
    assert known == 0
    level = torch.linspace(-LOG_SNR, LOG_SNR, 100_000, dtype=torch.float64)
    exact = 0.5 * 0.25 * float(torch.trapezoid(level.exp(), level)) / math.log(2)
    assert blind == pytest.approx(exact, rel=0.2)


def test_table_of_training_settings(
    tiny_config: Path, features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments(monkeypatch, tiny_config, "--seconds", 0.05, "--features", features, "--images", 3, "--variant", "eps",
              "--variant", "v", "diffusion.prediction=v")  # fmt: skip
    training_settings.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["variant", "---", "eps", "v"]
    for line in lines[2:]:
        steps, images_seen = (int(cell.replace(",", "")) for cell in line.split("|")[3:5])
        assert images_seen == 4 * steps > 0
        assert float(line.split("|")[5]) > 0


def test_table_of_fidelity(
    trained_run: Path, images: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for split, files in (("train", sorted(images.iterdir())[:12]), ("test", sorted(images.iterdir())[12:])):
        for file in files:
            (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "set" / split)
    arguments(monkeypatch, "--ckpt", trained_run, "--data", tmp_path / "set", "--features", features, "--factor", 2)
    fidelity.main()
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")][2:-1]
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")}  # fmt: skip
    assert list(rows) == ["", "---", "training images", "unconditional", "N=2", "held-out images"]
    assert abs(float(rows["held-out images"][1])) < 0.01
    assert set(rows["held-out images"][2].split()) == {"1.00"}


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """A set of dark and bright pictures, which is its attribute."""
    random = np.random.default_rng(0)
    codes: dict[str, dict[str, list[int]]] = {}
    for split, count in (("train", 60), ("test", 8)):
        codes[split] = {"shade": random.integers(0, 2, count).tolist()}
        (tmp_path / "shades" / split).mkdir(parents=True)
        for number, bright in enumerate(codes[split]["shade"]):
            pixels = random.integers(170 if bright else 0, 256 if bright else 86, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "shades" / split / f"{number:03}.png")
    content = {"shapes": {"shade": ["dark", "bright"]}, **codes}
    (tmp_path / "shades" / "attributes.json").write_text(json.dumps(content))
    return tmp_path / "shades"


def test_table_of_the_posterior(
    trained_run: Path, shades: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(*options: object) -> dict[str, dict[str, str]]:
        arguments(monkeypatch, "--ckpt", trained_run, "--data", shades, "--out", tmp_path / "out", "--factor", 2,
                  "--first", 1, "--samples", 3, "--batch-size", 4, *options)  # fmt: skip
        posterior.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        header, _, *rows = ([cell.strip() for cell in line.split("|")][1:-1] for line in lines)
        return {row[0]: dict(zip(header, row, strict=True)) for row in rows}

    names = ["draft", "unconditional, 2M 10", "training images"]
    found = table("--references", 5, "--only", *names, "--epochs", 20)
    assert list(found) == names
    assert all(row["references"] == "5" for row in found.values())
    draft = found["draft"]
    stored = torch.load(tmp_path / "out" / "draft-N2-K3.pt", weights_only=True)["images"]
    assert stored.shape == (15, 3, 8, 8)

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("samples are made again")

    with monkeypatch.context() as patch:
        patch.setattr(posterior, "generate", refuse)
        assert table("--references", 5, "--only", "draft") == {"draft": draft}
        assert table("--references", 7, "--only", "draft", "fast", "--cached", "--scalars") == {"draft": draft}
    longer = table("--references", 7, "--only", "draft")["draft"]
    assert longer["references"] == "7"
    assert torch.equal(torch.load(tmp_path / "out" / "draft-N2-K3.pt", weights_only=True)["images"][:15], stored)
    with pytest.raises(UserError, match="another --out"):
        table("--references", 5, "--only", "draft", "--precision", "bf16")


def test_posterior_is_for_powers_of_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments(monkeypatch, "--ckpt", "none", "--data", tmp_path, "--out", tmp_path, "--factor", 8, 6)
    with pytest.raises(UserError, match="powers of two from 2: got 6"):
        posterior.main()


def test_posterior_needs_attributes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no attributes\.json"):
        Attributes.read(tmp_path)


def test_rows_of_the_posterior_have_what_the_checkpoint_holds(trained_run: Path) -> None:
    loaded = load_denoiser(trained_run, say=None)
    table = posterior.rows(loaded, 2)
    assert set(posterior.DEFAULT_ROWS) < set(table)
    assert not any("1000" in name for name in posterior.DEFAULT_ROWS)
    for name, source in table.items():
        if source.plan is None:
            assert name == posterior.TRAINING_IMAGES
        elif name.rpartition(" ")[2].isdigit():
            assert source.plan.num_steps == int(name.rpartition(" ")[2])
    for name in ("draft", "fast", "best"):
        assert table[name].plan == loaded.preset(name, 2)
        assert table[name].conditional


def test_table_of_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = speed.Subject(
        config=UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()),
        size=8, sampling_batch=(2, 2), training_batch=(2, 2),
    )  # fmt: skip
    monkeypatch.setattr(speed, "subjects", lambda: {"small": small})
    arguments(monkeypatch, "--device", "cpu", "--repeats", 1, "--json", tmp_path / "speed.json",
              "--only", "sampling", "training")  # fmt: skip
    speed.main()
    figures = json.loads((tmp_path / "speed.json").read_text())
    rows = [(f["kind"], f["row"]) for f in figures if "row" in f]
    assert rows == [(kind, row) for kind in ("sampling", "training") for row in ("float32", "bf16")]
    assert all(f["ms"] > 0 and f["first"] > 0 for f in figures if "ms" in f)
    assert "| float32 |" in capsys.readouterr().out
