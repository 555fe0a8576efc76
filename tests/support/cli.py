"""What the tests of the command lines share."""

import warnings
from collections.abc import Callable, Sequence

import pytest


def refused(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on standard error of a command that ends with status 2."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        status = main(list(map(str, argv)))
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error
