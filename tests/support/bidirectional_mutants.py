"""Defects of graphs of attention without causal order, for the validator to find."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rope_export import Attention

WINDOW = 10


def causal_order_added(wrong: Attention) -> None:
    wrong.causal = True


def window_one_wider(wrong: Attention) -> None:
    wrong.window = WINDOW + 1


def window_one_narrower(wrong: Attention) -> None:
    wrong.window = WINDOW - 1


# --- whatever the operators: rows one token longer or shorter -----------------------------------


def rows_one_longer(model: onnx.ModelProto) -> None:
    """The first column of padding counts as a token."""
    _remask(model, "Max", before=1)


def rows_one_shorter(model: onnx.ModelProto) -> None:
    """The last token of a row that has padding counts as padding."""
    _remask(model, "Min", before=0)


def _remask(model: onnx.ModelProto, operator: str, *, before: int) -> None:
    """Combine the mask with itself moved by one column, to the right with ``before``."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "remasked"
    # Beyond the last column a row goes on as it ended.
    pads, start = ([0, 1, 0, 0], 0) if before else ([0, 0, 0, 1], 1)
    constants = {"pads": pads, "start": [start], "axis": [1]}
    for name, value in constants.items():
        array = np.array(value, dtype=np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, f"remask_{name}"))
    end = "remask_width" if before else "remask_end"
    nodes = [
        helper.make_node("Pad", ["attention_mask", "remask_pads"], ["remask_long"], mode="edge"),
        helper.make_node("Shape", ["attention_mask"], ["remask_width"], start=1, end=2),
        helper.make_node("Shape", ["remask_long"], ["remask_end"], start=1, end=2),
        helper.make_node(
            "Slice", ["remask_long", "remask_start", end, "remask_axis"], ["remask_moved"]
        ),
        helper.make_node(operator, ["attention_mask", "remask_moved"], ["remasked"]),
    ]
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)


# --- onnxruntime's own: calls, blocks and their edges --------------------------------------------


def calls_made_causal(model: onnx.ModelProto) -> None:
    for node in _nodes(model.graph):
        for attribute in node.attribute:
            if attribute.name == "causal":
                attribute.i = 1


def cut_one_later(model: onnx.ModelProto) -> None:
    _shift_lengths(model, 1)


def cut_one_earlier(model: onnx.ModelProto) -> None:
    _shift_lengths(model, -1)


def left_edge_lost(model: onnx.ModelProto) -> None:
    """A block sees no key before its first query."""
    body, places, start = _block(model)
    _see_less(body, helper.make_node("GreaterOrEqual", [places, start], ["edge"]))


def right_edge_lost(model: onnx.ModelProto) -> None:
    """A block sees no key of the next one."""
    body, places, start = _block(model)
    size = np.array(128, dtype=np.int64)
    model.graph.initializer.append(numpy_helper.from_array(size, "edge_size"))
    _see_less(
        body,
        helper.make_node("Add", [start, "edge_size"], ["edge_end"]),
        helper.make_node("Less", [places, "edge_end"], ["edge"]),
    )


def band_one_to_the_left(model: onnx.ModelProto) -> None:
    """Keys are those one place before, on either side."""
    _band(model, 1)


def band_one_to_the_right(model: onnx.ModelProto) -> None:
    _band(model, -1)


def _band(model: onnx.ModelProto, by: int) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(by, dtype=np.int64), "band_by"))
    (blocks,) = [  # not the one call of the other branch
        graph.node
        for graph in _graphs(model.graph)
        if {"Scan", "Abs"} <= {node.op_type for node in graph.node}
    ]
    (far,) = [node for node in blocks if node.op_type == "Abs"]
    place = list(blocks).index(far)
    moved = helper.make_node("Add", [far.input[0], "band_by"], ["moved"])
    far.input[0] = "moved"
    blocks.insert(place, moved)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _block(model: onnx.ModelProto) -> tuple[onnx.GraphProto, str, str]:
    """The body for a block of queries, places of its keys, and that of its first query."""
    (body,) = [
        graph
        for graph in _graphs(model.graph)
        if len(graph.input) == 2 and any(n.op_type == "GroupQueryAttention" for n in graph.node)
    ]
    (beyond,) = [node for node in body.node if node.op_type == "Less"]
    return body, beyond.input[0], body.input[1].name


def _see_less(body: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    (where,) = [node for node in body.node if node.op_type == "Where"]
    place = list(body.node).index(where)
    both = helper.make_node("And", [where.input[0], "edge"], ["edge_seen"])
    where.input[0] = "edge_seen"
    for offset, node in enumerate((*nodes, both)):
        body.node.insert(place + offset, node)


def _shift_lengths(model: onnx.ModelProto, by: int) -> None:
    """Every row is a token longer or shorter where it is cut, but no longer than there is room."""
    (scan,) = [node for node in _nodes(model.graph) if node.op_type == "Scan"]
    lengths = scan.input[-1]
    bounds = [(by, "by"), (1, "least"), (2**40, "most")]
    for value, name in bounds:
        array = np.array(value, dtype=np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, f"shift_{name}"))
    scan.input[-1] = "shifted"
    place = [node.name for node in model.graph.node].index(scan.name)
    nodes = [
        helper.make_node("Add", [lengths, "shift_by"], ["shift_sum"]),
        helper.make_node("Clip", ["shift_sum", "shift_least", "shift_most"], ["shift_clipped"]),
        helper.make_node("Shape", [scan.input[0]], ["shift_room"], start=1, end=2),
        helper.make_node("Min", ["shift_clipped", "shift_room"], ["shifted"]),
    ]
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)
