"""The museum's exhibits still fit the code; `make museum` runs them."""

import pytest

from ilvr_lightning.diffusion.noise import PerImageNoise
from tests.museum.__main__ import FEWEST
from tests.museum.exhibits import EXHIBITS, Edit, Exhibit
from tests.museum.mutation import find, mutated, mutated_code


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_exhibit_fits_the_code(exhibit: Exhibit) -> None:
    for edit in exhibit.edits:
        function = find(edit.function)
        assert mutated_code(function, edit).co_code != function.__code__.co_code or edit.old != edit.new


def test_there_are_enough_exhibits_each_once() -> None:
    assert len({exhibit.name for exhibit in EXHIBITS}) == len(EXHIBITS) >= FEWEST


def test_mutation_is_undone_and_reaches_every_holder() -> None:
    edit = Edit(
        function="ilvr_lightning.diffusion.noise:PerImageNoise.__init__",
        old="self.seeds = list(seeds)",
        new="self.seeds = [7 for seed in seeds]",
    )
    with pytest.raises(ZeroDivisionError), mutated([edit]):
        assert PerImageNoise([1, 2]).seeds == [7, 7]
        raise ZeroDivisionError
    assert PerImageNoise([1, 2]).seeds == [1, 2]


def test_code_that_has_moved_on_is_noticed() -> None:
    edit = Edit(function="ilvr_lightning.diffusion.noise:derive_seed", old="no such text", new="")
    with pytest.raises(LookupError, match="0 times"), mutated([edit]):
        pass
