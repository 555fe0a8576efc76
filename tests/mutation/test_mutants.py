"""The mutants still fit the code; `make mutants` runs them."""

import pytest

from ilvr_lightning.diffusion.noise import PerImageNoise
from tests.mutation.__main__ import FEWEST
from tests.mutation.mutants import MUTANTS, Edit, Mutant
from tests.mutation.mutation import find, mutated, mutated_code


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_fits_the_code(mutant: Mutant) -> None:
    for edit in mutant.edits:
        function = find(edit.function)
        assert mutated_code(function, edit).co_code != function.__code__.co_code or edit.old != edit.new


def test_there_are_enough_and_each_once() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= FEWEST


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
