"""Rotations in an ONNX graph: operators that rotate, and the arithmetic that does the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from rope_export.inspection import values
from rope_export.inspection.angle_sources import (
    KINDS,
    AngleReader,
    Angles,
    merged,
    named_inputs,
    table_angles,
)

ARITHMETIC = "arithmetic"
_CONTRIB = "com.microsoft::"
# Inputs with the cosines; the sines follow. Attention that rotates when ``do_rotary`` says so, …
_ROTATING = {
    f"{_CONTRIB}GroupQueryAttention": 7,
    f"{_CONTRIB}SparseAttention": 9,
    f"{_CONTRIB}PagedAttention": 8,
    f"{_CONTRIB}DynamicSparseAttention": 11,
    f"{_CONTRIB}SparsePagedAttention": 14,
}
# … and operators that only rotate: the cosines, the positions, and the attribute of the width.
_ONLY_ROTATING = {
    "RotaryEmbedding": (1, 3),
    f"{_CONTRIB}RotaryEmbedding": (2, 1),
    f"{_CONTRIB}MRotaryEmbedding": (2, 1),
}
_GQA_POSITIONS = 9
_FIRST_POSITION_ONLY = "of a prompt, the operator reads the first position id only"
# A product's factors are looked for this deep.
_DEEP = 3


@dataclass(frozen=True)
class Rotation:
    """Rotations of the same kind.

    Attributes:
        operator: what rotates, or ``"arithmetic"``.
        nodes: where; of arithmetic, the nodes that add the two products.
        layout: ``"half"``, ``"interleaved"``, or None when it cannot be told.
        width: channels of each head that turn, or None.
        angles: where cosines and sines come from.
        remark: what else is to be known, or "".
    """

    operator: str
    nodes: tuple[str, ...]
    layout: str | None
    width: int | None
    angles: Angles
    remark: str = ""


def rotations(nodes: Iterable[tuple[str, ir.Node]]) -> tuple[Rotation, ...]:
    """Find every rotation; equal ones are one entry with several nodes."""
    listed = list(nodes)
    reader = AngleReader()
    single = [found for label, node in listed if (found := _operator(label, node, reader))]
    single += _arithmetic(listed, reader)
    alike: dict[Rotation, list[str]] = {}
    for rotation in single:
        alike.setdefault(replace(rotation, nodes=()), []).extend(rotation.nodes)
    return tuple(replace(rotation, nodes=tuple(nodes)) for rotation, nodes in alike.items())


def _operator(label: str, node: ir.Node, reader: AngleReader) -> Rotation | None:
    name = values.operator(node)
    if name in _ROTATING and values.integer(node, "do_rotary", 0):
        cosines, layout = _ROTATING[name], _layout(node, "rotary_interleaved")
        angles = _caches(node, cosines, reader, tables=True)
        remark = ""
        if name.endswith("GroupQueryAttention"):
            positions = values.argument(node, _GQA_POSITIONS)
            angles = replace(angles, positions=named_inputs(positions))
            remark = _FIRST_POSITION_ONLY if positions is not None else ""
        width = _cache_width(node, cosines, angles)
        return Rotation(name, (label,), layout, width, angles, remark)
    if name in _ONLY_ROTATING:
        cosines, at = _ONLY_ROTATING[name]
        positions = values.argument(node, at)
        angles = _caches(node, cosines, reader, tables=positions is not None)
        if positions is not None:
            angles = replace(angles, positions=named_inputs(positions))
        width = values.integer(node, "rotary_embedding_dim") or _cache_width(node, cosines, angles)
        return Rotation(name, (label,), _layout(node, "interleaved"), width, angles)
    return None


def _layout(node: ir.Node, attribute: str) -> str:
    return "interleaved" if values.integer(node, attribute, 0) else "half"


def _caches(node: ir.Node, first: int, reader: AngleReader, *, tables: bool) -> Angles:
    both = [reader.of(values.argument(node, first + i)) for i in (0, 1)]
    if tables:
        both = [table_angles(angles) for angles in both]
    return merged(both) or Angles("input")


def _cache_width(node: ir.Node, cosines: int, angles: Angles) -> int | None:
    """Twice the width of the cosines, or of the tables they were taken from."""
    half = values.width(values.argument(node, cosines))
    widths = {table.shape[-1] for table in angles.tables}
    if half is None and len(widths) == 1:
        half = widths.pop()
    return None if half is None else 2 * half


# --- arithmetic -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Some channels of ``source``: a slice, a split, one of two.

    Attributes:
        source: what they are channels of.
        axis: counted from the end, or None.
        start: the first of them, or which of two parts.
        step: from one to the next.
        single: whether it is one channel of each pair.
        even: whether it is one of two equal parts.
    """

    source: ir.Value
    axis: int | None
    start: int
    step: int
    single: bool
    even: bool


