"""Which rows of a matrix run by default; the others are marked slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(by_default: Callable[..., bool], rows: Iterable[Any]) -> list[Any]:
    """The same rows, marked slow where ``by_default`` says no of their values."""
    marked = []
    for row in rows:
        values = row if isinstance(row, tuple) else (row,)
        marks = () if by_default(*values) else (pytest.mark.slow,)
        marked.append(pytest.param(*values, marks=marks))
    return marked
