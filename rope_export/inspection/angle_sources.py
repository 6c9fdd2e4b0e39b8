"""Where a rotation's cosines and sines come from: tables, arithmetic, constants or inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

from rope_export.inspection import values

_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
_LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
_FIRST_INPUT = values.VIEWS | _LOOKUPS | {"Expand", "Tile", "Slice", "Split", "Neg"}
_EVERY_INPUT = frozenset({"Add", "Sub", "Mul", "Div", "Concat"})
# No cosine is further from its table than this, no condition from what it compares.
_FAR, _NEAR = 400, 40
_FURTHEST = 5000
# Of several kinds in one rotation the first one names it.
KINDS = ("table", "computed", "constant", "input")


@dataclass(frozen=True)
class Table:
    """A constant of cosines or sines.

    Attributes:
        name: of the initializer.
        shape: rows and width, and perhaps axes of one.
        dtype: of its elements.
        bytes: its size.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @classmethod
    def of(cls, tensor: ir.TensorProtocol, value: ir.Value) -> Table:
        """Describe a constant without reading it."""
        shape = values.dimensions(tensor)
        dtype = values.dtype_name(tensor.dtype)
        return cls(value.name or "", shape, dtype, int(tensor.nbytes))


@dataclass(frozen=True)
class Angles:
    """Where cosines and sines come from.

    Attributes:
        kind: ``"table"``: looked up by position; ``"computed"``: by Cos and Sin from positions;
            ``"constant"``: of one fixed length; ``"input"``: given to the graph.
        longest: positions served, or None: of ``"computed"`` angles any, of others unknown.
        tables: the constants.
        positions: graph inputs the positions are taken from; none when they are counted.
    """

    kind: str
    longest: int | None = None
    tables: tuple[Table, ...] = ()
    positions: tuple[str, ...] = ()


def merged(several: Iterable[Angles | None]) -> Angles | None:
    """Cosines and sines of one rotation: the shorter one bounds it; None without any."""
    found = [angles for angles in several if angles is not None]
    if not found:
        return None
    bounds = [angles.longest for angles in found if angles.longest is not None]
    return Angles(
        kind=min((angles.kind for angles in found), key=KINDS.index),
        longest=min(bounds, default=None),
        tables=tuple(dict.fromkeys(table for angles in found for table in angles.tables)),
        positions=tuple(dict.fromkeys(name for angles in found for name in angles.positions)),
    )


class AngleReader:
    """Traces values back to what their angles are made of, each value once."""

    def __init__(self) -> None:
        self._known: dict[int, Angles | None] = {}

    def of(self, value: ir.Value | None) -> Angles | None:
        """What the cosines or sines ``value`` are made of; None when it is no such thing."""
        if value is None:
            return None
        if id(value) not in self._known:
            self._known[id(value)] = None  # until known: a value is not made of itself
            self._known[id(value)] = self._trace(value)
        return self._known[id(value)]

    def _trace(self, value: ir.Value) -> Angles | None:
        found: list[Angles] = []
        bounds: list[int] = []
        seen: set[int] = set()
        pending: list[ir.Value | None] = [value]
        while pending:
            at = pending.pop()
            if at is None or id(at) in seen:
                continue
            seen.add(id(at))
            if len(seen) > _FAR:
                return None
            tensor, node = values.tensor_of(at), at.producer()
            if tensor is not None:
                found += _fixed(tensor, at)
            elif node is None:
                if at.dtype not in _FLOATS:
                    return None
                found.append(Angles("input", positions=(at.name or "",)))
            elif node.domain:
                return None
            elif node.op_type in ("Cos", "Sin"):
                found.append(_computed(node))
            elif looked_up := _lookup(node):
                found.append(looked_up)
            elif node.op_type == "Where":
                pending += node.inputs[1:]
                bounds += _guard(node)
            elif node.op_type == "If":
                found += self._either(node, at)
            elif node.op_type in _FIRST_INPUT:
                pending.append(values.argument(node, 0))
            elif node.op_type in _EVERY_INPUT:
                pending += node.inputs
            elif node.op_type != "Constant":
                return None
        angles = merged(found)
        if angles is None or not bounds:
            return angles
        return replace(
            angles, longest=min([*bounds, *([angles.longest] if angles.longest else [])])
        )

    def _either(self, node: ir.Node, value: ir.Value) -> list[Angles]:
        """Angles chosen by length: whichever branch goes further is there for long ones."""
        place = next(i for i, output in enumerate(node.outputs) if output is value)
        branches = []
        for attribute in node.attributes.values():
            for graph in values.subgraphs(attribute):
                branches.append(self.of(graph.outputs[place]))
        angles = merged(branches)
        if angles is None or None in branches:
            return []
        longest = [branch.longest for branch in branches if branch is not None]
        known = [bound for bound in longest if bound is not None]
        return [replace(angles, longest=max(known) if len(known) == len(longest) else None)]


