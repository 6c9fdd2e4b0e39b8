"""Defects of graphs and blocks with a cache, for the validator to find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import torch
from mutants import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    WINDOW,
    BlockMutation,
    GraphMutation,
    _attribute,
    change,
    table,
)
from onnx import helper, numpy_helper

from rope_export import Attention
from rope_export.attention.norm import Norm
from rope_export.attention.specs import QKNorm

# Here the graph is that of the wrong block; its right block is made by mending the defect.


def window_one_wider(right: Attention) -> None:
    right.window = WINDOW - 1


def window_one_narrower(right: Attention) -> None:
    right.window = WINDOW + 1


def window_dropped(right: Attention) -> None:
    right.window = WINDOW


def sinks_dropped(right: Attention) -> None:
    right.sinks = torch.nn.Parameter(_drawn(right, (HEADS,)))


def sinks_that_weigh_nothing(right: Attention) -> None:
    """The graph has sinks where the block's are as good as none."""
    assert right.sinks is not None
    right.sinks.data.fill_(-1e4)


def sinks_of_other_heads(right: Attention) -> None:
    assert right.sinks is not None
    right.sinks.data = right.sinks.data.roll(1)


def softcap_dropped(right: Attention) -> None:
    right.softcap = 50.0


def softcap_two_percent_off(right: Attention) -> None:
    assert right.softcap is not None
    right.softcap *= 1.02


def norm_epsilon_off(right: Attention) -> None:
    assert right.q_norm is not None
    assert right.k_norm is not None
    right.q_norm.eps = right.k_norm.eps = 1e-2


def norms_exchanged(right: Attention) -> None:
    assert right.q_norm is not None
    assert right.k_norm is not None
    right.q_norm.weight, right.k_norm.weight = right.k_norm.weight, right.q_norm.weight


def norms_dropped(right: Attention) -> None:
    for name in ("q_norm", "k_norm"):
        norm = Norm(QKNorm(), HEADS if name == "q_norm" else KV_HEADS, HEAD_DIM)
        norm.weight.data = 1 + _drawn(right, (HEAD_DIM,)) / 4
        setattr(right, name, norm)


def values_of_other_heads(right: Attention) -> None:
    width = right.value_head_dim
    for parameter in right.v_proj.parameters():
        parameter.data = parameter.data.roll(width, dims=0)


def projection_biases_dropped(right: Attention) -> None:
    for layer in (right.q_proj, right.k_proj, right.v_proj):
        _give_bias(right, layer)


def output_bias_dropped(right: Attention) -> None:
    _give_bias(right, right.o_proj)


def _give_bias(right: Attention, layer: torch.nn.Linear) -> None:
    layer.bias = torch.nn.Parameter(_drawn(right, (layer.out_features,)) / 8)


def _drawn(block: Attention, shape: Sequence[int]) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return drawn.to(block.dtype)


# Defects, with the variant whose graph has them.
CACHED_BLOCK_MUTANTS: tuple[tuple[BlockMutation, str], ...] = (
    (window_one_wider, "varied"),
    (window_one_narrower, "varied"),
    (window_dropped, "plain"),
    (sinks_dropped, "plain"),
    (sinks_that_weigh_nothing, "varied"),
    (sinks_of_other_heads, "varied"),
    (softcap_dropped, "plain"),
    (softcap_two_percent_off, "varied"),
    (norm_epsilon_off, "varied"),
    (norms_exchanged, "varied"),
    (norms_dropped, "plain"),
    (values_of_other_heads, "varied"),
    (projection_biases_dropped, "plain"),
    (output_bias_dropped, "plain"),
)
CAPPED_BLOCK_MUTANTS: tuple[BlockMutation, ...] = (
    window_one_wider,
    window_one_narrower,
    softcap_two_percent_off,
    values_of_other_heads,
)


# --- defects in the graph of a block with a cache -------------------------------------------