def _arithmetic(nodes: list[tuple[str, ir.Node]], reader: AngleReader) -> Iterator[Rotation]:
    sums = [(label, node) for label, node in nodes if values.operator(node) in ("Add", "Sub")]
    candidates = []
    second_halves: set[tuple[int, frozenset[int]]] = set()
    for label, node in sums:
        turned = _by_quarter_turn(label, node, reader)
        if turned is not None:
            yield turned
            continue
        pairs = _pair_sums(node, reader)
        candidates += [(label, pair) for pair in pairs if pair.negative][:1]
        second_halves |= {pair.key for pair in pairs if not pair.negative}
    for label, pair in candidates:
        if pair.key in second_halves:
            yield _rotation(label, pair.parts, pair.angles)


def _rotation(label: str, parts: tuple[_Part, _Part], angles: Angles) -> Rotation:
    layout, width = _pairing(*parts)
    return Rotation(ARITHMETIC, (label,), layout, width, angles)


@dataclass(frozen=True)
class _PairSum:
    """``a * cos - b * sin`` (negative), or ``b * cos + a * sin``."""

    parts: tuple[_Part, _Part]
    angles: Angles
    negative: bool

    @property
    def key(self) -> tuple[int, frozenset[int]]:
        first, second = self.parts
        return id(first.source), frozenset({first.start, second.start})


def _pair_sums(node: ir.Node, reader: AngleReader) -> list[_PairSum]:
    """Ways to read a sum as two channels of a pair, each times an angle; the likeliest first."""
    left, right = (list(_factors(values.argument(node, i))) for i in (0, 1))
    found = []
    for a, others_a in left:
        first, sign_a = _signed_part(a)
        if first is None:
            continue
        for b, others_b in right:
            second, sign_b = _signed_part(b)
            if second is None or not _siblings(first, second):
                continue
            angles = _angles(reader, others_a, others_b)
            if angles is not None:
                negative = sign_a * sign_b * (-1 if node.op_type == "Sub" else 1) < 0
                found.append(_PairSum((first, second), angles, negative))
    return sorted(found, key=lambda pair: KINDS.index(pair.angles.kind))


def _by_quarter_turn(label: str, node: ir.Node, reader: AngleReader) -> Rotation | None:
    """``x * cos + turned(x) * sin``, where ``turned`` makes ``(-b, a)`` of ``(a, b)``."""
    for i in (0, 1):
        for factor, others in _factors(values.argument(node, i)):
            parts = _quarter_turn(factor)
            if parts is None:
                continue
            base = _base(parts[0].source)
            for x, more in _factors(values.argument(node, 1 - i)):
                angles = _angles(reader, more, others) if _base(x) is base else None
                if angles is not None:
                    return _rotation(label, parts, angles)
    return None


def _angles(reader: AngleReader, cosines: list[ir.Value], sines: list[ir.Value]) -> Angles | None:
    """Angles on both sides, or None; further factors are scales."""
    sides = [merged(reader.of(value) for value in side) for side in (cosines, sines)]
    return None if None in sides else merged(sides)


def _factors(value: ir.Value | None, depth: int = 0) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """Every factor of a product with the others, factors of factors too."""
    node = values.made_by(values.through(value, values.CASTS), "Mul")
    if node is None or depth == _DEEP:
        return
    a, b = node.inputs[:2]
    if a is None or b is None:
        return
    for one, other in ((a, b), (b, a)):
        yield one, [other]
        for factor, others in _factors(one, depth + 1):
            yield factor, [*others, other]


def _quarter_turn(value: ir.Value) -> tuple[_Part, _Part] | None:
    node = values.made_by(values.through(value, values.VIEWS), "Concat")
    if node is None or len(node.inputs) != 2:
        return None
    (first, sign), (second, other_sign) = (_signed_part(x) for x in node.inputs)
    if first is None or second is None or sign * other_sign > 0:
        return None
    return (second, first) if _siblings(first, second) and first.start != second.start else None


