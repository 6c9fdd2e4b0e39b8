"""`Signature`: what a traced graph takes and gives, with axes in the caller's own labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rope_export.artifacts.cache_layout import KINDS, MASK, CacheLayout, LayerCache
from rope_export.errors import BadInputError
from rope_export.exporting.call import PAST, PRESENT, Leaf
from rope_export.exporting.dynamic_shapes import LabelledCall
from rope_export.exporting.guards import narrowed_by
from rope_export.exporting.labels import inverse, is_name, names_in, size_of, substituted
from rope_export.lowering.target import Lengths

Axes = dict[str, list[str | int]]
POSITIONS = "position_ids"
# Traced sizes begin at 2; what happens at 0 and 1 is for the proof to say.
_LEAST_TRACED = 2
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives.

    Attributes:
        inputs: axes of every input, sizes or labels.
        outputs: axes of every output.
        free: smallest and largest size of every label that stands for itself; None: no largest.
        limits: of labels whose largest size nobody asked for, what in the trace says it, in plain
            words.
        sequence: label of the axis of new tokens, or None.
        past: label of the axis of cached tokens, or None.
        kinds: for every output, where its tokens are, one of `trial.KINDS`.
        layers: of the caches, which layers there are.
        lengths: sequences whose length is bounded, in labels.
        new: label or size of the axis of new tokens, or None.
        reads_past: whether the module itself computes with the length of the past.
        masked: whether padding is told by a mask ``[batch, tokens]``.
        past_name: of caches that come in, with ``{layer}`` and ``{kind}`` (key or value).
        present_name: of those that go out, likewise.
    """

    inputs: Axes
    outputs: Axes
    free: dict[str, tuple[int, int | None]]
    sequence: str | None
    past: str | None
    kinds: dict[str, str]
    layers: tuple[int, ...] = ()
    lengths: tuple[str, ...] = ()
    new: str | int | None = None
    reads_past: bool = False
    masked: bool = False
    past_name: str = f"{PAST}.{{layer}}.{{kind}}"
    present_name: str = f"{PRESENT}.{{layer}}.{{kind}}"
    limits: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> str:
        """The first input."""
        return next(iter(self.inputs))

    def within(self, label: str, size: int) -> int:
        """The size nearest to ``size`` that a label may have."""
        low, high = self.free[label]
        return max(low, size if high is None else min(size, high))

    def new_tokens(self, sizes: Mapping[str, int]) -> int:
        """New tokens in a row, at given sizes."""
        return size_of(self.inputs[MASK][1] if self.new is None else self.new, sizes)

    def layout(
        self, *, capacity: int, packs_rows: bool, by_rows: bool, padding: str, ragged: bool
    ) -> CacheLayout | None:
        """How a `Decoder` drives the graph, or None where it takes more than that can feed."""
        if not self.layers or self.sequence is None or self.past is None:
            return None
        batch = self.inputs[self.tokens][0]
        new = [batch, self.sequence]
        pairs, presents = (
            [name.format(layer=n, kind=kind) for n in self.layers for kind in KINDS]
            for name in (self.past_name, self.present_name)
        )
        mask = self.masked
        known = {self.tokens, POSITIONS, *pairs, *([MASK] if mask else [])}
        given = [name for name in self.outputs if name not in presents]
        positions = self.inputs.get(POSITIONS)
        fits = (
            set(self.inputs) <= known
            and set(presents) <= set(self.outputs)
            and len(given) == 1
            and self.outputs[given[0]][:2] == new
            and self.inputs[self.tokens][:2] == new
            and (positions is None or positions[-2:] == new)
            and all(self.inputs[name][0] == batch for name in pairs)
            and all(self.kinds[name] == "cache" for name in presents)
        )
        if not fits:
            return None
        layers = []
        for n in self.layers:
            key, value = (self.inputs[self.past_name.format(layer=n, kind=kind)] for kind in KINDS)
            sizes = key[1], key[3], value[3]
            if not all(isinstance(size, int) for size in sizes):
                return None
            layers.append(LayerCache(*(int(size) for size in sizes)))
        axes = 0
        if positions is not None:
            axes = int(positions[0]) if len(positions) == 3 else 1
        return CacheLayout(
            layers=tuple(layers),
            capacity=capacity,
            # A buffer longer than the past needs a mask that says how long the past is, and
            # nothing that takes the buffer's length for it.
            packs_rows=packs_rows and mask and not self.reads_past,
            by_rows=by_rows,
            padding=padding,
            position_axes=axes,
            tokens=self.tokens,
            output=given[0],
            past=self.past_name,
            present=self.present_name,
            mask=mask,
            ragged=mask and ragged and not (packs_rows and self.reads_past),
        )