def nodes_of(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    """All nodes of a type, those in branches and loops included."""
    return [n for g in _graphs(model.graph) for n in g.node if n.op_type == op_type]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _read_instead(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for graph in _graphs(model.graph):
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]


def _first(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _constant(model: onnx.ModelProto, name: str, value: object, dtype: type = np.int64) -> str:
    array = np.array(value, dtype=dtype)
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def presents_exchanged(model: onnx.ModelProto) -> None:
    names = {"present_key": "present_value", "present_value": "present_key"}
    _read_instead(model, names)
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def pasts_exchanged(model: onnx.ModelProto) -> None:
    _read_instead(model, {"past_key": "past_value", "past_value": "past_key"})


def key_slot_stale(model: onnx.ModelProto) -> None:
    """One slot of the cache holds what its neighbour does."""
    slot = _constant(model, "defect.slot", 7)
    before = _constant(model, "defect.before", 6)
    _move_slots(
        model,
        "present_key",
        helper.make_node("Equal", ["defect.slots", slot], ["defect.hit"]),
        helper.make_node("Where", ["defect.hit", before, "defect.slots"], ["defect.source"]),
    )


def newest_value_not_appended(model: onnx.ModelProto) -> None:
    """The last slot holds what the one before it does."""
    zero = _constant(model, "defect.from", 0)
    two = _constant(model, "defect.two", 2)
    _move_slots(
        model,
        "present_value",
        helper.make_node("Sub", ["defect.total", two], ["defect.last"]),
        helper.make_node("Min", ["defect.slots", "defect.last"], ["defect.bounded"]),
        helper.make_node("Max", ["defect.bounded", zero], ["defect.source"]),
    )


def _move_slots(model: onnx.ModelProto, name: str, *choose: onnx.NodeProto) -> None:
    zero, one = _constant(model, "defect.zero", 0), _constant(model, "defect.one", 1)
    right = _rename_output(model, name)
    model.graph.node.extend(
        [
            helper.make_node("Shape", [right], ["defect.size"], start=2, end=3),
            helper.make_node("Squeeze", ["defect.size"], ["defect.total"]),
            helper.make_node("Range", [zero, "defect.total", one], ["defect.slots"]),
            *choose,
            helper.make_node("Gather", [right, "defect.source"], [name], axis=2),
        ]
    )


def _rename_output(model: onnx.ModelProto, name: str) -> str:
    right = f"defect.{name}"
    _read_instead(model, {name: right})
    for node in model.graph.node:
        node.output[:] = [right if output == name else output for output in node.output]
    return right


def value_slot_empty(model: onnx.ModelProto) -> None:
    """Zeros in one slot of the cache."""
    right = _rename_output(model, "present_value")
    slot = _constant(model, "defect.slot", [[[[2]]]])
    zero, one = _constant(model, "defect.zero", 0), _constant(model, "defect.one", 1)
    axes = _constant(model, "defect.axes", [0, 1, 3])
    model.graph.node.extend(
        [
            helper.make_node("Shape", [right], ["defect.size"], start=2, end=3),
            helper.make_node("Squeeze", ["defect.size"], ["defect.total"]),
            helper.make_node("Range", [zero, "defect.total", one], ["defect.slots"]),
            helper.make_node("Unsqueeze", ["defect.slots", axes], ["defect.column"]),
            helper.make_node("Equal", ["defect.column", slot], ["defect.hit"]),
            helper.make_node("CastLike", [zero, right], ["defect.nothing"]),
            helper.make_node("Where", ["defect.hit", "defect.nothing", right], ["present_value"]),
        ]
    )


def past_ignored(model: onnx.ModelProto) -> None:
    """Zeros in its place."""
    _read_instead(model, {name: f"defect.{name}" for name in ("past_key", "past_value")})
    for name in ("past_key", "past_value"):
        _first(model, helper.make_node("Sub", [name, name], [f"defect.{name}"]))


def mask_ignored(model: onnx.ModelProto) -> None:
    """Padding counts as tokens."""
    _read_instead(model, {"attention_mask": "defect.ones"})
    ones = numpy_helper.from_array(np.array([1], dtype=np.int64))
    _first(
        model,
        helper.make_node("Shape", ["attention_mask"], ["defect.size"]),
        helper.make_node("ConstantOfShape", ["defect.size"], ["defect.ones"], value=ones),
    )


def positions_begin_anew(model: onnx.ModelProto) -> None:
    """The new tokens of every call stand at 0, 1, …, whatever the past."""
    zero, one = _constant(model, "defect.zero", 0), _constant(model, "defect.one", 1)
    axis = _constant(model, "defect.axis", [0])
    _first(
        model,
        helper.make_node("Shape", ["hidden_states"], ["defect.size"], start=0, end=2),
        helper.make_node("Shape", ["hidden_states"], ["defect.new"], start=1, end=2),
        helper.make_node("Squeeze", ["defect.new"], ["defect.length"]),
        helper.make_node("Range", [zero, "defect.length", one], ["defect.row"]),
        helper.make_node("Unsqueeze", ["defect.row", axis], ["defect.one_row"]),
        helper.make_node("Expand", ["defect.row", "defect.size"], ["defect.rows"]),
    )
    for node in nodes_of(model, "Gather"):
        if node.input[0].startswith("rope.angles."):
            node.input[1] = "defect.rows"
    scanned = [n for scan in nodes_of(model, "Scan") for n in scan.attribute[0].g.node]
    for node in nodes_of(model, "GroupQueryAttention"):
        if _attribute(node, "do_rotary"):
            node.input.extend([""] * (10 - len(node.input)))
            node.input[9] = "defect.one_row" if node in scanned else "defect.rows"


def mask_of_columns(model: onnx.ModelProto) -> None:
    """A token's place is its column, padding counted, in order and positions."""
    counting = [
        node
        for kind in ("CumSum", "Slice", "Cast")
        for node in nodes_of(model, kind)
        if node.input[0] == "attention_mask"
    ]
    assert {"CumSum", "Cast"} <= {node.op_type for node in counting}  # in order, and positions
    ones = numpy_helper.from_array(np.array([1], dtype=np.int64))
    place = min(list(model.graph.node).index(node) for node in counting)
    for node in counting:
        node.input[0] = "defect.ones"
    for node in (
        helper.make_node("ConstantOfShape", ["defect.size"], ["defect.ones"], value=ones),
        helper.make_node("Shape", ["attention_mask"], ["defect.size"]),
    ):
        model.graph.node.insert(place, node)


CACHED_GRAPH_MUTANTS: tuple[GraphMutation, ...] = (
    presents_exchanged,
    pasts_exchanged,
    key_slot_stale,
    newest_value_not_appended,
    value_slot_empty,
    past_ignored,
    mask_ignored,
    positions_begin_anew,
)
# These change what is answered after a past that is right, beside the present.
MISREAD_PAST = (pasts_exchanged, past_ignored, mask_ignored, positions_begin_anew)


def norm_after_rotation(model: onnx.ModelProto) -> None:
    """A rotation keeps the mean square: what comes after it is the norm's weight."""
    for name, heads in (("q_norm.weight", HEADS), ("k_norm.weight", KV_HEADS)):
        weight = table(model, name)
        late = numpy_helper.to_array(weight).astype(np.float32)
        change(weight, np.ones_like)
        (reader,) = [n for n in model.graph.node if name in n.input]
        turned = _rotation_after(model, reader)
        if _attribute(turned, "num_heads") is not None:
            late = np.tile(late, heads)
        output = turned.output[0]
        if turned.op_type == "Concat":  # the operator turns in float32, arithmetic as it is given
            late = late.astype(numpy_helper.to_array(table(model, "o_proj.weight")).dtype)
        model.graph.initializer.append(numpy_helper.from_array(late, f"defect.{name}"))
        turned.output[0] = f"defect.{output}"
        scaled = helper.make_node("Mul", [turned.output[0], f"defect.{name}"], [output])
        model.graph.node.insert(list(model.graph.node).index(turned) + 1, scaled)


def _rotation_after(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.NodeProto:
    """Where the heads that a node gives have been turned."""
    names = set(node.output)
    for later in model.graph.node:
        if names & set(later.input):
            joined = later.op_type == "Concat" and _attribute(later, "axis") == -1
            if later.op_type == "RotaryEmbedding" or joined:
                return later
            names |= set(later.output)
    raise AssertionError("nothing is rotated")


def lengths_one_less(model: onnx.ModelProto) -> None:
    _shift_lengths(model, -1)


def lengths_one_more(model: onnx.ModelProto) -> None:
    _shift_lengths(model, 1)


def _shift_lengths(model: onnx.ModelProto, by: int) -> None:
    (lengths,) = {
        name
        for graph in _graphs(model.graph)
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
        for name in [node.input[5]]
        if any(name in n.output for n in model.graph.node)
    }
    step = _constant(model, "defect.step", by, np.int32)
    _read_instead(model, {lengths: "defect.lengths"})
    place = [lengths in n.output for n in model.graph.node].index(True) + 1
    shifted = helper.make_node("Add", [lengths, step], ["defect.lengths"])
    model.graph.node.insert(place, shifted)


def branches_exchanged(model: onnx.ModelProto, which: int) -> None:
    names = {"then_branch": "else_branch", "else_branch": "then_branch"}
    for attribute in nodes_of(model, "If")[which].attribute:
        attribute.name = names[attribute.name]


def rest_of_the_buffer_lost(model: onnx.ModelProto) -> None:
    """A long prompt's present is as long as the prompt, not as the buffer it goes into."""
    rests = [n for n in nodes_of(model, "Slice") if n.input[0] in ("past_key", "past_value")]
    assert len(rests) == 2
    for node in rests:
        node.input[1] = node.input[2]


def long_chunk_taken_for_a_prompt(model: onnx.ModelProto) -> None:
    """Computed in blocks, which know no past."""
    conditions = {n.input[0] for n in nodes_of(model, "If")}
    (both,) = [n for n in nodes_of(model, "And") if n.output[0] in conditions]
    long = next(n.output[0] for n in nodes_of(model, "Greater") if n.output[0] in both.input)
    both.input[:] = [long, long]


def _of_single_tokens(model: onnx.ModelProto) -> onnx.NodeProto:
    """The call whose queries are scaled before."""
    calls = nodes_of(model, "GroupQueryAttention")
    (single,) = [n for n in calls if _attribute(n, "scale") == 1.0]
    return single


def queries_of_single_tokens_unscaled(model: onnx.ModelProto) -> None:
    name = _of_single_tokens(model).input[0]
    (cast,) = [n for n in nodes_of(model, "Cast") if name in n.output] or [None]
    scaled = name if cast is None else cast.input[0]
    (by,) = [n for n in nodes_of(model, "Mul") if scaled in n.output]
    change(table(model, by.input[1]), np.ones_like)


def sinks_of_single_tokens_weigh(model: onnx.ModelProto) -> None:
    change(table(model, _of_single_tokens(model).input[11]), np.zeros_like)


def window_attribute_off(model: onnx.ModelProto, which: int, by: int) -> None:
    attributes = nodes_of(model, "GroupQueryAttention")[which].attribute
    (window,) = [a for a in attributes if a.name == "local_window_size"]
    window.i += by