def _siblings(first: _Part, second: _Part) -> bool:
    return (
        first.source is second.source
        and first.axis == second.axis
        and first.step == second.step
        and first.start != second.start
    )


def _signed_part(value: ir.Value | None) -> tuple[_Part | None, int]:
    """Which channels of what ``value`` shows, and with which sign."""
    sign = 1
    while value is not None:
        node = value.producer()
        if node is None or node.domain:
            break
        if node.op_type in ("Slice", "Split", "Gather"):
            return _part(node, value), sign
        if node.op_type == "Neg":
            sign = -sign
        elif node.op_type == "Mul":
            by = [values.number(x) for x in node.inputs]
            if -1 not in by:
                break
            sign = -sign
            value = node.inputs[1 - by.index(-1)]
            continue
        elif node.op_type not in values.VIEWS:
            break
        value = values.argument(node, 0)
    return None, sign


def _part(node: ir.Node, value: ir.Value) -> _Part | None:
    source = _root(values.argument(node, 0))
    if source is None:
        return None
    if node.op_type == "Slice":
        cut = values.slice_of(node)
        if cut is None:
            return _half(node, source)
        axis, start, end, step = cut
        return _Part(source, axis, start, step, single=end - start == 1, even=False)
    axis = values.on_axis(node, source)
    if node.op_type == "Split":
        index = next(i for i, output in enumerate(node.outputs) if output is value)
        if len(node.outputs) != 2:
            return None
        single = axis is not None and values.width(source, axis) == 2
        return _Part(source, axis, index, 1, single=single, even=True)
    index_value = values.number(values.argument(node, 1))
    if index_value not in (0, 1):
        return None
    return _Part(source, axis, int(index_value), 1, single=True, even=False)


def _half(node: ir.Node, source: ir.Value) -> _Part | None:
    """A slice up to a middle that is computed from the shape, or from there on."""
    starts, ends = (values.numbers(values.argument(node, index)) for index in (1, 2))
    axes = values.slice_numbers(node, 3, "axes")
    if axes is None or len(axes) != 1 or (starts is None) == (ends is None):
        return None
    if starts not in (None, [0]) or (ends is not None and ends[0] < values.TO_THE_END):
        return None
    axis = values.from_end(axes[0], source)
    return _Part(source, axis, int(starts is None), 1, single=False, even=True)


def _root(value: ir.Value | None) -> ir.Value | None:
    """The value without casts and slices that take everything."""
    while True:
        value = values.through(value, values.CASTS)
        node = values.made_by(value, "Slice")
        cut = None if node is None else values.slice_of(node)
        if node is None or cut is None or cut[1] != 0 or cut[3] != 1 or cut[2] < values.TO_THE_END:
            return value
        value = values.argument(node, 0)


def _base(value: ir.Value | None) -> ir.Value | None:
    """The value without whatever only shows it in another form."""
    while (node := values.made_by(_root(value), *values.VIEWS)) is not None:
        value = values.argument(node, 0)
    return _root(value)


def _pairing(first: _Part, second: _Part) -> tuple[str, int | None]:
    """Layout, and the channels that turn."""
    source = first.source
    if first.step == 2:
        return "interleaved", values.width(source)
    reshaped = values.made_by(source, "Reshape")
    if first.axis == -2:
        each = values.width(source)
        return "half", None if each is None else 2 * each
    if first.single and reshaped is not None:
        pairs = values.width(source, -2)
        if pairs is not None:
            return "interleaved", 2 * pairs
        return "interleaved", values.width(values.argument(reshaped, 0))
    layout = "interleaved" if _moved_to_halves(source) else "half"
    if first.even:
        return layout, values.width(source)
    start = max(first.start, second.start)
    last = min(first.start, second.start)
    return layout, -2 * last if last < 0 else 2 * start


def _moved_to_halves(value: ir.Value) -> bool:
    """Whether pairs side by side were first brought into halves, as DeepSeek's models do."""
    reshaped = values.made_by(value, "Reshape")
    turned = None if reshaped is None else values.made_by(reshaped.inputs[0], "Transpose")
    order = None if turned is None else values.integers(turned, "perm")
    if turned is None or order is None or len(order) < 4:
        return False
    last = len(order) - 1
    swapped = list(order[-2:]) == [last, last - 1]
    return swapped and values.width(values.argument(turned, 0)) == 2
