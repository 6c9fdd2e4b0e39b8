"""Reading an ONNX graph backwards: what is constant, how wide, made by which operator.

Nothing here runs a graph or reads large weights; what cannot be told is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

# Constants up to so many elements are read; larger ones are weights and stay where they are.
_SMALL = 64
# How far back is looked; operators of several inputs count more, or the paths would multiply.
_DEEPEST = 16
_FORK = 4
# The end of a slice that has none.
TO_THE_END = 2**31 - 1
# Operators that only show the same numbers in another form; the first input is what they show.
CASTS = frozenset({"Cast", "CastLike", "Identity"})
VIEWS = CASTS | {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Where", "Cos", "Sin"})


def dtype_name(dtype: ir.DataType | None) -> str:
    """A dtype as PyTorch and NumPy call it."""
    if dtype is None:
        return "unknown"
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def operator(node: ir.Node) -> str:
    """``domain::name``, or ``name`` for the standard's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def walk(graph: ir.Graph | ir.Function, scope: str = "") -> Iterator[tuple[str, ir.Node]]:
    """Every node with a name to find it by, those of branches and loop bodies included."""
    for node in graph:
        named = node.name or next((f"-> {value.name}" for value in node.outputs if value.name), "")
        label = f"{scope}{named or operator(node)}"
        yield label, node
        for attribute in node.attributes.values():
            for inner in subgraphs(attribute):
                yield from walk(inner, f"{label}.{attribute.name}/")


def subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """Graphs an attribute holds: a branch, a loop's body."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS:
        return attribute.as_graphs()
    return ()


def integer(node: ir.Node, name: str, default: int | None = None) -> int | None:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INT:
        return default
    return attribute.as_int()


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An attribute that is a list of integers."""
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INTS:
        return None
    return list(attribute.as_ints())


def argument(node: ir.Node, index: int) -> ir.Value | None:
    """The input at ``index``, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes ``value`` when it is a standard operator of one of these names."""
    node = None if value is None else value.producer()
    return node if node is not None and not node.domain and node.op_type in operators else None


def through(value: ir.Value | None, operators: frozenset[str]) -> ir.Value | None:
    """Go back over operators that have one input that matters, the first."""
    while (node := made_by(value, *operators)) is not None:
        value = argument(node, 0)
    return value


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value
    node = made_by(value, "Constant")
    attribute = None if node is None else node.attributes.get("value")
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return None
    return attribute.as_tensor()


