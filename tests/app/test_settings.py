"""What is drawn for the page, and how a PNG gets its settings back."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import sample
from ilvr_lightning.app.models import Models
from ilvr_lightning.app.settings import Settings, make_requests, restore
from ilvr_lightning.app.studio import Drawn, Studio
from ilvr_lightning.errors import UserError
from tests.support.paths import ROOT

QUICK = Settings(preset="draft", factor=4, num_samples=2, further="--steps 3")


@pytest.fixture
def reference(images: Path) -> str:
    return str(images / "00.png")


def drawn(models: Models, reference: str, settings: Settings) -> Drawn:
    *_, last = Studio(models).draw("visitor", models.names[0], reference, settings)
    return last


def downloads(html: str) -> dict[str, bytes]:
    """The PNGs that a text offers, by their names."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)" download="([^"]+)"', html)
    return {name: base64.b64decode(data) for data, name in found}


def decoded(content: bytes) -> NDArray[np.float64]:
    """The values of a picture."""
    return np.asarray(Image.open(io.BytesIO(content)), float)


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        Settings(preset="paper", factor=2, let_go_at=5, seed=7, num_samples=1),
        Settings(preset="fast", factor=8, let_go_at=10, num_samples=1, further="--sampler ddim --eta 0.5"),
        Settings(preset="best", factor=4, num_samples=1, further="--steps 4 --exact-low-band --no-clip"),
        Settings(preset="draft", factor=4, num_samples=1, further="--steps 3 --range 20:5 --reference-sigma 0.1"),
        Settings(preset="draft", factor=2, num_samples=1, further="--steps 3 --octave-gains 1.1 --low-band-gain 2"),
        Settings(preset="draft", factor=2, num_samples=1, further="--steps 3 --fit pad"),
    ],
)
def test_a_png_restores_its_settings(settings: Settings, models: Models, reference: str, tmp_path: Path) -> None:
    html = drawn(models, reference, settings).html
    for name, content in downloads(html).items():
        path = tmp_path / name
        path.write_bytes(content)
        restored = restore(str(path), models, models.names[0], [str(tmp_path / "absent.png"), reference])
        assert restored is not None
        assert (restored.model, restored.reference) == (models.names[0], reference)
        assert "are the same" in restored.notes[0] and len(restored.notes) == 1
        again = drawn(models, reference, restored.settings).html
        assert np.abs(decoded(downloads(again)[name]) - decoded(content)).max() <= 2  # batches of other sizes
        model = models.load(models.names[0])
        first, second = (make_requests(model, reference, each)[0].recipe for each in (settings, restored.settings))
        assert first == second


