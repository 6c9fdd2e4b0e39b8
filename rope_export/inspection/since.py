"""Since when onnxruntime can do what: one table of it, and what of it a graph asks for.

Everything here was tried with the CPU builds of onnxruntime 1.15 to 1.31 and compared with float64.
A version is the oldest that runs it *and is right*, which may be later than the first whose schema
has it: caches of integers are in the schema from 1.25 on and run from 1.27 on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

GQA = "com.microsoft::GroupQueryAttention"
# In the order of its schema.
GQA_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
    "cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale",
    "q_norm_weight", "k_norm_weight",
)  # fmt: skip
_FULL = "NONE"  # of the types of a cache: not of integers
_ATTN_MASK = 3  # an input of the standard's Attention


@dataclass(frozen=True)
class Node:
    """What of a node says which onnxruntime it needs.

    Attributes:
        operator: ``domain::name``, or ``name`` for the standard's own.
        inputs: places of those that are given.
        attributes: numbers and texts by name, None for any other.
        shapeless: it has a subgraph some output of which states no shape.
    """

    operator: str
    inputs: frozenset[int] = frozenset()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    shapeless: bool = False


@dataclass(frozen=True)
class Feature:
    """What an operator can be asked for from some onnxruntime on.

    Attributes:
        operator: as of `Node`.
        version: the oldest onnxruntime that has it and is right.
        what: what it is, in plain words.
        shows: whether a node of that operator asks for it; None where a node does not show it.
        attribute: the attribute that asks for it, where its being there is enough to be refused
            by an older one.
        input: likewise, the name of an input.
    """

    operator: str
    version: str
    what: str
    shows: Callable[[Node], bool] | None = None
    attribute: str | None = None
    input: str | None = None

    def asked_for_by(self, node: Node) -> bool:
        """Whether a node asks for it."""
        if node.operator != self.operator:
            return False
        if self.attribute is not None:
            return self.attribute in node.attributes
        if self.input is not None:
            return GQA_INPUTS.index(self.input) in node.inputs
        return self.shows is not None and self.shows(node)


def _attribute(name: str, version: str) -> Feature:
    return Feature(GQA, version, f"GroupQueryAttention with {name}", attribute=name)


def _input(name: str, version: str) -> Feature:
    return Feature(GQA, version, f"GroupQueryAttention with {name}", input=name)


BIDIRECTIONAL = _attribute("causal", "1.30")
WINDOW_CACHE = _attribute("sliding_window_cache", "1.29")
INTEGER_CACHE = Feature(
    GQA,
    "1.27",
    "GroupQueryAttention with a cache of integers",
    lambda node: any(
        node.attributes.get(name, _FULL) != _FULL for name in ("k_quant_type", "v_quant_type")
    ),
)
# Before, queries had to be float32.
HALF_INTEGER_CACHE = Feature(
    GQA, "1.29", "GroupQueryAttention with a cache of integers and half-precision queries"
)
PAST_ALONE = Feature(GQA, "1.27", "GroupQueryAttention without new keys and values")
SINKS = _input("head_sink", "1.23")
BIAS = _input("attention_bias", "1.22")
# Before, a window had one key more than it says.
WINDOW = Feature(
    GQA,
    "1.24",
    "GroupQueryAttention with a window (of one key more before)",
    lambda node: node.attributes.get("local_window_size", -1) != -1,
)
# Before, scores were capped after the mask hid them: silently wrong numbers.
SOFTCAP_BEHIND_MASK = Feature(
    "Attention",
    "1.27",
    "Attention with a soft cap and hidden keys",
    lambda node: (
        node.attributes.get("softcap", 0.0) != 0.0
        and (node.attributes.get("is_causal", 0) != 0 or _ATTN_MASK in node.inputs)
    ),
)
SHAPELESS_SCAN = Feature(
    "Scan", "1.25", "a Scan whose body states no shapes", lambda node: node.shapeless
)

# What graphs made here may ask for.
OURS = (
    BIDIRECTIONAL,
    WINDOW_CACHE,
    INTEGER_CACHE,
    HALF_INTEGER_CACHE,
    PAST_ALONE,
    SINKS,
    BIAS,
    WINDOW,
    SOFTCAP_BEHIND_MASK,
    SHAPELESS_SCAN,
)
FEATURES: tuple[Feature, ...] = (
    *OURS,
    Feature(GQA, "1.18", "GroupQueryAttention on the CPU", lambda _: True),
    _attribute("smooth_softmax", "1.19"),
    _attribute("softcap", "1.20"),
    _attribute("qk_output", "1.23"),
    _attribute("k_quant_type", "1.25"),
    _attribute("v_quant_type", "1.25"),
    _attribute("kv_cache_bit_width", "1.25"),
    _attribute("qk_norm_epsilon", "1.28"),
    _input("position_ids", "1.22"),
    _input("k_scale", "1.25"),
    _input("v_scale", "1.25"),
    _input("q_norm_weight", "1.28"),
    _input("k_norm_weight", "1.28"),
    *(
        Feature(f"com.microsoft::{name}", "1.25", name, lambda _: True)
        for name in ("LinearAttention", "CausalConvWithState")
    ),
)

# From which version on graphs of which opset of the standard, and of which IR version, load.
OPSETS = {20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 25: "1.24", 26: "1.25"}
IR_VERSIONS = {10: "1.18", 11: "1.23", 13: "1.24"}
NEWEST = "1.31"  # of those tried


@dataclass(frozen=True)
class Need:
    """What a graph asks for, and the oldest onnxruntime that has it.

    Attributes:
        version: the oldest.
        what: in plain words.
    """

    version: str
    what: str


def needs(nodes: Iterable[Node], opset: int, ir_version: int) -> tuple[Need, ...]:
    """What a graph asks for that not every onnxruntime has, what is newest first.

    Args:
        nodes: all of them, of subgraphs and functions too.
        opset: version of the standard's operators.
        ir_version: of the format.
    """
    found = {
        feature.what: Need(feature.version, feature.what)
        for node in nodes
        for feature in FEATURES
        if feature.asked_for_by(node)
    }
    known = list(found.values())
    for what, number, table in (
        (f"opset {opset}", opset, OPSETS),
        (f"IR version {ir_version}", ir_version, IR_VERSIONS),
    ):
        loading = [version for highest, version in sorted(table.items()) if number <= highest]
        if loading and number >= min(table):
            known.append(Need(loading[0], what))
    return tuple(sorted(known, key=lambda need: (*(-n for n in parts(need.version)), need.what)))


def of_model(model: Any) -> tuple[Need, ...]:
    """What an ``onnx.ModelProto`` asks for, what is newest first."""
    opset = max((each.version for each in model.opset_import if not each.domain), default=1)
    return needs(map(_of_proto, every_node(model)), opset, model.ir_version)


def every_node(model: Any) -> Iterator[Any]:
    """All ``onnx.NodeProto`` of an ``onnx.ModelProto``, of subgraphs and functions too."""
    yield from _nodes(model.graph.node)
    for function in model.functions:
        yield from _nodes(function.node)


def _nodes(protos: Iterable[Any]) -> Iterator[Any]:
    for proto in protos:
        yield proto
        for graph in _subgraphs(proto):
            yield from _nodes(graph.node)


def _subgraphs(proto: Any) -> list[Any]:
    return [graph for a in proto.attribute for graph in ([a.g] if a.HasField("g") else a.graphs)]


def _of_proto(proto: Any) -> Node:
    from onnx import AttributeProto

    read = {
        AttributeProto.INT: lambda a: a.i,
        AttributeProto.FLOAT: lambda a: a.f,
        AttributeProto.STRING: lambda a: a.s.decode(errors="replace"),
    }
    return Node(
        f"{proto.domain}::{proto.op_type}" if proto.domain else proto.op_type,
        frozenset(place for place, name in enumerate(proto.input) if name),
        {a.name: read[a.type](a) if a.type in read else None for a in proto.attribute},
        any(
            not value.type.tensor_type.HasField("shape")
            for graph in _subgraphs(proto)
            for value in graph.output
        ),
    )


def parts(version: str) -> tuple[int, ...]:
    """Major and minor number of a version, to compare."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def is_older(version: str, than: str) -> bool:
    """Whether a version is older than another, as far as the minor number."""
    return parts(version) < parts(than)


def latest(versions: Iterable[str]) -> str:
    """The latest of some versions."""
    return max(versions, key=parts)
