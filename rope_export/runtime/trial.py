"""`Trial`: one case of a proof: inputs, what they should give, and how close is close enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.comparison import Bound, errors_between, tolerance
from rope_export.runtime.token_places import Array, Places

Progress = Callable[[str], None]
OUTPUT = "output"
PRESENTS = ("present_key", "present_value")
KINDS = ("tokens", "cache", "whole")
"""New tokens on the first two axes, those of a cache on the first and third, or none at all."""
# Of cases with loud inputs, where eager PyTorch's own error is a matter of luck.
_LOUD_ALLOWANCE = 4.0


def silent(_: str) -> None:
    """Progress that goes nowhere."""


@dataclass(frozen=True)
class Expected:
    """What one tensor should hold at some of its tokens.

    Attributes:
        truth: ``[tokens, width]`` float64; of keys and values, all heads of a token in one row.
        at: batch row and place of each of those tokens, or None: everything is compared.
        bound: how close is close enough.
        kind: where tokens are, one of `KINDS`.
        shape: of the whole tensor.
    """

    truth: npt.NDArray[np.float64]
    at: Places | None
    bound: Bound
    kind: str
    shape: tuple[int, ...]

    def take(self, tensor: Array) -> Array:
        """The tokens in question, ``[tokens, width]``."""
        return rows_of(tensor, self.at, self.kind)


def rows_of(tensor: Array, at: Places | None, kind: str) -> Array:
    """Rows of what is compared: the tokens at some places, or all there is.

    Args:
        tensor: ``[B, S, ...]`` of new tokens, ``[B, G, T, width]`` of a cache, or any other.
        at: batch row and place of the tokens.
        kind: one of `KINDS`.
    """
    if at is None:
        count = int(np.prod(tensor.shape[:-1])) if tensor.ndim > 1 else tensor.size
        rows = tensor.reshape(count, tensor.shape[-1] if tensor.ndim > 1 else 1)
    else:
        row, place = at
        found = tensor[row, place] if kind == "tokens" else tensor[row, :, place]
        rows = found.reshape(len(row), -1)
    return rows


@dataclass(frozen=True)
class Judged:
    """What of an output is compared.

    Attributes:
        kind: where its tokens are, one of `KINDS`.
        at: batch row and place of those compared, or None: everything.
        shape: of the whole tensor.
    """

    kind: str
    at: Places | None
    shape: tuple[int, ...]

    def expected(
        self,
        truth: Array,
        eager: Array,
        dtype: str,
        products: int,
        *,
        loud: bool = False,
        rounding: str | None = None,
    ) -> Expected | None:
        """Compare eager PyTorch with truth, or return None where it is not finite.

        Args:
            truth: ``[tokens, width]`` float64.
            eager: the same of eager PyTorch.
            dtype: of the tensor.
            products: length of the longest sum of products.
            loud: whether inputs are so large that eager's own error is a matter of luck.
            rounding: the dtype computed in, if not the tensor's.
        """
        exact = np.ascontiguousarray(truth, dtype=np.float64)
        errors = errors_between(exact, eager, dtype)
        if not math.isfinite(errors.rel):
            return None
        held_to = tolerance(errors, rounding or dtype, products)
        if loud:
            held_to = replace(
                held_to, rel=_LOUD_ALLOWANCE * held_to.rel, row=_LOUD_ALLOWANCE * held_to.row
            )
        return Expected(exact, self.at, Bound(errors, held_to, dtype), self.kind, self.shape)


@dataclass(frozen=True)
class Trial:
    """One case: inputs, what they should give, and how close is close enough.

    Attributes:
        name: what it covers.
        batch: rows.
        sequence: new tokens.
        past: cached tokens before them, of the longest row.
        inputs: by graph input name.
        expected: by graph output name.
        outputs: whole graph outputs, for storing; empty when it is not stored.
        steps: when not empty, the inputs are one full pass that is run in several calls through
            `runtime.Decoder`: how many tokens each row is given in each.
    """

    name: str
    batch: int
    sequence: int
    past: int
    inputs: dict[str, Array]
    expected: dict[str, Expected]
    outputs: dict[str, Array]
    steps: tuple[tuple[int, ...], ...] = ()

    @property
    def stored(self) -> bool:
        """Whether the artifact keeps it as a test vector."""
        return bool(self.outputs)
