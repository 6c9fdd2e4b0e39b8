"""`Subgraphs`: writing control flow around onnxruntime's operators in place of one of ours."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from rope_export.lowering.ops import OWN_DOMAIN

Emit = Callable[[Tape], Sequence[ir.Value]]
# What the graph decides while it runs, or what its fixed sizes have decided.
Condition = ir.Value | bool


class Subgraphs(ABC):
    """One operator of the package's own, and what it takes to write others in its place.

    Args:
        graph: the graph of the node.
        node: the operator. Its first three inputs are queries, keys and values
            ``[B, S, heads * width]``, or all of them packed in the first.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node
        self.inputs = list(node.inputs)
        q, self.k, self.v = self.inputs[:3]
        assert q is not None
        self.q = q
        self.outputs = list(node.outputs)

    @abstractmethod
    def emit(self, tape: Tape) -> Sequence[ir.Value]:
        """Write the nodes that stand for the operator, and return its outputs."""

    def replace(self) -> None:
        """Put the nodes in the place of the operator."""
        tape = Tape()
        results = self.emit(tape)
        for old, new in zip(self.outputs, results, strict=True):
            new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.insert_before(self.node, tape.nodes)
        self.graph.remove(self.node, safe=True)

    def _either(self, name: str, condition: Condition, then: Emit, otherwise: Emit) -> Emit:
        """An ``If``, or the branch that fixed sizes have decided for."""
        if isinstance(condition, bool):
            return then if condition else otherwise

        def emit(tape: Tape) -> Sequence[ir.Value]:
            branches = {
                f"{which}_branch": self._subgraph(f"{name}_{which}", make)
                for which, make in (("then", then), ("else", otherwise))
            }
            return tape.op_multi_out("If", [condition], branches, num_outputs=len(self.outputs))

        return emit

    def _subgraph(self, name: str, emit: Emit, inputs: Sequence[ir.Value] = ()) -> ir.Graph:
        """A body whose outputs are of the operator's types."""
        tape = Tape()
        outputs = emit(tape)
        for value, given in zip(outputs, self.node.outputs, strict=False):
            value.type = given.type
        return ir.Graph(inputs, outputs, nodes=tape.nodes, name=name)

    def _each(
        self,
        tape: Tape,
        name: str,
        stacked: Sequence[ir.Value],
        body: Callable[[Tape, Sequence[ir.Value]], ir.Value],
        *,
        integers: Sequence[ir.Value] = (),
        rank: int = 2,
    ) -> ir.Value:
        """A ``Scan`` with one output.

        Args:
            tape: where it is written.
            name: of the body.
            stacked: values of the operator's dtype whose first axis is scanned.
            body: writes what is made of one entry of each of ``stacked`` and ``integers``.
            integers: likewise scanned, int64.
            rank: axes of what ``body`` writes.
        """
        kinds = [self.q.type] * len(stacked) + [ir.TensorType(ir.DataType.INT64)] * len(integers)
        given = zip([*stacked, *integers], kinds, strict=True)
        (made,) = self._scan(tape, name, list(given), lambda *of: [body(*of)], (rank,))
        return made

    def _scan(
        self,
        tape: Tape,
        name: str,
        given: Sequence[tuple[ir.Value, ir.TypeProtocol | None]],
        body: Callable[[Tape, Sequence[ir.Value]], Sequence[ir.Value]],
        ranks: Sequence[int],
    ) -> Sequence[ir.Value]:
        """A ``Scan``.

        Args:
            tape: where it is written.
            name: of its body.
            given: values whose first axis is scanned, each with its type.
            body: writes what is made of one entry of each.
            ranks: axes of each value that it writes, which onnxruntime 1.24 wants to know.
        """
        entries = [ir.Value(name=f"{name}_{i}", type=kind) for i, (_, kind) in enumerate(given)]

        def emit(inner: Tape) -> Sequence[ir.Value]:
            made = body(inner, entries)
            for value, rank in zip(made, ranks, strict=True):
                value.shape = ir.Shape([None] * rank)
            return made

        attributes: dict[str, Any] = {
            "body": self._subgraph(name, emit, entries),
            "num_scan_inputs": len(given),
        }
        values = [value for value, _ in given]
        return tape.op_multi_out("Scan", values, attributes, num_outputs=len(ranks))

    def _slice(
        self,
        tape: Tape,
        x: ir.Value | None,
        start: int | ir.Value,
        end: int | ir.Value,
        *,
        axis: int,
    ) -> ir.Value:
        """``x`` from ``start`` to ``end`` on ``axis``."""
        ends = [self._constant(v, 1) if isinstance(v, int) else v for v in (start, end)]
        return tape.op("Slice", [x, *ends, self._constant(axis, 1)])

    def _count(self, tape: Tape, axis: int) -> ir.Value | int:
        """Rows (0) or tokens (1) of this call: a number where it is always the same.

        A condition on constants would be left to the runtime to fold, of which some cannot.
        """
        size = None if self.q.shape is None else self.q.shape[axis]
        return size if isinstance(size, int) else self._size(tape, axis)

    def _compared(
        self, tape: Tape, operator: str, one: ir.Value | int, other: ir.Value | int
    ) -> Condition:
        """Whether one is ``Equal`` to or ``Greater`` than the other."""
        if isinstance(one, int) and isinstance(other, int):
            return one == other if operator == "Equal" else one > other
        sides = [self._constant(x) if isinstance(x, int) else x for x in (one, other)]
        return tape.op(operator, sides)

    def _size(self, tape: Tape, axis: int, rank: int = 0) -> ir.Value:
        """Rows (0) or tokens (1) of this call, as a scalar or a list of one."""
        size = tape.op("Shape", [self.q], {"start": axis, "end": axis + 1})
        return size if rank else tape.op("Squeeze", [size])

    def _constant(
        self, value: int | list[int], rank: int = 0, dtype: type[np.generic] = np.int64
    ) -> ir.Value:
        """Integers; with ``rank`` a list of them."""
        array = np.array(value, dtype=dtype)
        if rank:
            array = array.reshape(-1)
        values = "_".join(map(str, array.reshape(-1)))
        return self._initializer(f"{array.dtype}_{array.ndim}_{values}", array)

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A constant of the graph, one for all that want the same values."""
        stem = name = f"{OWN_DOMAIN}_{name}"
        for number in itertools.count(2):
            known = self.graph.initializers.get(name)
            if known is None:
                break
            assert known.const_value is not None
            if np.array_equal(known.const_value.numpy(), array):
                return known
            name = f"{stem}_{number}"
        tensor = ir.tensor(array, name=name)
        made = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
        self.graph.register_initializer(made)
        return made
