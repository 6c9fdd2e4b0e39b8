"""Operators of PyTorch's that its exporter does not write, and that the code of masks uses.

Which tokens are special (``torch.isin``), which document a token of a packed row belongs to
(``torch.searchsorted``), what lies before the first of its kind (``cumprod``): comparisons and
products of all with all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset18

from rope_export.errors import BadInputError

# A value while the exporter translates: onnx_ir's, with a shape where PyTorch gave it.
Value = Any
op: Any = opset18
_FLOATS = (
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
)


def lacking() -> dict[Callable[..., Any], Callable[..., Value]]:
    """Return what writes each operator of PyTorch's."""
    aten = torch.ops.aten
    return {
        aten.isin.Tensor_Tensor: _isin,
        aten.isin.Tensor_Scalar: _isin,
        aten.searchsorted.Tensor: _searchsorted,
        aten.cumprod.default: _cumprod,
    }


def _ints(*numbers: int) -> Value:
    return op.Constant(value=ir.tensor(list(numbers), dtype=ir.DataType.INT64))


def _isin(
    elements: Value, test_elements: Value, assume_unique: bool = False, invert: bool = False
) -> Value:
    del assume_unique
    tested = op.Reshape(op.CastLike(test_elements, elements), _ints(-1))
    equal = op.Equal(op.Unsqueeze(elements, _ints(-1)), tested)
    count = op.ReduceSum(op.Cast(equal, to=ir.DataType.INT64), _ints(-1), keepdims=0)
    found = op.Cast(count, to=ir.DataType.BOOL)
    return op.Not(found) if invert else found


def _searchsorted(
    sorted_sequence: Value,
    self: Value,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Value | None = None,
) -> Value:
    if sorter is not None:
        raise BadInputError("torch.searchsorted must be given no sorter in a graph; sort before")
    wanted = op.Unsqueeze(self, _ints(-1))
    held = sorted_sequence
    if len(held.shape) > 1:
        held = op.Unsqueeze(held, _ints(-2))
    before = op.LessOrEqual if right or side == "right" else op.Less
    dtype = ir.DataType.INT32 if out_int32 else ir.DataType.INT64
    return op.ReduceSum(op.Cast(before(held, wanted), to=dtype), _ints(-1), keepdims=0)


def _cumprod(self: Value, dim: int, dtype: int = -1) -> Value:
    rank = len(self.shape)
    kind = ir.DataType(dtype) if dtype not in (-1, None) else self.dtype
    if dtype in (-1, None) and kind not in _FLOATS:
        kind = ir.DataType.INT64  # as PyTorch counts
    x = op.Cast(self, to=kind)
    if not rank:
        return x
    swapped = [*range(rank)]
    swapped[dim], swapped[-1] = swapped[-1], swapped[dim]
    x = op.Transpose(x, perm=swapped)
    zero, step = (op.Constant(value_int=number) for number in (0, 1))
    token = op.Range(zero, op.Squeeze(op.Shape(x, start=-1)), step)
    earlier = op.LessOrEqual(op.Unsqueeze(token, _ints(0)), op.Unsqueeze(token, _ints(1)))
    one = op.Constant(value=ir.tensor(1, dtype=kind))
    factors = op.Where(earlier, op.Unsqueeze(x, _ints(-2)), one)
    found = op.ReduceProd(factors, _ints(-1), keepdims=0)
    return op.Transpose(found, perm=swapped)