def dimensions(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(tensor.shape.numpy())


def file_inside(folder: Path, name: str) -> Path | None:
    """The path of a model's file of weights, unless it leads out of the model's folder."""
    try:
        folder = folder.resolve()
        file = (folder / name).resolve()
    except (OSError, ValueError):  # no path at all
        return None
    return file if file.is_relative_to(folder) else None


def _readable(tensor: ir.TensorProtocol) -> bool:
    if math.prod(dimensions(tensor)) > _SMALL or tensor.dtype == ir.DataType.STRING:
        return False
    if not isinstance(tensor, ir.ExternalTensor):
        return True
    file = file_inside(Path(tensor.base_dir or "."), str(tensor.location))
    end = (tensor.offset or 0) + tensor.nbytes
    return file is not None and file.is_file() and file.stat().st_size >= end


def numbers(value: ir.Value | None, depth: int = 0) -> list[float] | None:
    """The elements of a small constant, in order; None when it is large or not constant."""
    tensor = tensor_of(value)
    if tensor is not None:
        try:
            flat = tensor.numpy().reshape(-1) if _readable(tensor) else None
            return None if flat is None else [number.item() for number in flat]
        except Exception:  # whatever a malformed tensor makes the reader raise
            return None
    node = None if value is None else value.producer()
    if node is None or node.domain or depth > _DEEPEST:
        return None
    if node.op_type == "Constant":
        return _attribute_numbers(node)
    if node.op_type in VIEWS:
        return numbers(argument(node, 0), depth + 1)
    if node.op_type == "Concat":
        parts = [numbers(part, depth + 1) for part in node.inputs]
        if all(part is not None for part in parts):
            return [number for part in parts if part is not None for number in part]
    return None


def _attribute_numbers(node: ir.Node) -> list[float] | None:
    for name in ("value_int", "value_float", "value_ints", "value_floats"):
        attribute = node.attributes.get(name)
        if attribute is not None and not attribute.is_ref():
            found = attribute.value
            return list(found) if isinstance(found, Sequence) else [found]
    return None


def number(value: ir.Value | None) -> float | None:
    """The element of a constant that has just one."""
    found = numbers(value)
    return found[0] if found is not None and len(found) == 1 else None


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is made of constants alone: a weight, turned or dequantised perhaps."""
    for _ in range(_DEEPEST):
        if tensor_of(value) is not None:
            return True
        node = made_by(value, *VIEWS, "DequantizeLinear")
        if node is None:
            return False
        value = argument(node, 0)
    return False


def rank(value: ir.Value | None, depth: int = 0) -> int | None:
    """How many axes a value has."""
    if value is None or depth > _DEEPEST:
        return None
    if value.shape is not None:
        return len(value.shape)
    tensor = tensor_of(value)
    if tensor is not None:
        return len(tensor.shape)
    node = value.producer()
    if node is None or node.domain:
        return None
    name, first = node.op_type, argument(node, 0)
    if name == "Transpose":
        order = integers(node, "perm")
        return None if order is None else len(order)
    if name == "Reshape":
        shape = argument(node, 1)
        known = numbers(shape)
        if known is not None:
            return len(known)
        # The pieces a tracer puts together are one size each unless they are constants.
        joined = made_by(shape, "Concat")
        return None if joined is None else sum(len(numbers(x) or (0,)) for x in joined.inputs)
    if name in ("Unsqueeze", "Squeeze"):
        before, axes = rank(first, depth + 1), slice_numbers(node, 1, "axes")
        if before is None or axes is None:
            return None
        return before + len(axes) if name == "Unsqueeze" else before - len(axes)
    if name in _ELEMENTWISE | CASTS | {"Slice", "Split", "Concat", "MatMul"}:
        ranks = [found for x in node.inputs[:2] if (found := rank(x, depth + _FORK)) is not None]
        return max(ranks, default=None)
    return None


def slice_numbers(node: ir.Node, index: int, name: str) -> list[int] | None:
    """Integers that are an input, or an attribute in older operator sets."""
    attribute = integers(node, name)
    if attribute is not None:
        return attribute
    found = numbers(argument(node, index))
    return None if found is None else [int(number) for number in found]


def width(value: ir.Value | None, axis: int = -1, depth: int = 0) -> int | None:
    """The size of an axis counted from the end (-1 or -2)."""
    if value is None or depth > _DEEPEST:
        return None
    tensor = tensor_of(value)
    shape = value.shape if tensor is None else tensor.shape
    size = shape[axis] if shape is not None and len(shape) >= -axis else None
    if isinstance(size, int):
        return size
    node = value.producer()
    if node is None or node.domain:
        return None
    name, first = node.op_type, argument(node, 0)
    if name == "Reshape":
        return _target_size(argument(node, 1), axis)
    if name == "Transpose":
        order = integers(node, "perm")
        if order is None or len(order) < -axis:
            return None
        return width(first, order[axis] - len(order), depth + 1) if order[axis] else None
    if name == "MatMul" and axis == -1:
        return width(argument(node, 1), axis, depth + 1)
    if name == "Slice":
        return _slice_width(node, axis, depth)
    if name == "Split":
        return _split_width(node, axis, depth)
    if name == "Concat" and on_axis(node, argument(node, 0)) == axis:
        sizes = [width(part, axis, depth + _FORK) for part in node.inputs]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    if name in _ELEMENTWISE | CASTS:
        sizes = [width(x, axis, depth + _FORK) for x in node.inputs]
        return max((size for size in sizes if size is not None), default=None)
    return None


def _target_size(shape: ir.Value | None, axis: int) -> int | None:
    """What a Reshape is told the axis shall be, as far as that is constant."""
    pieces: list[ir.Value | None] = [shape]
    joined = made_by(shape, "Concat")
    if joined is not None and numbers(shape) is None:
        pieces = list(joined.inputs)
    tail: list[int] = []
    for piece in reversed(pieces):
        known = numbers(piece)
        if known is None:
            break
        tail = [int(size) for size in known] + tail
    found = tail[axis] if len(tail) >= -axis else -1
    return found if found > 0 else None


def on_axis(node: ir.Node, value: ir.Value | None) -> int | None:
    """The ``axis`` of an operator counted from the end, as an axis of ``value``."""
    axis = integer(node, "axis", 0)
    return from_end(axis, value)


def from_end(axis: int | None, value: ir.Value | None) -> int | None:
    """An axis counted from the end: -1 is the last."""
    if axis is None or axis < 0:
        return axis
    axes = rank(value)
    return None if axes is None else axis - axes


def _slice_width(node: ir.Node, axis: int, depth: int) -> int | None:
    cut = slice_of(node)
    whole = width(argument(node, 0), axis, depth + 1)
    if cut is None or cut[0] is None:
        return None
    at, start, end, step = cut
    if at != axis:
        return whole
    if whole is not None:
        return len(range(*slice(start, end, step).indices(whole)))
    return -(-(end - start) // step) if 0 <= start <= end < TO_THE_END and step > 0 else None


def _split_width(node: ir.Node, axis: int, depth: int) -> int | None:
    whole = width(argument(node, 0), axis, depth + 1)
    at = on_axis(node, argument(node, 0))
    if at != axis:
        return whole if at is not None else None
    given = slice_numbers(node, 1, "split")
    if given is not None and len(set(given)) == 1:
        return given[0]
    parts = len(node.outputs)
    return whole // parts if given is None and whole is not None and whole % parts == 0 else None


def slice_of(node: ir.Node) -> tuple[int | None, int, int, int] | None:
    """Axis from the end, start, end and step of a Slice of one axis with constant bounds."""
    starts, ends = slice_numbers(node, 1, "starts"), slice_numbers(node, 2, "ends")
    axes = slice_numbers(node, 3, "axes")
    steps = [1] if argument(node, 4) is None else slice_numbers(node, 4, "steps")
    if axes is None and argument(node, 3) is None and starts is not None:
        axes = list(range(len(starts)))
    if not (starts and ends and axes and steps) or len(starts) != 1 or steps[0] < 1:
        return None
    return from_end(axes[0], argument(node, 0)), starts[0], ends[0], steps[0]
