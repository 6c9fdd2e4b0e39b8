"""Operators on booleans and integers that PyTorch's exporter writes and runtimes lack.

The code of masks reaches them: ``masked_fill`` and ``torch.where`` between booleans, sums and
largest of booleans, ``relu`` of a distance.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor
from onnx_ir.tape import Tape

_BOOL = ir.DataType.BOOL
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
# Which integers, and in which inputs, an operator lacks kernels for.
_NARROW = {
    "Trilu": ((ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT16), (0,)),
    "Where": ((ir.DataType.INT16,), (1, 2)),
}
_REDUCES_BOOLEANS = 20  # opset from which ReduceMax and ReduceMin do
Write = Callable[[Tape, ir.Node], ir.Value]


def expand(model: ir.Model) -> None:
    """Write them with operators that every runtime has, in place."""
    opset = model.opset_imports[""]
    for node in list(model.graph.all_nodes()):
        write = _other_form(node, opset)
        if write is None:
            continue
        tape = Tape()
        old, new = node.outputs[0], write(tape, node)
        new.type, new.shape = old.type, old.shape
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, tape.nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = old.name
        graph.remove(node, safe=True)


def _other_form(node: ir.Node, opset: int) -> Write | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    first = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Where" and node.outputs[0].dtype is _BOOL:
        return _chosen
    if node.op_type == "Add" and dtypes == {_BOOL}:
        return lambda tape, it: tape.op("Or", it.inputs)
    if node.op_type in ("ReduceMax", "ReduceMin") and first is _BOOL and opset < _REDUCES_BOOLEANS:
        return _reduced
    if node.op_type == "Relu" and first in _INTEGERS:
        return _rectified
    narrow, _ = _NARROW.get(node.op_type, ((), ()))
    return _in_int32 if node.outputs[0].dtype in narrow else None


def _in_int32(tape: Tape, node: ir.Node) -> ir.Value:
    inputs, dtype = list(node.inputs), node.outputs[0].dtype
    for index in _NARROW[node.op_type][1]:
        inputs[index] = tape.op("Cast", [inputs[index]], {"to": ir.DataType.INT32})
    found = tape.op(node.op_type, inputs, dict(node.attributes))
    return tape.op("Cast", [found], {"to": dtype})


def _chosen(tape: Tape, node: ir.Node) -> ir.Value:
    """``Where(c, x, y)``: onnxruntime has no kernel for booleans on the CPU."""
    condition, x, y = node.inputs
    for_true, for_false = _known(x), _known(y)
    if for_true is True:
        return tape.op("Or", [condition, y])
    if for_false is False:
        return tape.op("And", [condition, x])
    otherwise = tape.op("Not", [condition])
    if for_true is False:
        return tape.op("And", [otherwise, y])
    if for_false is True:
        return tape.op("Or", [otherwise, x])
    either = tape.op("And", [condition, x]), tape.op("And", [otherwise, y])
    return tape.op("Or", either)


def _known(value: ir.Value | None) -> bool | None:
    """What a constant of no axes is, else None."""
    tensor = None if value is None else get_const_tensor(value)
    if tensor is None or len(tensor.shape):
        return None
    return bool(tensor.numpy())


def _reduced(tape: Tape, node: ir.Node) -> ir.Value:
    number = tape.op("Cast", node.inputs[:1], {"to": ir.DataType.INT32})
    found = tape.op(node.op_type, [number, *node.inputs[1:]], dict(node.attributes))
    return tape.op("Cast", [found], {"to": _BOOL})


def _rectified(tape: Tape, node: ir.Node) -> ir.Value:
    dtype = node.inputs[0].dtype  # type: ignore[union-attr]
    assert dtype is not None
    zero = tape.op("Constant", [], {"value": ir.tensor(0, dtype=dtype)})
    return tape.op("Max", [node.inputs[0], zero])
