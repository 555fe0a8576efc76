"""The grids that a run ends with."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageFont

from ilvr_lightning.sampling import grids
from ilvr_lightning.sampling.folder import SampleFolder
from ilvr_lightning.sampling.requests import SampleRequest
from tests.support.samples import listed, pixels

Run = Callable[..., Path]
TILE, GAP, MARGIN, HEADER = 96, 2, 12, 44
"""Sizes in a grid of 8 px images, each enlarged to 96 px."""


def tile(grid: Path, left: int, top: int = HEADER) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The 8 px image that a tile of a grid shows."""
    return pixels(grid)[top : top + TILE, left : left + TILE][::12, ::12]


def test_a_grid_shows_the_samples(run: Run, references: Path) -> None:
    out = run("--ref", references / "a.png", "--factor", 2, 4, "--num-samples", 2)
    left = MARGIN + TILE + MARGIN
    group = 3 * TILE + 2 * GAP + MARGIN
    for column, name in ((98, "a_N2_0"), (196, "a_N2_1"), (group + 98, "a_N4_0"), (group + 196, "a_N4_1")):
        assert (tile(out / "a_grid.png", left + column) == pixels(out / f"{name}.png")).all(), name


def test_a_sweep_of_ranges_is_one_grid(run: Run, references: Path) -> None:
    """References down, settings across: the low-pass image of each factor, then a column per range."""
    out = run("--ref", references / "a.png", references / "b.png", "--factor", 2, 4, "--range", "25:0", "25:12",
              "--num-samples", 1)  # fmt: skip
    for column, settings in enumerate(("", "N2_t25-0", "N2_t25-12", "", "N4_t25-0", "N4_t25-12")):
        for row, name in enumerate("ab"):
            left = MARGIN + TILE + MARGIN + column * (TILE + MARGIN)
            found = tile(out / "grid.png", left, HEADER + row * (TILE + GAP))
            same = settings != "" and (found == pixels(out / f"{name}_{settings}_0.png")).all()
            assert same == (settings != ""), (name, settings)
    left = 2 * (MARGIN + TILE) + MARGIN  # the grid of one reference: factors down, ranges across
    left += max(0, math.ceil(ImageFont.load_default(14).getlength("low-pass, N=2, 4")) - TILE)
    for column, span in enumerate(("25-0", "25-12")):
        for row, factor in enumerate((2, 4)):
            found = tile(out / "b_grid.png", left + column * (TILE + MARGIN), HEADER + row * (TILE + GAP))
            assert (found == pixels(out / f"b_N{factor}_t{span}_0.png")).all(), (factor, span)


def test_unconditional_images_in_rows(run: Run) -> None:
    out = run("--unconditional", "--num-samples", 9)
    assert [p.name for p in out.glob("*grid*")] == ["unconditional_grid.png"]
    places = [(k, 0) for k in range(8)] + [(0, 1)]
    for k, (column, row) in enumerate(places):
        found = tile(out / "unconditional_grid.png", MARGIN + column * (TILE + GAP), HEADER + row * (TILE + GAP))
        assert (found == pixels(out / f"unconditional_{k}.png")).all(), k


def test_a_grid_of_other_images_is_not_overwritten(run: Run, references: Path) -> None:
    asked = ("--ref", references / "a.png", "--factor", 2, "--num-samples", 1)
    out = run(*asked)
    first = (out / "a_grid.png").read_bytes()
    run(*asked)
    assert [p.name for p in out.glob("*grid*")] == ["a_grid.png"]
    run(*asked, "--seed", 1)
    assert len(list(out.glob("a_grid_????????.png"))) == 1
    assert (out / "a_grid.png").read_bytes() == first
    run(*asked, "--seed", 2, "--overwrite")
    assert len(list(out.glob("*grid*"))) == 2
    assert (out / "a_grid.png").read_bytes() != first


def test_the_last_line_names_the_grid(run: Run, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 1)
    assert capsys.readouterr().out.endswith(f"images       in {out}; grid {out / 'grid.png'}\n")


def test_a_grid_of_missing_images_is_not_drawn(run: Run, references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SampleFolder.write

    def losing(self: SampleFolder, request: SampleRequest, *rest: Any) -> Path:
        path = write(self, request, *rest)
        if request.index == 3:
            path.unlink()
        return path

    monkeypatch.setattr(SampleFolder, "write", losing)
    asked = ("--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 2)
    out = run(*asked, status=1)
    assert [p.name for p in out.glob("*grid*")] == ["a_grid.png"]


@pytest.mark.parametrize(("name", "drawn"), [("MAX_ROWS", {"a_grid.png", "b_grid.png"}), ("MAX_IMAGES", set())])
def test_large_grids_are_not_drawn(
    name: str, drawn: set[str], run: Run, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, name, 1)
    out = run("--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 2)
    assert {p.name for p in out.glob("*grid*")} == drawn


def test_none_is_drawn_of_many_references(
    run: Run, references: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ilvr_lightning.data.references.EAGER_LIMIT", 1)
    out = run("--ref", references / "a.png", references / "b.png", "--factor", 2, "--num-samples", 1)
    assert len(listed(out)) == 2
    assert not list(out.glob("*grid*"))
    assert capsys.readouterr().out.endswith(f"images       in {out}\n")
