"""Several calls of GroupQueryAttention where one cannot do it, or not fast enough.

While a block is traced, such an attention is one operator of the package's own. Here it becomes
``If`` and ``Scan`` around the real one:

- a batch with several new tokens *and* a past: the operator takes one row of that, so the rows are
  scanned;
- a long prompt with a window: the operator would compute the whole triangle of scores, so blocks of
  the window are scanned, each with the block before it as its past;
- a single token after a past, on the CPU: onnxruntime 1.31's kernel for it is slower than its
  general one, which multiplies by vectors when its scale is 1 and which attends where there are
  sinks. So queries are scaled before, and every head gets a sink of no weight.

Everything else is the one call; it and the single token's are on the caller's own buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from rope_export.lowering import ops
from rope_export.lowering.situation import BLOCKS_TO_WIN
from rope_export.lowering.subgraphs import Condition, Emit, Subgraphs

# Inputs of GroupQueryAttention.
_PAST_KEY, _PAST_VALUE, _LAST_INDEX, _TOTAL, _SINKS = 3, 4, 5, 6, ops.SINKS
_COUNTS = ops.COUNTS
_TO_THE_END = 2**62


def _both(tape: Tape, one: Condition, other: Condition) -> Condition:
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return tape.op("And", [one, other])


def _any(tape: Tape, one: Condition, other: Condition) -> Condition:
    if isinstance(one, bool):
        return True if one else other
    if isinstance(other, bool):
        return True if other else one
    return tape.op("Or", [one, other])


class GroupQueryCalls(Subgraphs):
    """The calls that stand for one `ops.group_query_attention`."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        super().__init__(graph, node)
        attributes = dict(node.attributes)
        self.by_rows = bool(attributes.pop("by_rows").as_int())
        self.block = attributes.pop("block").as_int()
        self.single = bool(attributes.pop("single").as_int())
        # Of a cache of the window, in which padding must not take a token's place.
        self.counts = self.inputs[_COUNTS] if len(self.inputs) > _COUNTS else None
        self.inputs = self.inputs[:_COUNTS]
        while self.inputs[-1] is None:
            self.inputs.pop()
        self.attributes = attributes
        self.has_past = self.inputs[_PAST_KEY] is not None
        # Without a past nobody reads what would be the present.
        self.outputs = list(node.outputs) if self.has_past else list(node.outputs)[:1]
        self.kv_heads = attributes["kv_num_heads"].as_int()
        context = node.outputs[0]
        assert context.shape is not None
        width = context.shape[2]
        assert isinstance(width, int)
        self.width = width
        self.head_dim = width // attributes["num_heads"].as_int()

    def emit(self, tape: Tape) -> Sequence[ir.Value]:
        """Write the control flow."""
        batch, length = self._count(tape, 0), self._count(tape, 1)
        first_call: Condition = True
        if self.has_past:
            total = tape.op("Cast", [self.inputs[_TOTAL]], {"to": ir.DataType.INT64})
            first_call = self._compared(tape, "Equal", length, total)
        emit: Emit = self._one_call
        if self.block:
            long = self._compared(tape, "Greater", length, BLOCKS_TO_WIN * self.block)
            long = _both(tape, first_call, long)
            if self.counts is None:
                emit = self._either("blocks", long, self._blocks, emit)
        if self.by_rows:
            alone = self._compared(tape, "Equal", batch, 1)
            if not self.single:
                alone = _any(tape, alone, self._compared(tape, "Equal", length, 1))
            whole, rows = _any(tape, first_call, alone), self._rows
            if self.counts is not None:
                fewest = tape.op("ReduceMin", [self.counts], {"keepdims": 0})
                unpadded = self._compared(tape, "Equal", length, fewest)
                whole, rows = _both(tape, whole, unpadded), self._padded_rows
            emit = self._either("rows", whole, emit, rows)
        if self.block and self.counts is not None:  # which keep padded rows apart themselves
            emit = self._either("blocks", long, self._blocks, emit)
        if self.single:
            one_token = self._compared(tape, "Equal", length, 1)
            if self.counts is not None:
                one_token = _both(tape, one_token, unpadded)
            emit = self._either("single", one_token, self._one_token, emit)
        return emit(tape)

    def _one_call(self, tape: Tape) -> Sequence[ir.Value]:
        return self._call(tape, self.inputs)[: len(self.outputs)]

    def _one_token(self, tape: Tape) -> Sequence[ir.Value]:
        inputs = [*self.inputs, *[None] * (_SINKS + 1 - len(self.inputs))]
        inputs[0] = self._scaled_queries(tape)
        kind = self.q.dtype
        assert kind is not None
        if kind == ir.DataType.FLOAT and inputs[_SINKS] is None:
            lowest = np.full(self.attributes["num_heads"].as_int(), np.finfo(np.float32).min)
            inputs[_SINKS] = self._initializer(f"no_sinks_{len(lowest)}", lowest.astype(np.float32))
        while inputs[-1] is None:
            inputs.pop()
        unscaled = {**self.attributes, "scale": ir.AttrFloat32("scale", 1.0)}
        return self._call(tape, inputs, unscaled)[: len(self.outputs)]

    def _scaled_queries(self, tape: Tape) -> ir.Value:
        """Queries times the scale, in float32; keys and values beside them as they were."""
        scale = self.attributes["scale"].as_float()
        if scale == 1.0:
            return self.q
        columns = np.full(self.width, scale, dtype=np.float32)
        if self.k is None:
            others = np.ones(2 * self.kv_heads * self.head_dim, dtype=np.float32)
            columns = np.concatenate((columns, others))
        scales = self._initializer(f"scales_{len(columns)}_{scale!r}", columns)
        if self.q.dtype == ir.DataType.FLOAT:
            return tape.op("Mul", [self.q, scales])
        wide = tape.op("Cast", [self.q], {"to": ir.DataType.FLOAT})
        wide = tape.op("Mul", [wide, scales])
        return tape.op("Cast", [wide], {"to": self.q.dtype})

    def _call(
        self,
        tape: Tape,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, ir.Attr] | None = None,
    ) -> Sequence[ir.Value]:
        return tape.op_multi_out(
            "GroupQueryAttention",
            inputs,
            attributes or self.attributes,
            domain="com.microsoft",
            version=1,
            num_outputs=3,
        )

    def _rows(self, tape: Tape) -> Sequence[ir.Value]:
        total = self.inputs[_TOTAL]
        assert total is not None
        stacked = self.inputs[: _LAST_INDEX + 1]
        for index in (_PAST_KEY, _PAST_VALUE):
            past = stacked[index]
            assert past is not None  # without one there is nothing to scan
            if past.shape is not None and isinstance(past.shape[2], int):
                # onnxruntime would take the length of a past for that of the present.
                end = tape.op("Cast", [total], {"to": ir.DataType.INT64})
                end = tape.op("Reshape", [end, self._constant(-1, 1)])
                stacked[index] = self._slice(tape, past, 0, end, axis=2)
        return self._calls(tape, stacked, total, len(self.outputs))

    def _calls(
        self, tape: Tape, stacked: Sequence[ir.Value | None], total: ir.Value, count: int
    ) -> Sequence[ir.Value]:
        """One call for each entry of the first axis of ``stacked``; the first ``count`` outputs."""

        def row(inner: Tape, entries: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
            axis = self._constant(0, 1)
            rows = [e if e is None else inner.op("Unsqueeze", [e, axis]) for e in entries]
            results = self._call(inner, [*rows, total, *self.inputs[_TOTAL + 1 :]])
            return [inner.op("Squeeze", [result, axis]) for result in results[:count]]

        return self._for_each(tape, stacked, row, count)

    def _padded_rows(self, tape: Tape) -> Sequence[ir.Value]:
        """One call a row, of its tokens alone: in a window padding would push out others."""

        def row(inner: Tape, entries: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
            *given, past_key, past_value, last_index, count = entries
            axis, one = self._constant(0, 1), self._constant(1)
            # A row of padding alone takes a token for the call, and keeps its past.
            taken = inner.op("Max", [count, one])
            extra = inner.op("Cast", [inner.op("Sub", [taken, count])], {"to": ir.DataType.INT32})
            last_index = inner.op("Add", [last_index, extra])
            total = inner.op("Add", [last_index, self._constant(1, 0, np.int32)])
            end = inner.op("Unsqueeze", [taken, axis])
            tokens = [x if x is None else self._slice(inner, x, 0, end, axis=0) for x in given]
            inputs = [
                x if x is None else inner.op("Unsqueeze", [x, axis])
                for x in (*tokens, past_key, past_value, last_index)
            ]
            results = self._call(inner, [*inputs, total, *self.inputs[_TOTAL + 1 :]])
            context, *present = [inner.op("Squeeze", [result, axis]) for result in results]
            padding = inner.op("Sub", [self._size(inner, 1, 1), end])
            pads = inner.op("Concat", [axis, axis, padding, axis], {"axis": 0})
            none = inner.op("Equal", [count, self._constant(0)])
            kept = [
                inner.op("Where", [none, past, now])
                for past, now in zip((past_key, past_value), present, strict=True)
            ]
            return [inner.op("Pad", [context, pads]), *kept]

        stacked = [*self.inputs[: _LAST_INDEX + 1], self.counts]
        return self._for_each(tape, stacked, row, len(self.outputs))

    def _for_each(
        self,
        tape: Tape,
        stacked: Sequence[ir.Value | None],
        row: Callable[[Tape, Sequence[ir.Value | None]], Sequence[ir.Value]],
        count: int,
    ) -> Sequence[ir.Value]:
        """``row`` of each entry of the first axis of ``stacked``, which gives ``count`` values."""
        # Of past and present; all before is as the queries are, and counts come last.
        kept = self.node.outputs[1].type
        kinds = [*[self.q.type] * _PAST_KEY, kept, kept]
        kinds += [ir.TensorType(kind) for kind in (ir.DataType.INT32, ir.DataType.INT64)]
        pairs = zip(stacked, kinds, strict=False)
        given = [(value, kind) for value, kind in pairs if value is not None]

        def body(inner: Tape, entries: Sequence[ir.Value]) -> Sequence[ir.Value]:
            of_row = iter(entries)
            return row(inner, [None if value is None else next(of_row) for value in stacked])

        # [S, width] and [heads, T, head_dim].
        return self._scan(tape, "entry", given, body, (2, 3, 3)[:count])

    def _blocks(self, tape: Tape) -> Sequence[ir.Value]:
        size, width, head_dim, kv_heads = self.block, self.width, self.head_dim, self.kv_heads
        assert self.k is not None
        assert self.v is not None
        batch, length = self._size(tape, 0, 1), self._size(tape, 1, 1)
        count = tape.op(
            "Div", [tape.op("Add", [length, self._constant(size - 1, 1)]), self._constant(size, 1)]
        )
        missing = tape.op("Sub", [tape.op("Mul", [count, self._constant(size, 1)]), length])
        zeros = self._constant([0, 0, 0, 0])
        pads = tape.op("Concat", [zeros, missing, self._constant(0, 1)], {"axis": 0})
        padded = [tape.op("Pad", [x, pads]) for x in (self.q, self.k, self.v)]
        entries: list[ir.Value | None] = [
            tape.op("Reshape", [x, self._constant([-1, size, w])])
            for x, w in zip(padded, (width, kv_heads * head_dim, kv_heads * head_dim), strict=True)
        ]
        by_block = tape.op(
            "Concat", [batch, count, self._constant([size, kv_heads, head_dim])], {"axis": 0}
        )
        for x in padded[1:]:
            heads = tape.op("Reshape", [x, by_block])
            heads = tape.op("Transpose", [heads], {"perm": [0, 1, 3, 2, 4]})
            # The first block has no past: what stands in for it is beyond its length.
            first = self._slice(tape, heads, 0, 1, axis=1)
            others = self._slice(tape, heads, 0, -1, axis=1)
            past = tape.op("Concat", [first, others], {"axis": 1})
            shape = self._constant([-1, kv_heads, size, head_dim])
            entries.append(tape.op("Reshape", [past, shape]))
        of_first = self._constant(size - 1, 1, np.int32)
        of_others = tape.op(
            "Expand",
            [
                self._constant(2 * size - 1, 1, np.int32),
                tape.op("Sub", [count, self._constant(1, 1)]),
            ],
        )
        last_index = tape.op("Concat", [of_first, of_others], {"axis": 0})
        grid = tape.op("Concat", [batch, count], {"axis": 0})
        last_index = tape.op("Expand", [last_index, grid])
        entries.append(tape.op("Reshape", [last_index, self._constant(-1, 1)]))
        total = self._constant(2 * size, dtype=np.int32)
        (blocks,) = self._calls(tape, entries, total, 1)
        back = tape.op("Concat", [batch, self._constant([-1, width])], {"axis": 0})
        context = tape.op("Reshape", [blocks, back])
        context = self._slice(tape, context, 0, length, axis=1)
        if not self.has_past:
            return [context]
        return [context, *(self._present(tape, i, batch, length) for i in (0, 1))]

    def _present(self, tape: Tape, which: int, batch: ir.Value, length: ir.Value) -> ir.Value:
        """Keys (0) or values (1) as the operator returns them, in a buffer as long as the past."""
        source = (self.k, self.v)[which]
        past = self.inputs[_PAST_KEY + which]
        sizes = self._constant([self.kv_heads, self.head_dim])
        heads = tape.op("Reshape", [source, tape.op("Concat", [batch, length, sizes], {"axis": 0})])
        if self.counts is not None:
            heads = tape.op("GatherND", [heads, self._latest(tape, length)], {"batch_dims": 1})
            return tape.op("Transpose", [heads], {"perm": [0, 2, 1, 3]})
        heads = tape.op("Transpose", [heads], {"perm": [0, 2, 1, 3]})
        rest = self._slice(tape, past, length, _TO_THE_END, axis=2)
        return tape.op("Concat", [heads, rest], {"axis": 2})

    def _latest(self, tape: Tape, length: ir.Value) -> ir.Value:
        """Which tokens of a first call its cache of the window keeps, ``[B, C, 1]``."""
        past, last_index = self.inputs[_PAST_KEY], self.inputs[_LAST_INDEX]
        capacity = tape.op("Shape", [past], {"start": 2, "end": 3})
        one = self._constant(1, 1)
        tokens = tape.op("Add", [tape.op("Cast", [last_index], {"to": ir.DataType.INT64}), one])
        window = self._constant(self.attributes["local_window_size"].as_int(), 1)
        # As many times the slots freed at once as it takes for the rest to fit.
        freed = tape.op("Add", [tape.op("Sub", [capacity, window]), one])
        over = tape.op("Max", [tape.op("Sub", [tokens, capacity]), self._constant(0, 1)])
        over = tape.op("Add", [over, tape.op("Sub", [freed, one])])
        first = tape.op("Mul", [tape.op("Div", [over, freed]), freed])
        slots = tape.op(
            "Range",
            [self._constant(0), tape.op("Squeeze", [capacity]), self._constant(1)],
        )
        kept = tape.op("Add", [tape.op("Unsqueeze", [first, one]), slots])
        kept = tape.op("Min", [kept, tape.op("Sub", [length, one])])
        return tape.op("Unsqueeze", [kept, self._constant(-1, 1)])
