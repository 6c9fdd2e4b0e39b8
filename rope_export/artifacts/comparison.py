"""Errors and tolerances: the arithmetic of the verdict, in numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Half the spacing of numbers near one: the largest error of one rounding.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# A provider may round differently from eager PyTorch, not worse: twice its error. Added, for cases
# so small that eager happens to be nearly exact, are half of one rounding to the dtype; one float32
# rounding for each of the eight steps from input to output (projection, product and sum of the
# rotation, score, exponential, normalisation, mix, output); and what two float32 accumulations of
# the same products in different orders differ by.
_FACTOR = 2.0
_DTYPE_ROUNDINGS = 0.5
_STEPS = 8.0
_ACCUMULATION = 0.25


@dataclass(frozen=True)
class Errors:
    """Distances between an output and its truth.

    Attributes:
        rel: relative L2 over the whole output.
        row: the largest relative L2 of one token's output, so that one wrong row in thousands
            cannot hide. A row that cancels to almost nothing counts as half a typical one.
        max_abs: the largest absolute difference (0 in a tolerance: not judged).
    """

    rel: float
    row: float
    max_abs: float

    def within(self, tolerance: Errors) -> bool:
        """Whether both relative errors are at most the tolerance's; NaN and infinity never are."""
        return (
            math.isfinite(self.rel)
            and math.isfinite(self.row)
            and self.rel <= tolerance.rel
            and self.row <= tolerance.row
        )


@dataclass(frozen=True)
class Bound:
    """How well eager PyTorch does on a tensor, and what a provider is held to.

    Attributes:
        eager: eager PyTorch against float64 truth.
        tolerance: derived from it and the dtype.
        dtype: of the tensor, by NumPy's name.
        loss: what the rounding of the cache alone changes, as relative L2 against float64 with a
            cache of numbers; no provider is held to it. None: nothing is rounded.
    """

    eager: Errors
    tolerance: Errors
    dtype: str
    loss: float | None = None


def errors_against(truth: npt.NDArray[np.float64], output: npt.ArrayLike) -> Errors:
    """Compare ``output`` with ``truth``, both ``[..., tokens, width]``.

    NaN is right where the truth is NaN, and there alone: PyTorch gives it where a softmax sees
    nothing. Anything else that is not finite is infinitely wrong.

    Raises:
        ValueError: the shapes differ.
    """
    output = np.asarray(output, dtype=np.float64)
    if output.shape != truth.shape:
        raise ValueError(f"output has shape {output.shape}, the truth {truth.shape}")
    undefined = np.isnan(truth)
    if undefined.any() and np.array_equal(undefined, np.isnan(output)):
        truth, output = np.where(undefined, 0.0, truth), np.where(undefined, 0.0, output)
    if not (np.isfinite(output).all() and np.isfinite(truth).all()):
        return Errors(math.inf, math.inf, math.inf)
    difference = output - truth
    token_norm = np.linalg.norm(truth, axis=-1)
    token_error = np.linalg.norm(difference, axis=-1)
    tiny = np.finfo(np.float64).tiny
    typical = float(np.sqrt(np.mean(token_norm**2))) if token_norm.size else 0.0
    scale = np.maximum(token_norm, max(typical / 2, tiny))
    return Errors(
        rel=_ratio(np.linalg.norm(difference), max(float(np.linalg.norm(truth)), tiny)),
        row=_ratio(token_error, scale),
        max_abs=float(np.abs(difference).max(initial=0.0)),
    )


def errors_between(truth: npt.NDArray[np.float64], output: npt.ArrayLike, dtype: str) -> Errors:
    """Compare as `errors_against`; of integers, the share that differs at all.

    Args:
        truth: ``[..., tokens, width]``.
        output: likewise.
        dtype: of the tensor, by NumPy's name.
    """
    if not dtype.startswith(("int", "uint", "bool")):
        return errors_against(truth, output)
    output = np.asarray(output, dtype=np.float64)
    if output.shape != truth.shape:
        raise ValueError(f"output has shape {output.shape}, the truth {truth.shape}")
    other = (output != truth).astype(np.float64)
    return Errors(
        rel=float(other.mean()) if other.size else 0.0,
        row=float(other.mean(axis=-1).max(initial=0.0)),
        max_abs=float(np.abs(output - truth).max(initial=0.0)),
    )


def _ratio(error: npt.ArrayLike, scale: npt.ArrayLike) -> float:
    with np.errstate(over="ignore"):  # an error over a truth of zero: infinite
        return float(np.max(np.divide(error, scale), initial=0.0))


def tolerance(eager: Errors, dtype: str, products: int) -> Errors:
    """What a provider is held to.

    Args:
        eager: eager PyTorch's own errors on the same case.
        dtype: of weights and activations.
        products: length of the longest sum of products in the block.
    """
    steps = _STEPS + _ACCUMULATION * math.sqrt(products)
    floor = _DTYPE_ROUNDINGS * UNIT_ROUNDOFF[dtype] + steps * UNIT_ROUNDOFF["float32"]
    return Errors(_FACTOR * eager.rel + floor, _FACTOR * eager.row + floor, 0.0)
