"""`LabelledSizes`: sizes of a trace in the caller's labels, and which of them are served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from rope_export.errors import BadInputError
from rope_export.exporting.dynamic_shapes import LabelledCall
from rope_export.exporting.guards import narrowed_by
from rope_export.exporting.labels import inverse, is_name, names_in, size_of, substituted
from rope_export.lowering.target import Lengths

# Traced sizes begin at 2; what happens at 0 and 1 is for the proof to say.
_LEAST_TRACED = 2
_UNBOUNDED = 2**31 - 1


class LabelledSizes:
    """The caller's labels of the sizes a trace found.

    Args:
        labelled: has the labels.
        sizes: for every labelled axis, its size in the trace.
    """

    def __init__(
        self, labelled: LabelledCall, sizes: Mapping[tuple[str, int], torch.SymInt]
    ) -> None:
        self._asked = list(labelled.asked())
        self._labelled = labelled
        self._texts: dict[Any, str] = {}  # what is written for a symbol of the trace
        self._derived: dict[str, str] = {}
        self._exprs: dict[str, list[Any]] = {}
        for name, axis, asked in self._asked:
            expr = sizes[name, axis].node.expr
            self._exprs.setdefault(asked.label, []).append(expr)
            if not expr.is_Symbol:
                continue
            known = self._texts.setdefault(expr, asked.label)
            if known != asked.label and is_name(asked.label):
                self._derived.setdefault(asked.label, known)
            elif known != asked.label and is_name(known):
                self._derived.setdefault(known, asked.label)
        for label, exprs in self._exprs.items():
            composed = next((expr for expr in exprs if not expr.is_Symbol), None)
            if composed is not None and is_name(label) and label not in self._derived:
                text = self._written(composed)
                if text is not None and _same_as(label, text):
                    self._texts[composed] = label
                    continue
                if text is None or label in names_in(text):
                    raise BadInputError(
                        f"the axis labelled {label} came out as {composed}, which cannot be "
                        "written in the other labels; label the axes it depends on too"
                    )
                self._derived[label] = text

    def relate(self, lengths: Lengths) -> None:
        """A mask has as many columns as there are cached and new tokens."""
        if lengths.past is None or lengths.total is None:
            return
        total, past, new = (self.of(x, "") for x in (lengths.total, lengths.past, lengths.new))
        if not all((total, past, new)) or not isinstance(total, str) or not is_name(total):
            return
        if total not in self._derived and total not in (past, new):
            self._derived[total] = f"{past}+{new}"

    def _written(self, expr: Any) -> str | None:
        """A size of the trace in labels, or None where it is no arithmetic on them."""
        if expr in self._texts:
            return self._texts[expr]
        text = str(expr)
        for symbol in expr.free_symbols:
            if symbol not in self._texts:
                return None
            label = self._texts[symbol]
            label = label if is_name(label) else f"({label})"
            text = re.sub(rf"\b{symbol}\b", label, text)
        text = text.replace(" ", "")
        try:
            names_in(text)
        except BadInputError:
            return None
        return text

    def of(self, size: Any, otherwise: str) -> str | int:
        """The label of a size, or ``otherwise`` where it has none."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        if expr.is_number:
            return int(expr)
        text = self._written(expr)
        return otherwise if text is None else self.resolved(text)

    def resolved(self, label: str) -> str:
        """A label in those that stand for themselves."""
        return substituted(label, self._derived)

    def free(self) -> list[str]:
        """Labels that stand for themselves, in the order of the inputs."""
        found = [
            name for _, _, asked in self._asked for name in names_in(self.resolved(asked.label))
        ]
        return list(dict.fromkeys(found))

    def range_of(
        self,
        label: str,
        program: torch.export.ExportedProgram,
        limits: dict[str, str],
        *,
        past: bool,
        bounding: set[str],
    ) -> tuple[int, int | None]:
        """Sizes served: as asked, as the trace allows, and no longer than the longest sequence.

        Args:
            label: one that stands for itself.
            program: the trace.
            limits: filled with what bounds a label that nobody asked a largest size of.
            past: whether it counts cached tokens.
            bounding: labels of sequences that are no longer than the longest one.

        Raises:
            BadInputError: the trace serves less than was asked for.
        """
        low, wanted = self._wanted(label)
        least = (0 if past else 1) if low is None else low
        asked_longest = self._labelled.asked_longest
        if asked_longest is not None:
            for text in bounding:
                if label in names_in(text):
                    wanted = _bounded(text, label, least, wanted, asked_longest)
        served = self._served(label, program, low)
        if served is not None and wanted is not None and served[0] < wanted:
            raise BadInputError(
                f"{label} was to serve sizes up to {wanted} and came out as at most "
                f"{served[0]}{_by(served[1])}"
            )
        high = wanted
        if served is not None and wanted is None:
            high = served[0]
            limits[label] = f"the graph serves {label} up to {high}{_by(served[1])}"
        bounded = high
        for text in bounding:
            bounded = _bounded(text, label, least, bounded, self._labelled.longest)
            alone = dict.fromkeys(names_in(text), 0) | {label: high or 0}
            too_long = label in names_in(text) and size_of(text, alone) > self._labelled.longest
            if wanted is not None and too_long:
                raise BadInputError(
                    f"{label} was to serve sizes up to {wanted} and comes out as at most "
                    f"{bounded}: the longest sequence is {self._labelled.longest}, "
                    f"{self._labelled.why_longest}"
                )
        return least, bounded

    def _wanted(self, label: str) -> tuple[int | None, int | None]:
        """The smallest and largest size asked of a label, or of arithmetic on it alone."""
        lows, highs = [], []
        for _, _, each in self._asked:
            if names_in(each.label) != (label,):
                continue
            if each.low is not None:
                lows.append(
                    each.low if each.label == label else inverse(each.label, each.low, up=True)
                )
            if each.high is not None:
                highs.append(each.high if each.label == label else inverse(each.label, each.high))
        return max(lows, default=None), min(highs, default=None)

    def _served(
        self, label: str, program: torch.export.ExportedProgram, low: int | None
    ) -> tuple[int, str | None] | None:
        """The largest size of a label in the trace, and the line that made it so.

        Raises:
            BadInputError: the smallest one is larger than was asked for.
        """
        found: list[tuple[int, str | None]] = []
        for text, exprs in self._exprs.items():
            if names_in(text) != (label,):
                continue
            for expr in exprs:
                range_ = program.range_constraints.get(expr)
                if range_ is None or not expr.is_Symbol:
                    continue
                line = narrowed_by(program, expr)
                least = int(range_.lower)
                if text == label and least > max(_LEAST_TRACED, low or 0):
                    raise BadInputError(
                        f"{label} was to serve sizes from {low or 1} and came out as {least} and "
                        f"more{_by(line)}; if that is meant, give "
                        f"torch.export.Dim({label!r}, min={least})"
                    )
                if range_.upper < _UNBOUNDED:
                    most = int(range_.upper)
                    found.append((most if text == label else inverse(text, most), line))
        return min(found, key=lambda each: each[0], default=None)


def _by(line: str | None) -> str:
    return "" if line is None else f", by {line}"


def _same_as(label: str, text: str) -> bool:
    """Whether arithmetic on a label comes to the label itself, as in ``(s-1)+1``."""
    if names_in(text) != (label,):
        return False
    return all(size_of(text, {label: size}) == size for size in (16, 24, 96, 1024))


def _bounded(text: str, label: str, low: int, high: int | None, longest: int) -> int | None:
    """The largest size of ``label`` at which ``text`` is not over ``longest``."""
    names = names_in(text)
    if label not in names:
        return high
    # Beside new tokens there may be no past; beside a past there is a new token.
    least = dict.fromkeys(names, int(low == 0)) | {label: low}
    most = high if high is not None and high < longest else longest
    while low < most:
        middle = (low + most + 1) // 2
        if size_of(text, least | {label: middle}) <= longest:
            low = middle
        else:
            most = middle - 1
    return most
