"""Labels of dynamic axes: a name, or arithmetic on names such as ``past_sequence+sequence``."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from rope_export.errors import BadInputError

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class AxisRange:
    """What is asked of a dynamic axis.

    Attributes:
        label: its name, or arithmetic on names.
        low: the smallest size asked for, or None.
        high: the largest, or None.
    """

    label: str
    low: int | None = None
    high: int | None = None


def is_name(label: str) -> bool:
    """Whether a label is a plain name."""
    return re.fullmatch(r"[^\W\d]\w*", label) is not None


@cache
def _parsed(label: str) -> ast.expr:
    try:
        tree = ast.parse(label.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or not _allowed(tree):
        raise BadInputError(
            "dynamic_shapes must label an axis with a name, or with +, -, * and // of names and "
            f"numbers, got {label!r}"
        )
    return tree


def _allowed(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS and _allowed(node.left) and _allowed(node.right)
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    return isinstance(node, ast.Name)


def names_in(label: str) -> tuple[str, ...]:
    """Names that occur in a label, each once, in order.

    Raises:
        BadInputError: it is no name and no arithmetic on names.
    """
    found = [node.id for node in ast.walk(_parsed(label)) if isinstance(node, ast.Name)]
    return tuple(dict.fromkeys(found))


def size_of(label: str | int, sizes: Mapping[str, int]) -> int:
    """What a label comes to.

    Raises:
        KeyError: a name has no size.
        BadInputError: it divides by zero.
    """
    return label if isinstance(label, int) else _value(_parsed(label), sizes)


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        try:
            return _OPERATORS[type(node.op)](left, right)
        except ZeroDivisionError:
            raise BadInputError(
                f"dynamic_shapes must not divide by zero, got {ast.unparse(node)!r}"
            ) from None
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    assert isinstance(node, ast.Name)
    return sizes[node.id]


def inverse(text: str, size: int, *, up: bool = False) -> int:
    """The largest size of the one name in a label at which it is not over ``size``.

    With ``up`` the smallest at which it is not under.
    """
    (name,) = names_in(text)
    low, high = 0, max(size, 1)
    while low < high:
        middle = (low + high + (not up)) // 2
        value = size_of(text, {name: middle})
        if up:
            low, high = (low, middle) if value >= size else (middle + 1, high)
        else:
            low, high = (middle, high) if value <= size else (low, middle - 1)
    return low


def substituted(label: str, derived: Mapping[str, str]) -> str:
    """A label with names that stand for others written out.

    Raises:
        BadInputError: names stand for each other in a circle.
    """
    for _ in range(len(derived) + 1):
        known = [name for name in names_in(label) if name in derived]
        if not known:
            return label
        if label in known:
            label = derived[label]
            continue
        for name in known:
            label = re.sub(rf"\b{re.escape(name)}\b", f"({derived[name]})", label)
    raise BadInputError(f"dynamic_shapes must not define labels by each other, got {label!r}")
