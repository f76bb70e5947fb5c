"""Which cells of a test's grid run each time? A few in `make test`; the others, marked exhaustive, in `make test-all`."""

from collections.abc import Iterable

import pytest


def grid(cells: Iterable, quick: Iterable) -> list:
    """The cells for `pytest.mark.parametrize`; those that are not among `quick`, which must be cells, are exhaustive.

    A tuple holds the values of several arguments.
    """
    cells, quick = list(cells), list(quick)
    assert all(cell in cells for cell in quick), f"{quick} are not all among {cells}"
    values = [cell if isinstance(cell, tuple) else (cell,) for cell in cells]
    marks = [() if cell in quick else pytest.mark.exhaustive for cell in cells]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
