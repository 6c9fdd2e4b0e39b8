"""Checks of arguments: one line that names the argument, its value and what would be right."""

from __future__ import annotations

import math
import operator

from rope_export.errors import BadInputError


def finite_number(name: str, value: object, *, at_least: float | None = None) -> float:
    """Return ``value`` as a float.

    Raises:
        BadInputError: it is not a finite number, or not above zero, or below ``at_least``.
    """
    limit = "above 0" if at_least is None else f"of at least {at_least:g}"
    error = BadInputError(f"{name} must be a finite number {limit}, got {value!r}")
    if isinstance(value, bool | str | bytes) or value is None:
        raise error
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise error from None
    if not math.isfinite(number) or (number <= 0 if at_least is None else number < at_least):
        raise error
    return number


def positive_integer(name: str, value: object, *, even: bool = False) -> int:
    """Return ``value``, Python's or NumPy's, as an int.

    Raises:
        BadInputError: it is not an integer above zero, or not ``even``.
    """
    wanted = "a positive even integer" if even else "an integer above 0"
    error = BadInputError(f"{name} must be {wanted}, got {value!r}")
    if isinstance(value, bool):
        raise error
    try:
        integer = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise error from None
    if integer < 1 or (even and integer % 2):
        raise error
    return integer
