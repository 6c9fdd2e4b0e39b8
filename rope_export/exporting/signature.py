"""`Signature`: what a traced graph takes and gives, with axes in the caller's own labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rope_export.artifacts.cache_layout import BITS, KINDS, MASK, CacheLayout, LayerCache
from rope_export.errors import BadInputError
from rope_export.exporting.call import PAST, PRESENT, Leaf
from rope_export.exporting.dynamic_shapes import LabelledCall
from rope_export.exporting.labelled_sizes import LabelledSizes
from rope_export.exporting.labels import names_in, size_of
from rope_export.lowering.target import Lengths

Axes = dict[str, list[str | int]]
POSITIONS = "position_ids"


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
        windows: of layers whose cache holds the window only, the window.
        cache_dtype: of the integers that caches hold, one of `cache_layout.BITS`, or None.
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
    cache_dtype: str | None = None
    windows: Mapping[int, int] = field(default_factory=dict)

    def windowed(self) -> dict[str, int]:
        """Outputs that hold a cache of the window, and the window."""
        return {
            self.present_name.format(layer=n, kind=kind): window
            for n, window in self.windows.items()
            for kind in KINDS
        }

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
            heads, *widths = key[1], key[3], value[3]
            if not all(isinstance(size, int) for size in (heads, *widths)):
                return None
            per_entry = 1 if self.cache_dtype is None else 8 // BITS[self.cache_dtype]
            head_dim, value_head_dim = (int(width) * per_entry for width in widths)
            window = self.windows.get(n, 0)
            slots = key[2] if window and isinstance(key[2], int) else 0
            layers.append(LayerCache(int(heads), head_dim, value_head_dim, window, slots))
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
            dtype=self.cache_dtype,
        )


def signature_of(
    labelled: LabelledCall,
    program: torch.export.ExportedProgram,
    outputs: Sequence[Leaf],
    lengths: Sequence[Lengths],
    windows: Mapping[int, int],
) -> Signature:
    """Read the signature of a traced program.

    Args:
        labelled: what was asked.
        program: traced from flat tensors.
        outputs: names of its results.
        lengths: what attentions and rotations were given.
        windows: of layers whose cache holds the window only, the window.

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
    labels = LabelledSizes(labelled, sizes)
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
    keys = {n: inputs[f"{PAST}.{n}.key"] for n in layers}
    past = _first_label([*pasts, *(axes[2] for n, axes in keys.items() if n not in windows)])
    if windows:
        past = past or _past_in_mask(inputs, sequence)
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
    for n, window in windows.items():
        slots = keys[n][2]
        if isinstance(slots, str) and slots in free:
            low, high = free[slots]
            free[slots] = max(low, window), high
    batch = first[0] if first else None
    length: str | int | None = sequence
    of_mask = inputs[MASK][1] if _is_padding_mask(inputs) else None
    if length is None and len(first) > 1 and (layers or of_mask == first[1]):
        length = first[1]
    kinds = {leaf.name: _kind(leaf, gives[leaf.name], batch, length, past) for leaf in outputs}
    kept = [n for n in windows for kind in KINDS if f"{PRESENT}.{n}.{kind}" in kinds]
    kinds |= {f"{PRESENT}.{n}.{kind}": "cache" for n in kept for kind in KINDS}
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
        _reads_past(
            [
                given[leaf.name]
                for leaf in labelled.call.leaves
                if leaf.name.startswith(f"{PAST}.") and leaf.layer not in windows
            ]
        ),
        _is_padding_mask(inputs),
        limits=limits,
        windows=windows,
    )


def _past_in_mask(inputs: Axes, sequence: str | None) -> str | None:
    """Label of the cached tokens where only a mask counts them.

    Raises:
        BadInputError: it does not.
    """
    columns = inputs[MASK][1] if _is_padding_mask(inputs) else None
    others = [name for name in names_in(str(columns)) if name != sequence]
    if isinstance(columns, int) and sequence is None:  # of one size
        return None
    if columns is None or len(others) != 1 or not _is_sum(columns, others[0], sequence):
        raise BadInputError(
            f"a cache of the window does not say how many tokens there were: {MASK} [batch, past "
            f"and new tokens] must be an input, and its axis 1 labelled as their sum, such as "
            f"'past_sequence+{sequence or 'sequence'}', got {columns or 'none'}"
        )
    return others[0]


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
