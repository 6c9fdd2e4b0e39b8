"""Where a traced module fixed or narrowed a size: the line of its own that did.

A trace decides ``if``, reshapes and broadcasts by the example's sizes, and PyTorch keeps what that
assumes of them. It says which axis came out narrower, long after the line that did it has run, so
the lines are written down while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import get_current_meta

from rope_export.exporting.blame import own_line, running_line

Expr = Any
"""A symbol of a trace or arithmetic on symbols, of sympy."""


@dataclass
class _Lines:
    """What was written down of one trace, the latest last."""

    ranges: dict[Expr, str] = field(default_factory=dict)
    replaced: dict[Expr, tuple[Expr, str]] = field(default_factory=dict)
    guards: dict[Expr, str] = field(default_factory=dict)


_WRITTEN: WeakKeyDictionary[ShapeEnv, _Lines] = WeakKeyDictionary()


@contextmanager
def written_down(until: str) -> Iterator[list[ShapeEnv]]:
    """Write down, while the context lasts, which lines fix and narrow sizes.

    Args:
        until: the file that traces; what called it is not looked at.

    Yields:
        the symbols of the traces something was written down of, to ask when there is no program.
    """
    found: list[ShapeEnv] = []

    def after(method: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def noting(env: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
            line = _line(until)
            if line is not None:
                if env not in _WRITTEN:
                    found.append(env)
                note(_WRITTEN.setdefault(env, _Lines()), line, env, *args)
            return method(env, *args, **kwargs)

        return noting

    with (
        mock.patch.object(ShapeEnv, "_set_replacement", after(ShapeEnv._set_replacement, _replace)),
        mock.patch.object(
            ShapeEnv, "_update_var_to_range", after(ShapeEnv._update_var_to_range, _narrow)
        ),
        mock.patch.object(ShapeEnv, "_log_guard", after(ShapeEnv._log_guard, _guard)),
    ):
        yield found


def narrowed_by(traced: torch.export.ExportedProgram | ShapeEnv, size: Any) -> str | None:
    """The line of the module's own code that narrowed a size of its trace.

    Args:
        traced: a program made under `written_down`, or its symbols.
        size: of an axis: a ``SymInt``, or a symbol or expression, such as those in
            ``range_constraints``. Of what was replaced by a number, the symbol it was.

    Returns:
        file, number and text of the last line that narrowed it, by a comparison, or by making it
        equal to something else; None where no line of the module's did.
    """
    lines = _lines_of(traced)
    if lines is None:
        return None
    expr = size.node._expr if isinstance(size, torch.SymInt) else size
    symbols = getattr(expr, "free_symbols", ())
    for symbol in symbols:
        if symbol in lines.replaced:
            return lines.replaced[symbol][1]
    equal = [line for target, line in lines.replaced.values() if target == expr]
    ranges = [lines.ranges[symbol] for symbol in symbols if symbol in lines.ranges]
    return next(reversed([*equal, *ranges]), None)


def fixed_by(env: ShapeEnv, source: str) -> str | None:
    """The line of the module's own code that gave an axis of an input one size.

    Args:
        env: the symbols of a trace made under `written_down`.
        source: PyTorch's name for the axis, such as ``L['x'].size()[1]``.
    """
    for symbol, sources in env.var_to_sources.items():
        if source in {each.name if isinstance(each.name, str) else each.name() for each in sources}:
            return narrowed_by(env, symbol)
    return None


def guards_of(traced: torch.export.ExportedProgram | ShapeEnv) -> list[tuple[Expr, str]]:
    """What a trace assumed of its sizes beyond their ranges, and by which lines of the module's.

    Such as ``Ne(Mod(s0, 2), 0)`` of ``if x.shape[1] % 2 == 0:``; comparisons that a range or an
    equality says as well are among them.
    """
    lines = _lines_of(traced)
    return [] if lines is None else list(lines.guards.items())


def _lines_of(traced: torch.export.ExportedProgram | ShapeEnv) -> _Lines | None:
    if isinstance(traced, ShapeEnv):
        return _WRITTEN.get(traced)
    values = [node.meta.get("val") for node in traced.graph.nodes]
    mode = detect_fake_mode([value for value in values if isinstance(value, torch.Tensor)])
    return None if mode is None or mode.shape_env is None else _WRITTEN.get(mode.shape_env)


def _line(until: str) -> str | None:
    """The line that runs, or in a second pass over the graph the one an operator came from."""
    return running_line(until) or own_line(str(get_current_meta().get("stack_trace") or ""))


def _replace(lines: _Lines, line: str, env: ShapeEnv, symbol: Any, target: Any, *_: Any) -> None:
    if target != env.replacements.get(symbol):
        lines.replaced[symbol] = target, line


def _narrow(lines: _Lines, line: str, env: ShapeEnv, symbol: Any, range_: Any, *_: Any) -> None:
    known = env.var_to_range.get(symbol)
    if known is not None and (known & range_) != known:
        lines.ranges[symbol] = line


def _guard(lines: _Lines, line: str, env: ShapeEnv, prefix: str, guard: Any, *_: Any) -> None:
    del env, prefix
    lines.guards.setdefault(guard, line)