def signature_of(
    labelled: LabelledCall,
    program: torch.export.ExportedProgram,
    outputs: Sequence[Leaf],
    lengths: Sequence[Lengths],
) -> Signature:
    """Read the signature of a traced program.

    Args:
        labelled: what was asked.
        program: traced from flat tensors.
        outputs: names of its results.
        lengths: what attentions and rotations were given.

    Raises:
        BadInputError: an axis that was to be dynamic came out fixed or with a narrower range.
    """
    names = labelled.call.names
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, nodes[len(nodes) - len(names) :], strict=True))
    sizes = {
        (name, axis): given[name].meta["val"].shape[axis] for name, axis, _ in labelled.asked()
    }
    for name, axis, asked in labelled.asked():
        if not isinstance(sizes[name, axis], torch.SymInt):
            raise BadInputError(
                f"axis {axis} of {name} ({asked.label}) was to be dynamic and came out as "
                f"{sizes[name, axis]}: the module works with that size only"
            )
    labels = _Labels(labelled, sizes)
    for each in lengths:
        labels.relate(each)
    inputs: Axes = {}
    for leaf, tensor, of_leaf in zip(
        labelled.call.leaves, labelled.call.tensors, labelled.axes, strict=True
    ):
        inputs[leaf.name] = [
            labels.resolved(of_leaf[axis].label) if axis in of_leaf else size
            for axis, size in enumerate(tensor.shape)
        ]
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    gives: Axes = {
        leaf.name: [
            labels.of(size, f"{leaf.name}_{axis}")
            for axis, size in enumerate(node.meta["val"].shape)
        ]
        for leaf, node in zip(outputs, results, strict=True)
    }
    news = [labels.of(each.new, "") for each in lengths]
    pasts = [labels.of(0 if each.past is None else each.past, "") for each in lengths]
    layers = tuple(
        dict.fromkeys(
            leaf.layer
            for leaf in labelled.call.leaves
            if leaf.layer is not None and leaf.name.startswith(f"{PAST}.")
        )
    )
    first = inputs[names[0]]
    sequence = _first_label([*news, *first[1:2]])
    past = _first_label([*pasts, *(inputs[f"{PAST}.{n}.key"][2] for n in layers)])
    totals = [f"{a}+{b}" for a, b in zip(pasts, news, strict=True) if a and b]
    totals += [f"{past}+{sequence}"] if past and sequence else []
    bounding = {text for text in [*news, *pasts, *totals] if isinstance(text, str) and text}
    if labelled.asked_longest is not None and sequence:
        # Of a module of the caller's own, too, tokens are what a longest sequence is of.
        bounding |= {f"{past}+{sequence}"} if past else {sequence}
    limits: dict[str, str] = {}
    free = {
        label: labels.range_of(label, program, limits, past=label == past, bounding=bounding)
        for label in labels.free()
    }
    batch = first[0] if first else None
    length: str | int | None = sequence
    of_mask = inputs[MASK][1] if _is_padding_mask(inputs) else None
    if length is None and len(first) > 1 and (layers or of_mask == first[1]):
        length = first[1]
    kinds = {leaf.name: _kind(leaf, gives[leaf.name], batch, length, past) for leaf in outputs}
    return Signature(
        inputs,
        gives,
        free,
        sequence,
        past,
        kinds,
        layers,
        tuple(sorted(bounding)),
        length,
        _reads_past([given[name] for name in names if name.startswith(f"{PAST}.")]),
        _is_padding_mask(inputs),
        limits=limits,
    )


def _is_padding_mask(inputs: Axes) -> bool:
    axes, first = inputs.get(MASK, []), next(iter(inputs.values()))
    return len(axes) == 2 and axes[:1] == first[:1] and axes[0] != axes[1]


def _reads_past(pasts: Sequence[torch.fx.Node]) -> bool:
    """Whether some operator is given the number of cached tokens."""
    sizes = [
        user
        for past in pasts
        for user in past.users
        if user.target is torch.ops.aten.sym_size.int and user.args[1] == 2
    ]
    return any(user.users for user in sizes)


def _first_label(sizes: Sequence[str | int]) -> str | None:
    return next((size for size in sizes if isinstance(size, str) and size), None)


def _kind(
    leaf: Leaf,
    axes: list[str | int],
    batch: str | int | None,
    length: str | int | None,
    past: str | None,
) -> str:
    if leaf.layer is not None and past is not None and _is_sum(axes[2], past, length):
        return "cache"
    if length is not None and len(axes) > 1 and axes[:2] == [batch, length]:
        return "tokens"
    return "whole"


def _is_sum(total: str | int, past: str, new: str | int | None) -> bool:
    """Whether a cache has as many columns as there are cached and new tokens."""
    if new is None:
        return False
    names = dict.fromkeys([*names_in(past), *names_in(str(new))])
    sizes = {name: 16 + 24 * index for index, name in enumerate(names)}
    known = set(names_in(str(total))) <= set(sizes)
    return known and size_of(total, sizes) == size_of(past, sizes) + size_of(new, sizes)


class _Labels:
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
