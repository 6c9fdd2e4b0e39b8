"""``F.scaled_dot_product_attention`` of a module's own, as ONNX has it.

The standard's Attention computes it where runtimes have that (targets ``ort`` and ``onnx``),
arithmetic elsewhere. Either way the meaning is PyTorch's:

- heads of any rank, broadcast over each other; grouped heads;
- masks that stand for several rows, columns, heads or batches, also where only the run shows it;
- the causal triangle begins at the first query and the first key, whatever their numbers;
- a row that sees nothing is zero, and one that sees every key equally little (an additive mask of
  the lowest number) is their mean;
- half-precision heads attend in float32, as PyTorch's own kernels do.

https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.onnx_opset import opset18, opset23

# A value while the exporter translates: onnx_ir's, with a shape where PyTorch gave it.
Value = Any
Sizes = Sequence[int | str]
_WIDE = ir.DataType.FLOAT
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def translation(*, fused: bool, widened: bool) -> Callable[..., Value]:
    """Return what writes one call of the operator ``aten::scaled_dot_product_attention``.

    Args:
        fused: as Attention; else as arithmetic of opset 18.
        widened: half-precision heads attend in float32.
    """

    def attend(
        query: Value,
        key: Value,
        value: Value,
        attn_mask: Value | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | Value | None = None,
        enable_gqa: bool = False,
    ) -> Value:
        del dropout_p  # refused while tracing unless it is 0
        call = _Call(opset23 if fused else opset18, query, key, value, attn_mask)
        call.align(grouped=enable_gqa)
        call.widen(always=widened or not fused)
        if fused and call.dtype is not ir.DataType.DOUBLE:
            return call.narrowed(call.fused(is_causal, scale))
        return call.narrowed(call.arithmetic(is_causal, scale))

    return attend


class _Call:
    """One call: heads become ``[B, H, S, D]``, ``[B, G, T, D]`` and ``[B, G, T, E]``."""

    def __init__(self, op: Any, q: Value, k: Value, v: Value, mask: Value | None) -> None:
        self.op = op
        self.q, self.k, self.v, self.mask = q, k, v, mask
        self.q_sizes, self.k_sizes, self.v_sizes = (_sizes(x) for x in (q, k, v))
        self.mask_sizes = [] if mask is None else _sizes(mask)
        self.given = self.dtype = q.dtype
        self.mask_dtype = None if mask is None else mask.dtype
        self.rows: Value | None = None  # sizes in front of the heads, where they are several
        self.rank = len(self.q_sizes)

    # Axes

    def align(self, *, grouped: bool) -> None:
        """Bring all to four axes, with the same rows and heads that divide each other."""
        given = self.q_sizes, self.k_sizes, self.v_sizes
        self.rank = max(map(len, given))
        rank = max(4, self.rank)
        self.q, self.k, self.v = (
            self._ranked(x, sizes, rank) for x, sizes in zip(self._all(), given, strict=True)
        )
        sizes: list[Sizes] = [[1] * (rank - len(s)) + s for s in given]
        lead = [s[:-3] for s in sizes]
        if not _all_same(lead):
            common = self._broadcast([self.op.Shape(x, end=-3) for x in self._all()])
            self.q, self.k, self.v = (
                self.op.Expand(x, self.op.Concat(common, self.op.Shape(x, start=-3), axis=0))
                for x in self._all()
            )
        heads = [s[-3] for s in sizes]
        if grouped and heads[1] != heads[2]:
            self.k, self.v = (self._repeated(x) for x in (self.k, self.v))
            heads = [heads[0]] * 3
        elif not grouped and not _shared(*heads):
            count = self._broadcast([self.op.Shape(x, start=-3, end=-2) for x in self._all()])
            self.q, self.k, self.v = (self._with_heads(x, count) for x in self._all())
            heads = ["every"] * 3
        self.groups = heads[0], heads[1]
        if rank > 4:
            self.rows = self.op.Shape(self.q, end=-3)
            self.mask = self._mask_of_rows(rank)
            self.q, self.k, self.v = (self._rows_merged(x) for x in self._all())

    def _all(self) -> tuple[Value, Value, Value]:
        return self.q, self.k, self.v

    def _ranked(self, x: Value, sizes: Sizes, rank: int) -> Value:
        missing = rank - len(sizes)
        return self.op.Unsqueeze(x, self._ints(range(missing))) if missing else x

    def _with_heads(self, x: Value, count: Value) -> Value:
        rows, matrix = self.op.Shape(x, end=-3), self.op.Shape(x, start=-2)
        return self.op.Expand(x, self.op.Concat(rows, count, matrix, axis=0))

    def _repeated(self, x: Value) -> Value:
        """Every head as often as there are queries to it, one after the other."""
        op = self.op
        heads, held = (op.Shape(t, start=-3, end=-2) for t in (self.q, x))
        rows, matrix = op.Shape(x, end=-3), op.Shape(x, start=-2)
        times = op.Div(heads, held)
        wide = op.Expand(
            op.Unsqueeze(x, self._ints([-3])), op.Concat(rows, held, times, matrix, axis=0)
        )
        return op.Reshape(wide, op.Concat(rows, heads, matrix, axis=0))

    def _rows_merged(self, x: Value) -> Value:
        return self.op.Reshape(
            x, self.op.Concat(self._ints([-1]), self.op.Shape(x, start=-3), axis=0)
        )

    def _mask_of_rows(self, rank: int) -> Value | None:
        if len(self.mask_sizes) <= 3:
            return self.mask
        mask = self._ranked(self.mask, self.mask_sizes, rank)
        last = self.op.Shape(mask, start=-3)
        if any(size != 1 for size in self.mask_sizes[:-3]):
            mask = self.op.Expand(mask, self.op.Concat(self.rows, last, axis=0))
        self.mask_sizes = ["rows", *self.mask_sizes[-3:]]
        return self._rows_merged(mask)

    def _as_given(self, y: Value) -> Value:
        """``[B, H, S, E]`` with the axes that were given."""
        if self.rows is not None:
            shape = self.op.Concat(self.rows, self.op.Shape(y, start=1), axis=0)
            return self.op.Reshape(y, shape)
        if self.rank < 4:
            return self.op.Squeeze(y, self._ints(range(4 - self.rank)))
        return y

    # Numbers

    def widen(self, *, always: bool) -> None:
        """Attend in float32 where that is wanted, or where heads and mask differ in dtype."""
        differs = self.mask_dtype not in (None, ir.DataType.BOOL, self.dtype)
        if self.dtype in _HALF and (always or differs):
            self.dtype = _WIDE
            self.q, self.k, self.v = (self.op.Cast(x, to=_WIDE) for x in self._all())

    def narrowed(self, y: Value) -> Value:
        """Give the result the axes and the dtype that the heads had."""
        y = self._as_given(y)
        return y if self.dtype == self.given else self.op.Cast(y, to=self.given)

    def _number(self, number: float, dtype: ir.DataType | None = None) -> Value:
        return self.op.Constant(value=ir.tensor(number, dtype=dtype or self.dtype))

    def _ints(self, numbers: Sequence[int]) -> Value:
        return self.op.Constant(value=ir.tensor(list(numbers), dtype=ir.DataType.INT64))

    def _broadcast(self, shapes: list[Value]) -> Value:
        return self.op.Max(*shapes)

    # Masks

    def _triangle(self) -> Value:
        """``[S, T]``: query ``i`` sees keys up to ``i``."""
        op = self.op
        zero, one = (self.op.Constant(value=ir.tensor(n, dtype=ir.DataType.INT64)) for n in (0, 1))
        query, key = (
            op.Range(zero, op.Squeeze(op.Shape(x, start=2, end=3)), one) for x in (self.q, self.k)
        )
        return op.LessOrEqual(
            op.Unsqueeze(key, self._ints([0])), op.Unsqueeze(query, self._ints([1]))
        )

    def _additive(self) -> bool:
        return self.mask_dtype not in (None, ir.DataType.BOOL)

    def _seen(self, mask: Value, *, additive: bool) -> Value:
        """Which rows see anything, with an axis of one key.

        Counted: a maximum needs cuDNN on CUDA.
        """
        op = self.op
        if additive:
            mask = op.Greater(mask, self._number(-math.inf, self._mask_dtype()))
        count = op.ReduceSum(op.Cast(mask, to=_WIDE), self._ints([-1]), keepdims=1)
        return op.Greater(count, self._number(0.0, _WIDE))

    def _mask_dtype(self) -> ir.DataType:
        # Half-precision masks are looked at in float32: not every provider compares less.
        return _WIDE if self.mask_dtype in _HALF else self.mask_dtype or _WIDE

    def _looked_at(self) -> Value:
        if self.mask_dtype in _HALF:
            return self.op.Cast(self.mask, to=_WIDE)
        return self.mask

    def _or_zero(self, seen: Value, y: Value) -> Value:
        return self.op.Where(seen, y, self._number(0.0))

    def fused(self, causal: bool, scale: float | Value | None) -> Value:
        """Write Attention, and around it what its kernels leave out."""
        square = self.q_sizes[-2] == self.k_sizes[-2]
        mask, seen = self._looked_at(), None
        if mask is not None:
            if causal:
                mask = self._with_triangle(mask)
            seen = self._seen(mask, additive=self._additive())
            if self._additive() and self.dtype is _WIDE:
                mask = self._above_lowest(mask)
            elif self._additive():
                mask = self.op.Cast(mask, to=self.dtype)
            mask = self._whole(mask, done=causal)
        elif causal and not square:
            mask = self._triangle()  # providers begin is_causal's at different corners
        q, factor = self.q, scale
        if isinstance(scale, ir.Value) or (scale is not None and scale <= 0):
            # onnxruntime wants a positive number.
            q, factor = self.op.Mul(q, self._factor(scale)), 1.0
        y, *_ = self.op.Attention(
            q,
            self.k,
            self.v,
            mask,
            is_causal=int(causal and mask is None),
            **({} if factor is None else {"scale": float(factor)}),
        )
        return y if seen is None else self._or_zero(seen, y)

    def _with_triangle(self, mask: Value) -> Value:
        triangle = self._triangle()
        if self._additive():
            return self.op.Where(triangle, mask, self._number(-math.inf, self._mask_dtype()))
        return self.op.And(triangle, mask)

    def _above_lowest(self, mask: Value) -> Value:
        """Lift the lowest number: onnxruntime takes it for hidden, PyTorch for a number.

        The slope keeps what is infinite and changes no weight by more than one rounding:
        ``x * exp(-x)`` is below 1. Choosing by comparison takes half as long as attending where
        each head has a mask, and a product with what is nearly one is optimized away.
        """
        return self.op.LeakyRelu(mask, alpha=1 - 2**-23)

    def _whole(self, mask: Value, *, done: bool) -> Value:
        """The mask with all queries and keys: onnxruntime broadcasts neither."""
        if done or self.mask_sizes[-2:] == [self.q_sizes[-2], self.k_sizes[-2]]:
            return mask
        sizes = (self.op.Shape(x, start=2, end=3) for x in (self.q, self.k))
        return self.op.Expand(mask, self.op.Concat(*sizes, axis=0))

    def _factor(self, scale: float | Value) -> Value:
        if not isinstance(scale, ir.Value):
            return self._number(scale)
        return self.op.Cast(scale, to=self.dtype)

    def arithmetic(self, causal: bool, scale: float | Value | None) -> Value:
        """Write products, softmax and mix."""
        op = self.op
        mask, seen = self._looked_at(), None
        if mask is not None:
            if causal:
                mask = self._with_triangle(mask)
            seen = self._seen(mask, additive=self._additive())
            if self._additive() and self.dtype is not self._mask_dtype():
                mask = op.Cast(mask, to=self.dtype)
        elif causal:
            mask = self._triangle()
        scale = self._width_scale() if scale is None else scale
        q, k, v = op.Mul(self.q, self._factor(scale)), self.k, self.v
        heads, held = self.groups
        grouped = heads != held and held != 1
        if grouped:
            count = op.Shape(k, start=1, end=2)
            q = self._in_groups(q, count)
            k, v = (op.Unsqueeze(x, self._ints([2])) for x in (k, v))
        last = 4 if grouped else 3
        turned = [*range(last - 1), last, last - 1]
        scores = op.MatMul(q, op.Transpose(k, perm=turned))
        if grouped:
            scores = self._out_of_groups(scores)
        if mask is not None and self._additive():
            scores = op.Add(scores, mask)
        elif mask is not None:
            scores = op.Where(mask, scores, self._number(float(self.dtype.min)))
        weights = op.Softmax(scores, axis=-1)
        if grouped:
            weights = self._in_groups(weights, count)
        y = op.MatMul(weights, v)
        y = self._out_of_groups(y) if grouped else y
        return y if seen is None else self._or_zero(seen, y)

    def _width_scale(self) -> float | Value:
        width = self.q_sizes[-1]
        if isinstance(width, int):
            return 1 / math.sqrt(width)
        wide = self.op.Cast(self.op.Squeeze(self.op.Shape(self.q, start=3)), to=_WIDE)
        return self.op.Reciprocal(self.op.Sqrt(wide))

    def _in_groups(self, x: Value, count: Value) -> Value:
        """``[B, H, S, …]`` as ``[B, G, H / G, S, …]``."""
        op = self.op
        rows, matrix = op.Shape(x, end=1), op.Shape(x, start=2)
        return op.Reshape(x, op.Concat(rows, count, self._ints([-1]), matrix, axis=0))

    def _out_of_groups(self, x: Value) -> Value:
        op = self.op
        rows, matrix = op.Shape(x, end=1), op.Shape(x, start=3)
        return op.Reshape(x, op.Concat(rows, self._ints([-1]), matrix, axis=0))


def _sizes(x: Value) -> list[int | str]:
    """Sizes as PyTorch traced them; equal symbols are equal sizes."""
    assert x.shape is not None
    return [size if isinstance(size, int) else str(size) for size in x.shape]


def _all_same(several: Sequence[Sizes]) -> bool:
    return all(list(sizes) == list(several[0]) for sizes in several)


def _shared(query: int | str, key: int | str, value: int | str) -> bool:
    """Whether queries have as many heads as keys and values, or these have one for all."""
    return key == value and (query == key or key == 1)
