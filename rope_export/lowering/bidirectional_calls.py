"""Attention without causal order on the CPU, where one call would hold a score for every pair.

While a block is traced, such an attention is one operator of the package's own. Here it becomes
``Scan`` around a real one:

- rows of different lengths by MultiHeadAttention, which keeps no scores but takes no lengths: the
  rows are scanned, and each is cut to its tokens;
- a window, a soft cap or sinks by GroupQueryAttention, which without causal order keeps the scores
  of all queries it is given: blocks of queries are scanned within each row, each with the keys that
  it can see as a past, and with a bias that hides those beyond the window and beyond the row.

Short calls of GroupQueryAttention are one call; longer is what has more than one block of queries,
or with a window more than a few of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from rope_export.lowering.subgraphs import Subgraphs


class BidirectionalCalls(Subgraphs):
    """The control flow that stands for one `ops.bidirectional_attention`.

    Args:
        graph: the graph of the node.
        node: the operator of the package's own.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        super().__init__(graph, node)
        assert self.k is not None
        assert self.v is not None
        self.whole = (self.q, self.k, self.v)
        self.lengths, self.sinks = (*self.inputs, None, None)[3:5]
        attributes = dict(node.attributes)
        self.block = attributes.pop("block").as_int()
        self.longest_whole = attributes.pop("longest_whole").as_int()
        self.window = attributes.pop("window").as_int()
        self.kv_heads = attributes["kv_num_heads"].as_int()
        self.heads = attributes["num_heads"].as_int()
        if not self.block:
            attributes.pop("kv_num_heads")
        self.attributes = attributes
        output = node.outputs[0]
        assert output.shape is not None
        width = output.shape[2]
        assert isinstance(width, int)
        self.width = width

    def emit(self, tape: Tape) -> Sequence[ir.Value]:
        """Write the nodes that stand for the operator."""
        if not self.block:
            return self._cut_rows(tape)
        long = self._compared(tape, "Greater", self._count(tape, 1), self.longest_whole)
        return self._either("blocks", long, self._blocks, self._one_call)(tape)

    def _cut_rows(self, tape: Tape) -> Sequence[ir.Value]:
        first, axis = self._constant(0, 1), self._constant(0, 1)
        length = self._size(tape, 1, 1)

        def row(inner: Tape, entries: Sequence[ir.Value]) -> ir.Value:
            *whole, tokens = entries
            end = inner.op("Reshape", [tokens, self._constant(-1, 1)])
            cut = [inner.op("Slice", [x, first, end, axis]) for x in whole]
            if self.kv_heads < self.heads:
                cut[1:] = [self._for_each_head(inner, x) for x in cut[1:]]
            rows = [inner.op("Unsqueeze", [x, axis]) for x in cut]
            context = inner.op(
                "MultiHeadAttention", rows, self.attributes, domain="com.microsoft", version=1
            )
            context = inner.op("Squeeze", [context, axis])
            missing = inner.op("Sub", [length, end])
            zero = self._constant(0, 1)
            pads = inner.op("Concat", [zero, zero, missing, zero], {"axis": 0})
            return inner.op("Pad", [context, pads])

        assert self.lengths is not None
        return [self._each(tape, "row", self.whole, row, integers=[self.lengths])]

    def _for_each_head(self, tape: Tape, x: ir.Value) -> ir.Value:
        """Keys or values of a row for each query head: MultiHeadAttention has no grouped heads."""
        groups = self.heads // self.kv_heads
        heads = tape.op("Reshape", [x, self._constant([0, self.kv_heads, 1, -1])])
        heads = tape.op("Expand", [heads, self._constant([1, 1, groups, 1])])
        return tape.op("Flatten", [heads])

    def _one_call(self, tape: Tape) -> Sequence[ir.Value]:
        length = self._size(tape, 1, 1)
        bias = None
        if self.window:
            place = self._range(tape, self._size(tape, 1))
            query, key = (tape.op("Unsqueeze", [place, self._constant(a, 1)]) for a in (1, 0))
            far = tape.op("Abs", [tape.op("Sub", [key, query])])
            bias = self._bias(tape, tape.op("LessOrEqual", [far, self._constant(self.window)]))
        lengths = self.lengths
        if lengths is None:
            lengths = tape.op("Expand", [length, self._size(tape, 0, 1)])
        return [self._attend(tape, [*self.whole, None, None], lengths, length, bias)]

    def _blocks(self, tape: Tape) -> Sequence[ir.Value]:
        batch, length = self._size(tape, 0, 1), self._size(tape, 1, 1)
        size, one = self._constant(self.block, 1), self._constant(1, 1)
        count = tape.op("Div", [tape.op("Add", [length, tape.op("Sub", [size, one])]), size])
        missing = tape.op("Sub", [tape.op("Mul", [count, size]), length])
        zero = self._constant(0, 1)
        pads = tape.op("Concat", [zero, zero, zero, zero, missing, zero], {"axis": 0})
        shape = tape.op("Concat", [batch, count, self._constant([self.block, -1])], {"axis": 0})
        queries = tape.op("Reshape", [tape.op("Pad", [self.q, pads]), shape])
        keys, values = (self._heads(tape, x, batch, missing) for x in self.whole[1:])
        counted = tape.op("Squeeze", [count])
        starts = tape.op("Mul", [self._range(tape, counted), self._constant(self.block)])
        lengths = self.lengths
        if lengths is None:
            lengths = tape.op("Expand", [length, batch])
        reach = self._constant(self.block + 2 * self.window, 1) if self.window else length
        # Places of a block's keys, counted from its first query.
        place = self._range(tape, tape.op("Squeeze", [reach]))
        place = tape.op("Sub", [place, self._constant(self.window)])
        near = self._near(tape, place) if self.window else None
        none = self._no_tokens()

        def row(outer: Tape, entries: Sequence[ir.Value]) -> ir.Value:
            blocks, of_key, of_value, tokens = entries

            def block(inner: Tape, entries: Sequence[ir.Value]) -> ir.Value:
                query, start = entries
                past, places = [of_key, of_value], place
                if self.window:
                    begin = inner.op("Reshape", [start, self._constant(-1, 1)])
                    ends = [begin, inner.op("Add", [begin, reach]), self._constant(1, 1)]
                    past = [inner.op("Slice", [x, *ends]) for x in past]
                    places = inner.op("Add", [place, start])
                axis = self._constant(0, 1)
                past = [inner.op("Unsqueeze", [x, axis]) for x in past]
                bias = None
                if near is not None or self.lengths is not None:
                    bias = self._bias(inner, self._seen(inner, places, tokens, near))
                query = inner.op("Unsqueeze", [query, axis])
                inputs = [query, none, none, *past]
                return inner.op("Squeeze", [self._attend(inner, inputs, reach, reach, bias), axis])

            return self._each(outer, "block", [blocks], block, integers=[starts])

        context = self._each(tape, "row", [queries, keys, values], row, integers=[lengths], rank=3)
        back = tape.op("Concat", [batch, self._constant([-1, self.width])], {"axis": 0})
        context = tape.op("Reshape", [context, back])
        return [tape.op("Slice", [context, zero, length, one])]

    def _seen(
        self, tape: Tape, places: ir.Value, tokens: ir.Value, near: ir.Value | None
    ) -> ir.Value:
        """Which keys the queries of a block see, bool ``[block, keys]``."""
        seen = tape.op("Less", [places, tokens])
        if near is None:
            return tape.op("Expand", [seen, self._constant([self.block, 1])])
        seen = tape.op("And", [seen, tape.op("GreaterOrEqual", [places, self._constant(0)])])
        return tape.op("And", [near, seen])

    def _near(self, tape: Tape, place: ir.Value) -> ir.Value:
        query = tape.op(
            "Unsqueeze", [self._range(tape, self._constant(self.block)), self._constant(1, 1)]
        )
        far = tape.op("Abs", [tape.op("Sub", [place, query])])
        return tape.op("LessOrEqual", [far, self._constant(self.window)])

    def _heads(self, tape: Tape, x: ir.Value, batch: ir.Value, missing: ir.Value) -> ir.Value:
        """Keys or values as a past, ``[B, kv_heads, T, head_dim]``, with a window at either end."""
        shape = self._constant([-1, self.kv_heads, self.width // self.heads])
        heads = tape.op("Reshape", [x, tape.op("Concat", [batch, shape], {"axis": 0})])
        heads = tape.op("Transpose", [heads], {"perm": [0, 2, 1, 3]})
        if not self.window:
            return heads
        window = self._constant(self.window, 1)
        zeros = self._constant([0, 0])
        after = tape.op("Add", [missing, window])
        pads = tape.op(
            "Concat",
            [zeros, window, self._constant(0, 1), zeros, after, self._constant(0, 1)],
            {"axis": 0},
        )
        return tape.op("Pad", [heads, pads])

    def _attend(
        self,
        tape: Tape,
        inputs: Sequence[ir.Value | None],
        lengths: ir.Value,
        total: ir.Value,
        bias: ir.Value | None,
    ) -> ir.Value:
        last = tape.op("Sub", [lengths, self._constant(1, 1)])
        last, total = (tape.op("Cast", [x], {"to": ir.DataType.INT32}) for x in (last, total))
        given = [*inputs, last, tape.op("Squeeze", [total]), None, None, None, bias, self.sinks]
        while given[-1] is None:
            given.pop()
        (context, *_) = tape.op_multi_out(
            "GroupQueryAttention",
            given,
            {**self.attributes, "causal": ir.AttrInt64("causal", 0)},
            domain="com.microsoft",
            version=1,
            num_outputs=3,
        )
        return context

    def _bias(self, tape: Tape, seen: ir.Value) -> ir.Value:
        """What hides keys, ``[1, 1, queries, keys]``.

        The lowest number, not infinity: a query of padding may see nothing, and is no NaN.
        """
        kind = self._kind()
        nothing, lowest = (
            self._initializer(f"{kind}_{name}", np.array(value, dtype=kind))
            for name, value in (("nothing", 0), ("lowest", np.finfo(kind).min))
        )
        bias = tape.op("Where", [seen, nothing, lowest])
        return tape.op("Unsqueeze", [bias, self._constant([0, 1])])

    def _no_tokens(self) -> ir.Value:
        kind = self._kind()
        width = self.kv_heads * (self.width // self.heads)
        return self._initializer(f"no_tokens_{kind}_{width}", np.zeros((1, 0, width), dtype=kind))

    def _kind(self) -> np.dtype[Any]:
        assert self.q.dtype is not None
        return self.q.dtype.numpy()

    def _range(self, tape: Tape, count: ir.Value) -> ir.Value:
        return tape.op("Range", [self._constant(0), count, self._constant(1)])