def table_angles(angles: Angles | None) -> Angles | None:
    """The same as the cache of an operator that looks angles up itself."""
    if angles is None or angles.kind != "constant":
        return angles
    return replace(angles, kind="table")


def _rows(shape: tuple[int, ...]) -> int:
    """The axis that can be positions: the longest but the last."""
    return max(shape[:-1], default=1)


def _fixed(tensor: ir.TensorProtocol, value: ir.Value) -> list[Angles]:
    """A constant for one length, unless it is a number or one row."""
    rows = _rows(values.dimensions(tensor))
    if tensor.dtype not in _FLOATS or rows == 1:
        return []
    return [Angles("constant", rows, (Table.of(tensor, value),))]


def _lookup(node: ir.Node) -> Angles | None:
    """Rows of a constant taken by position, or as many as the sequence is long."""
    data = values.through(values.argument(node, 0), values.CASTS)
    tensor = values.tensor_of(data)
    if data is None or tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) < 2:
        return None
    shape = values.dimensions(tensor)
    table = Table.of(tensor, data)
    if node.op_type in _LOOKUPS:
        index = values.argument(node, 1)
        if values.is_weight(index):
            return None
        axis = values.integer(node, "axis", 0) if node.op_type != "GatherND" else 0
        # A reduced index is one of several tables whose angles are added up.
        rows = None if _is_reduced(index) else _size(shape, axis)
        return Angles("table", rows, (table,), named_inputs(index))
    if node.op_type == "Slice":
        starts, ends = (values.slice_numbers(node, i, n) for i, n in ((1, "starts"), (2, "ends")))
        if starts is not None and ends is not None:
            return None
        axes = values.slice_numbers(node, 3, "axes") or [0]
        return Angles("table", _size(shape, axes[0] if axes else None), (table,))
    return None


def _size(shape: tuple[int, ...], axis: int | None) -> int | None:
    return None if axis is None or not -len(shape) <= axis < len(shape) else shape[axis]


def _computed(node: ir.Node) -> Angles:
    """Cosines of positions; of constants alone they are a table of a length not written down."""
    argument = values.argument(node, 0)
    if not _depends_on_inputs(argument):
        return Angles("table")
    return Angles("computed", positions=named_inputs(argument))


def _upstream(value: ir.Value | None, limit: int, stop: frozenset[str]) -> Iterable[ir.Value]:
    """``value`` and all it is made of, not past the operators ``stop``."""
    seen: set[int] = set()
    pending = [value]
    while pending and len(seen) < limit:
        at = pending.pop()
        if at is None or id(at) in seen:
            continue
        seen.add(id(at))
        yield at
        node = at.producer()
        if node is not None and node.op_type not in stop:
            pending += node.inputs


def _depends_on_inputs(value: ir.Value | None) -> bool:
    return any(
        at.producer() is None and values.tensor_of(at) is None
        for at in _upstream(value, _FURTHEST, frozenset())
    )


def named_inputs(value: ir.Value | None) -> tuple[str, ...]:
    """Graph inputs whose content, not only shape, ``value`` is made of."""
    return tuple(
        dict.fromkeys(
            at.name or ""
            for at in _upstream(value, _FURTHEST, frozenset({"Shape", "Size"}))
            if at.producer() is None and values.tensor_of(at) is None
        )
    )


def _is_reduced(index: ir.Value | None) -> bool:
    """Whether positions were divided, or are what a division left."""
    return any(
        values.made_by(at, "Div", "Mod") is not None
        for at in _upstream(index, _NEAR, frozenset({"Shape", "Size", "Div", "Mod"}))
    )


def _guard(node: ir.Node) -> list[int]:
    """The bound of positions beyond which a Where gives NaN."""
    alternatives = [values.number(value) for value in node.inputs[1:]]
    if not any(value is not None and math.isnan(value) for value in alternatives):
        return []
    bounds = []
    for at in _upstream(values.argument(node, 0), _NEAR, frozenset({"Shape", "Less"})):
        limit = values.made_by(at, "Less", "LessOrEqual")
        bound = None if limit is None else values.number(values.argument(limit, 1))
        if limit is not None and bound is not None and math.isfinite(bound):
            bounds.append(int(bound) + (limit.op_type == "LessOrEqual"))
    return bounds
