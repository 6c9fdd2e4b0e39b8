"""Attention in an ONNX graph, and what it keeps in memory for every pair of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from rope_export.inspection import values

WRITTEN_OUT = "MatMul, Softmax, MatMul"
_CONTRIB = "com.microsoft::"
_PRODUCTS = frozenset({"MatMul", "Einsum", f"{_CONTRIB}FusedMatMul"})
# What may stand between a product and its softmax, and between the softmax and the next product.
_ON_SCORES = values.VIEWS | {"Add", "Sub", "Mul", "Div", "Where", "Tanh", "Concat", "Expand"}
_ON_SCORES |= {"Max", "Min", "Clip", "Slice", "Neg", "Pad"}
_ON_WEIGHTS = values.VIEWS | {"Where", "Mul", "Slice", "Dropout", "Expand", "Add", "Sub", "Split"}
_ON_MASKS = values.VIEWS | {"Not", "Where", "Slice", "Expand", "Mul", "Sub", "Tile", "Add", "And"}
_FAR = 60


@dataclass(frozen=True)
class AttentionUse:
    """Attention of the same kind.

    Attributes:
        operator: what attends, or `WRITTEN_OUT`.
        nodes: where; the Softmax nodes where it is written out.
        heads: query heads, where the operator states them.
        kv_heads: key and value heads, likewise.
        window: sliding window, likewise.
        window_cache: whether its cache holds the window only.
        cache_bits: of the integers its cache holds, or None: it holds none, as far as stated.
        scores: whether a score for every pair of tokens is in memory: ``"always"``,
            ``"on cpu"``: on onnxruntime's CPU provider, or ``"never"``; None: unknown.
    """

    operator: str
    nodes: tuple[str, ...]
    heads: int | None = None
    kv_heads: int | None = None
    window: int | None = None
    window_cache: bool = False
    cache_bits: int | None = None
    scores: str | None = None


@dataclass(frozen=True)
class Mask:
    """A constant mask of scores.

    Attributes:
        name: of the initializer.
        shape: its axes, the last two those of queries and keys.
        cut: whether the part is taken that a sequence needs; else it fits one length alone.
    """

    name: str
    shape: tuple[int, ...]
    cut: bool

    @property
    def length(self) -> int:
        """Keys it is made for."""
        return self.shape[-1]


# Index of the mask added to the scores.
_MASKS = {
    "Attention": 3,
    f"{_CONTRIB}MultiHeadAttention": 5,
    f"{_CONTRIB}GroupQueryAttention": 10,
    f"{_CONTRIB}Attention": 5,
}
_NEVER = frozenset({f"{_CONTRIB}GroupQueryAttention"})
# Inputs that keep MultiHeadAttention on the CPU from its kernel of linear memory: masks and past.
_MHA_MASKS_AND_PAST = (4, 5, 6, 7)
_OTHERS = frozenset(
    f"{_CONTRIB}{name}"
    for name in (
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "DynamicSparseAttention",
        "LongformerAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "SparseAttention",
        "SparsePagedAttention",
    )
)
_ON_CPU = frozenset({"Attention", f"{_CONTRIB}Attention", f"{_CONTRIB}QAttention"})
# Attention's inputs and outputs that are its cache: past key, past value.
PASTS = {
    "Attention": (4, 5),
    f"{_CONTRIB}GroupQueryAttention": (3, 4),
    f"{_CONTRIB}MultiHeadAttention": (6, 7),
    f"{_CONTRIB}DecoderMaskedMultiHeadAttention": (5, 6),
    f"{_CONTRIB}SparseAttention": (3, 4),
}


def attention(
    nodes: Iterable[tuple[str, ir.Node]],
) -> tuple[tuple[AttentionUse, ...], tuple[Mask, ...]]:
    """Find attention, equal ones together, and the constant masks its scores meet."""
    nodes = list(nodes)
    scanned = _in_scans(node for _, node in nodes)
    alike: dict[AttentionUse, list[str]] = {}
    masks: dict[Mask, None] = {}
    for label, node in nodes:
        name = values.operator(node)
        if name == "Softmax":
            scores = _scores(node)
            if not scores or not _weighs(node):
                continue
            use = AttentionUse(WRITTEN_OUT, (), scores="always")
            met = [value for score in scores for value in _met_by(score)]
        elif name in _NEVER | _OTHERS | _ON_CPU or name == f"{_CONTRIB}MultiHeadAttention":
            use = _fused(name, node, in_parts=id(node) in scanned)
            met = [values.argument(node, _MASKS[name])] if name in _MASKS else []
        else:
            continue
        alike.setdefault(use, []).append(label)
        masks.update(dict.fromkeys(mask for value in met for mask in _constant_masks(value)))
    uses = tuple(replace(use, nodes=tuple(labels)) for use, labels in alike.items())
    return uses, tuple(masks)


def _fused(name: str, node: ir.Node, *, in_parts: bool) -> AttentionUse:
    heads = values.integer(node, "num_heads") or values.integer(node, "q_num_heads")
    window = values.integer(node, "local_window_size", -1) or 0
    scores = "never" if name in _NEVER else "on cpu" if name in _ON_CPU else None
    if name in _NEVER and values.integer(node, "causal", 1) == 0 and not in_parts:
        scores = "on cpu"
    if name == f"{_CONTRIB}MultiHeadAttention":
        whole = values.integer(node, "unidirectional", 0) or any(
            values.argument(node, index) is not None for index in _MHA_MASKS_AND_PAST
        )
        scores = "on cpu" if whole else "never"
    return AttentionUse(
        name,
        (),
        heads=heads,
        kv_heads=values.integer(node, "kv_num_heads"),
        window=window if window > 0 else None,
        window_cache=values.integer(node, "sliding_window_cache", 0) == 1,
        cache_bits=values.integer(node, "kv_cache_bit_width") or None,
        scores=scores,
    )


def _in_scans(nodes: Iterable[ir.Node]) -> set[int]:
    """Nodes that are run for a part of the tokens at a time, by their ids."""
    bodies = [
        node.attributes["body"].as_graph()
        for node in nodes
        if node.op_type == "Scan" and "body" in node.attributes
    ]
    return {id(node) for body in bodies for node in body.all_nodes()}


def _scores(softmax: ir.Node) -> list[ir.Node]:
    """Nodes between a softmax and the product of queries and keys; empty without such a product.

    The softmax itself is the first of them.
    """
    on_the_way, found = [], False
    pending = [softmax]
    seen: set[int] = set()
    while pending and len(seen) < _FAR:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if values.operator(node) in _PRODUCTS:
            found = found or not any(values.is_weight(value) for value in node.inputs)
            continue
        if node is not softmax and (node.domain or node.op_type not in _ON_SCORES):
            continue
        on_the_way.append(node)
        makers = [value.producer() for value in node.inputs if value is not None]
        pending += [maker for maker in makers if maker is not None]
    return on_the_way if found else []


def _weighs(softmax: ir.Node) -> bool:
    """Whether the softmax goes on to weigh values: the first factor of a product."""
    pending = [softmax]
    seen: set[int] = set()
    while pending and len(seen) < _FAR:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for output in node.outputs:
            for user, index in output.uses():
                if values.operator(user) in _PRODUCTS:
                    others = [x for i, x in enumerate(user.inputs) if i != index]
                    if index == 0 and not any(values.is_weight(other) for other in others):
                        return True
                elif not user.domain and user.op_type in _ON_WEIGHTS:
                    pending.append(user)
    return False


def _met_by(node: ir.Node) -> Iterator[ir.Value | None]:
    """What scores are added to or chosen by."""
    if node.op_type in ("Add", "Where"):
        yield from node.inputs


def _constant_masks(value: ir.Value | None) -> Iterator[Mask]:
    """Constants with an axis for queries and one for keys, as they are or cut."""
    pending = [(value, False)]
    seen: set[int] = set()
    while pending and len(seen) < _FAR:
        at, cut = pending.pop()
        if at is None or id(at) in seen:
            continue
        seen.add(id(at))
        tensor, node = values.tensor_of(at), at.producer()
        if tensor is not None:
            shape = values.dimensions(tensor)
            if len(shape) >= 2 and min(shape[-2:]) > 1:
                yield Mask(at.name or "", shape, cut)
        elif node is not None and not node.domain and node.op_type in _ON_MASKS:
            bounds = node.op_type == "Slice" and values.numbers(values.argument(node, 2)) is None
            inputs = node.inputs[:1] if node.op_type in values.VIEWS | {"Slice"} else node.inputs
            pending += [(x, cut or bounds) for x in inputs]
