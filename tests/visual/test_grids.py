"""Labelled grids of images."""

from typing import Any

import numpy as np
import pytest

from ilvr_lightning.visual.grids import Column, draw_grid


@pytest.mark.parametrize("side", [1, 8, 200])
def test_grid_tiles_are_where_they_should_be(side: int) -> None:
    def tile(*colour: int) -> Any:
        return np.full((side, side, 3), colour, dtype=np.uint8)

    colours = [[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(9, 9, 9), (90, 90, 9), (9, 90, 90)]]
    columns = [
        Column(label="reference", rows=[[tile(*row[0])] for row in colours]),
        Column(label="a label that is far too long for the tiles under it " * 3, rows=[[tile(*c) for c in row[1:]]
                                                                                      for row in colours]),
    ]  # fmt: skip
    grid = draw_grid(columns, "title")
    edge = side * max(1, -(-96 // side))  # enlarged by a whole number
    lefts = [12, 12 + edge + 12, 12 + edge + 12 + edge + 2]
    for i, row in enumerate(colours):
        top = 44 + i * (edge + 2)
        for left, colour in zip(lefts, row, strict=True):
            corners = [(left, top), (left + edge - 1, top + edge - 1)]
            assert [grid.getpixel(corner) for corner in corners] == [colour, colour]
    assert np.asarray(grid)[:44].min() < 128  # something is written
    assert np.asarray(grid)[44:, :12].min() == 255
    assert grid.getpixel((lefts[1] - 6, 60)) == (255, 255, 255)


def test_grid_of_greyscale_tiles() -> None:
    grid = draw_grid([Column(label="x", rows=[[np.full((8, 8, 1), 70, dtype=np.uint8)]])], "title")
    assert grid.getpixel((20, 60)) == (70, 70, 70)
