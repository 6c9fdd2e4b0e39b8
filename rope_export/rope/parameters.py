"""`Parameters`: a Hugging Face ``rope_parameters`` object while it is read, every field checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rope_export.checks import finite_number
from rope_export.errors import BadInputError


class Parameters:
    """A ``rope_parameters`` object while it is read: every field checked, none left over."""

    def __init__(self, content: Mapping[str, Any], rope_type: str) -> None:
        self.rope_type = rope_type
        self._content = dict(content)
        self._read: set[str] = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

    def number(
        self, name: str, default: float | None = None, *, at_least: float | None = None
    ) -> float:
        """A finite number, above zero or ``at_least`` the limit; required without a default."""
        value = self._content.get(name)
        self._read.add(name)
        if value is None:
            if default is None:
                raise BadInputError(f"scaling of rope_type {self.rope_type!r} needs {name!r}")
            return default
        return finite_number(f"scaling[{name!r}]", value, at_least=at_least)

    def optional(self, name: str, *, at_least: float | None = None) -> float | None:
        """A number as `number` has it, or None."""
        self._read.add(name)
        return None if self._content.get(name) is None else self.number(name, at_least=at_least)

    def factors(self, name: str, count: int) -> Tensor:
        """As many numbers above zero as there are pairs, as float64."""
        values = self._content.get(name)
        self._read.add(name)
        if values is None:
            raise BadInputError(f"scaling of rope_type {self.rope_type!r} needs {name!r}")
        if not isinstance(values, list | tuple) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, list | tuple) else repr(values)
            raise BadInputError(f"scaling[{name!r}] must list {count} numbers, got {got}")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise BadInputError(f"scaling[{name!r}] must list numbers above 0, got {value!r}")
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def whole_numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of integers above zero, or None."""
        values = self._content.get(name)
        self._read.add(name)
        if values is None:
            return None
        if not isinstance(values, list | tuple) or not values:
            raise BadInputError(f"scaling[{name!r}] must list integers above 0, got {values!r}")
        for value in values:
            if type(value) is not int or value < 1:
                raise BadInputError(f"scaling[{name!r}] must list integers above 0, got {value!r}")
        return tuple(values)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._content.get(name, default)
        self._read.add(name)
        if not isinstance(value, bool):
            raise BadInputError(f"scaling[{name!r}] must be true or false, got {value!r}")
        return value

    def finish(self) -> None:
        """Refuse what no one asked for: a misspelt field would silently change the model."""
        unknown = sorted(set(self._content) - self._read)
        if unknown:
            raise BadInputError(
                f"scaling of rope_type {self.rope_type!r} has no field {unknown[0]!r}; "
                f"it takes {', '.join(sorted(self._read - {'type'}))}"
            )