def test_the_same_picture_is_made_by_sample_py(
    models: Models, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content = list(downloads(drawn(models, reference, QUICK).html).items())[1]
    (tmp_path / name).write_bytes(content)
    asked = ["--reproduce", tmp_path / name, "--ref", reference, "--ckpt", models.names[0], "--out", tmp_path / "out"]
    assert sample.main([str(word) for word in asked]) == 0
    assert "identical" in capsys.readouterr().out


def test_what_differs_is_said(models: Models, reference: str, images: Path, tmp_path: Path) -> None:
    (name, content), *_ = downloads(drawn(models, reference, QUICK).html).items()
    (tmp_path / name).write_bytes(content)
    others = Models(["toon64"], "cpu")
    restored = restore(str(tmp_path / name), others, "toon64", [str(images / "01.png")])
    assert restored is not None and (restored.model, restored.reference) == (None, None)
    said = " ".join(restored.notes)
    assert "model differs" in said and "reference differs: 00 is not here" in said
    assert restored.settings.factor == 4 and restored.settings.seed == 0


def test_a_plain_picture_restores_nothing(models: Models, reference: str) -> None:
    assert restore(reference, models, models.names[0], []) is None


@pytest.mark.parametrize(
    "further",
    ["--ckpt toon64", "--ref /etc/passwd", "--mask=/etc/passwd", "--out x", "--reproduce x", "-h", "--help", "'",
     "/etc", "--steps 0", "--steps all all", "--device cuda", "--batch-size 9999", "--num-samples 9999", "--sweep"],
)  # fmt: skip
def test_flags_that_the_page_does_not_take(further: str, models: Models, reference: str) -> None:
    with pytest.raises(UserError):
        drawn(models, reference, Settings(factor=4, further=further))


@pytest.mark.parametrize(
    "values",
    [("draft", "-h", 0, 0, 4, ""), ("draft", [4], 0, 0, 4, ""), ("draft", {}, 0, None, 4, ""), ("-h", 4, 0, 0, 4, ""),
     ("draft", float("inf"), 0, 0, 4, "")],
)  # fmt: skip
def test_values_of_another_kind(values: tuple[object, ...]) -> None:
    with pytest.raises(UserError):
        Settings.of_controls(*values)


@pytest.mark.parametrize(
    "settings",
    [Settings(factor=3), Settings(factor=4, num_samples=17), Settings(factor=4, seed=-1), Settings(let_go_at=26),
     Settings(factor=4, num_samples=16, further="--steps 25 --candidates 100"), Settings(factor=10**9)],
)  # fmt: skip
def test_settings_out_of_range(settings: Settings, models: Models, reference: str) -> None:
    with pytest.raises(UserError):
        drawn(models, reference, settings)


def test_x0_is_shown_while_it_is_drawn(models: Models, reference: str) -> None:
    frames = list(Studio(models).draw("visitor", models.names[0], reference, QUICK))
    assert len(frames) == 3
    assert [len(frame.samples) for frame in frames] == [0, 0, 2]
    assert [frame.html.count("download=") for frame in frames] == [0, 0, 2]
    assert len({frame.html for frame in frames}) == 3


def test_a_newer_request_stops_the_older_one_and_no_other_visitor(models: Models, reference: str) -> None:
    studio = Studio(models)

    def begin(visitor: str) -> Iterator[Drawn]:
        return studio.draw(visitor, models.names[0], reference, QUICK)

    older, other, newer = begin("a"), begin("b"), begin("a")
    for frames in (older, other, newer):
        next(frames)
    assert len(list(older)) == 0
    assert len(list(other)) == len(list(newer)) == 2


def test_the_sheet_has_each_factor_with_each_range(models: Models, reference: str) -> None:
    *_, first, last = ["", *Studio(models).sheet("visitor", models.names[0], reference, QUICK)]
    assert len(downloads(last)) == 4  # of 8 pixels: N=4 with four ranges
    assert [heading in last for heading in ("N=4", "followed to the end", "let go at 12")] == [True] * 3
    assert first == "" or len(downloads(first)) < 4


def test_names_are_escaped(models: Models, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    path.write_bytes((images / "00.png").read_bytes())
    html = drawn(models, str(path), QUICK).html
    assert "<img src=x" not in html and "&lt;img src=x" in html


def test_the_range_is_followed(models: Models, reference: str) -> None:
    """A reference that is let go of at once leaves the samples that no reference steers."""
    loose, close = (drawn(models, reference, Settings(factor=2, let_go_at=t, num_samples=1)) for t in (25, 0))
    assert close.reference is not None
    distance = [np.abs(np.asarray(each.samples[0], float) - close.reference).mean() for each in (loose, close)]
    assert distance[1] < distance[0]


def test_the_bundled_models_and_the_newest_run_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "data")
    assert Models([], "cpu").names == ["toon64", "animals64", "relief64"]


def test_a_checkpoint_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"x\.ckpt"):
        Models(["toon64", str(tmp_path / "x.ckpt")], "cpu")


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        (["--unconditional"], "It follows no reference"),
        (["--ref", "REFERENCE", "--factor", "4", "--image-size", "16"], "It has 16x16 pixels, and the page draws 8x8"),
    ],
)
def test_what_the_page_cannot_draw_is_said(
    argv: list[str], note: str, models: Models, reference: str, tmp_path: Path
) -> None:
    (name,) = models.names
    asked = [reference if word == "REFERENCE" else word for word in argv]
    settings = ["--ckpt", name, "--steps", "3", "--num-samples", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert sample.main([*asked, *settings]) == 0
    (png,) = tmp_path.glob("*_0.png")
    restored = restore(str(png), models, name, [reference])
    assert restored is not None
    said = " ".join(restored.notes)
    assert note in said and "sample.py --reproduce" in said and "are the same" not in said
