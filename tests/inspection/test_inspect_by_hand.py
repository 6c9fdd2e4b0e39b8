"""Inspection finds rotation and attention in arithmetic built by hand, and nothing else there."""

from __future__ import annotations

import numpy as np
import pytest
from inspected import (
    FLOAT,
    GQA,
    INT64,
    WRITTEN_OUT,
    Graph,
    angles_of,
    concatenated,
    half_by_slices,
    saved,
    sliced,
    turned_at_once,
)
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rope_export.inspection.report import inspect_model


def half_by_split(graph: Graph, x: str) -> tuple[str, str]:
    first, second = graph.op("Split", x, outputs=2, axis=-1, num_outputs=2).split()
    return first, second


def every_other(graph: Graph, x: str) -> tuple[str, str]:
    return sliced(graph, x, 0, 2**62, 2), sliced(graph, x, 1, 2**62, 2)


def pairs_by_gather(graph: Graph, x: str) -> tuple[str, str]:
    pairs = graph.op("Reshape", x, graph.constant([0, 0, 0, 4, 2]))
    first, second = (
        graph.op("Gather", pairs, graph.constant(i, np.int64), axis=-1) for i in (0, 1)
    )
    return first, second


def stacked(graph: Graph, first: str, second: str) -> str:
    last = graph.constant([-1])
    both = [graph.op("Unsqueeze", x, last) for x in (first, second)]
    return graph.op("Reshape", graph.op("Concat", *both, axis=-1), graph.constant([0, 0, 0, 8]))


SPLITS = {
    "half, slices": (half_by_slices, concatenated, "half"),
    "half, split": (half_by_split, concatenated, "half"),
    "interleaved, every other": (every_other, stacked, "interleaved"),
    "interleaved, pairs": (pairs_by_gather, stacked, "interleaved"),
}


def turned_by_halves(graph: Graph, x: str, split, join, source: str) -> str:
    """``(a cos - b sin, b cos + a sin)``."""
    cos, sin = angles_of(graph, source, 4)
    a, b = split(graph, x)
    first = graph.op("Sub", graph.op("Mul", a, cos), graph.op("Mul", b, sin))
    second = graph.op("Add", graph.op("Mul", cos, b), graph.op("Mul", sin, a))
    return join(graph, first, second)


@pytest.mark.parametrize("source", ["computed", "table", "constant"])
@pytest.mark.parametrize("turn", [turned_at_once, turned_by_halves])
@pytest.mark.parametrize("parts", SPLITS)
def test_arithmetic(parts, turn, source, tmp_path):
    split, join, layout = SPLITS[parts]
    graph = Graph()
    heads = graph.op("MatMul", "x", graph.constant(np.eye(8), np.float32, "weight"))
    out = turn(graph, heads, split, join, f"{source} {layout}")
    inputs = {"x": (FLOAT, [1, 2, "sequence", 8]), "positions": (INT64, ["sequence"])}
    model = graph.model(inputs, out)

    x = np.random.default_rng(0).standard_normal((1, 2, 9, 8)).astype(np.float32)
    at = np.arange(9)
    (got,) = ReferenceEvaluator(model).run(None, {"x": x, "positions": at})
    turns = np.exp(1j * np.outer(at, 10000.0 ** (-np.arange(4) / 4)))
    a, b = (x[..., :4], x[..., 4:]) if layout == "half" else (x[..., ::2], x[..., 1::2])
    truth = (a + 1j * b) * turns
    want = np.concatenate([truth.real, truth.imag], -1)
    if layout == "interleaved":
        want = np.stack([truth.real, truth.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(got, want, atol=1e-5)  # what is inspected is a rotation

    report = inspect_model(saved(model, tmp_path))
    (rotation,) = report.rotations
    assert (rotation.operator, len(rotation.nodes)) == ("arithmetic", 1)
    assert (rotation.layout, rotation.width, rotation.angles.kind) == (layout, 8, source)
    longest = {"computed": None, "table": 32, "constant": 9}[source]
    assert report.longest == longest
    assert report.positions == ("unbounded" if longest is None else "bounded")
    expected = () if source == "constant" else ("positions",)
    assert rotation.angles.positions == expected
    trap = [note for note in report.notes if "constants of 9 tokens" in note]
    assert len(trap) == (source == "constant")


@pytest.mark.parametrize("kind", ["gate", "learned", "no sign", "other halves"])
def test_arithmetic_that_is_no_rotation(kind, tmp_path):
    graph = Graph()
    cos, sin = angles_of(graph, "table half", 8)
    if kind == "gate":  # a * b + c, as in a gated projection
        a, b = half_by_slices(graph, "x")
        out = graph.op("Add", graph.op("Mul", a, b), graph.op("Mul", b, a))
    elif kind == "learned":  # channels weighed by what is the same at every position
        weights = [graph.constant(np.ones(8), np.float32) for _ in range(2)]
        a, b = half_by_slices(graph, "x")
        turned = graph.op("Concat", graph.op("Neg", b), a, axis=-1)
        out = graph.op("Add", graph.op("Mul", "x", weights[0]), graph.op("Mul", turned, weights[1]))
    elif kind == "no sign":
        a, b = half_by_slices(graph, "x")
        turned = graph.op("Concat", b, a, axis=-1)
        out = graph.op("Add", graph.op("Mul", "x", cos), graph.op("Mul", turned, sin))
    else:  # turned by the channels of something else
        other = graph.op("MatMul", "x", graph.constant(np.eye(8), np.float32))
        a, b = half_by_slices(graph, other)
        turned = graph.op("Concat", graph.op("Neg", b), a, axis=-1)
        out = graph.op("Add", graph.op("Mul", "x", cos), graph.op("Mul", turned, sin))
    inputs = {"x": (FLOAT, [1, 2, "sequence", 8]), "positions": (INT64, ["sequence"])}
    report = inspect_model(saved(graph.model(inputs, out), tmp_path))
    assert report.rotations == ()


def test_local_functions_are_looked_into_where_they_are_called(tmp_path):
    inner = Graph()
    out = turned_at_once(inner, "x", half_by_slices, concatenated, "computed half")
    imports = [helper.make_opsetid("", 18)]
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in inner.constants
    ]
    function = helper.make_function(
        "own", "Rotate", ["x", "positions"], [out], [*constants, *inner.nodes], imports
    )
    outer = Graph()
    for name in ("q", "k"):
        outer.nodes.append(
            helper.make_node("Rotate", [name, "positions"], [f"{name}_turned"], domain="own")
        )
    heads = [1, 2, "sequence", 8]
    inputs = {"q": (FLOAT, heads), "k": (FLOAT, heads), "positions": (INT64, ["sequence"])}
    model = outer.model(inputs, "q_turned", "k_turned", functions=[function])
    model.opset_import.append(helper.make_opsetid("own", 1))
    report = inspect_model(saved(model, tmp_path))
    assert report.functions == {"own::Rotate": 2}
    assert sum(len(rotation.nodes) for rotation in report.rotations) == 2
    assert report.operators["Cos"] == 2
    assert "own::Rotate" not in report.operators

    function.node.append(helper.make_node("Rotate", ["x", "positions"], ["again"], domain="own"))
    endless = outer.model(inputs, "q_turned", "k_turned", functions=[function])
    report = inspect_model(saved(endless, tmp_path))
    assert any("local functions are looked at alone" in note for note in report.notes)


# --- operators ------------------------------------------------------------------------------


def test_rotary_embedding_of_onnxruntime_and_attention_that_is_causal(tmp_path):
    graph = Graph()
    tables = [graph.constant(np.ones((64, 4)), np.float32, name) for name in ("cos", "sin")]
    turned = [
        graph.op(
            "RotaryEmbedding", name, "at", *tables, domain="com.microsoft", interleaved=1,
            num_heads=2,
        )
        for name in ("q", "k")
    ]  # fmt: skip
    attend = {"domain": "com.microsoft", "num_heads": 2}
    causal = graph.op("MultiHeadAttention", *turned, "v", unidirectional=1, **attend)
    free = graph.op("MultiHeadAttention", *turned, "v", **attend)
    masked = graph.op("MultiHeadAttention", *turned, "v", "", "", "mask", **attend)
    heads = (FLOAT, ["batch", "sequence", 16])
    inputs = {"q": heads, "k": heads, "v": heads, "at": (INT64, ["batch", "sequence"])}
    inputs["mask"] = (FLOAT, ["batch", 1, "sequence", "sequence"])
    report = inspect_model(saved(graph.model(inputs, causal, free, masked), tmp_path))
    (rotation,) = report.rotations
    assert (rotation.operator, len(rotation.nodes)) == ("com.microsoft::RotaryEmbedding", 2)
    assert (rotation.layout, rotation.width) == ("interleaved", 8)
    assert rotation.angles.positions == ("at",)
    assert sum(table.bytes for table in rotation.angles.tables) == 2 * 64 * 4 * 4
    assert report.longest == 64
    scores = {node: use.scores for use in report.attention for node in use.nodes}
    assert scores == {"node_2": "on cpu", "node_3": "never", "node_4": "on cpu"}
    assert [use.heads for use in report.attention] == [2, 2]


def test_rotation_inside_attention_with_tables_by_length(tmp_path):
    graph = Graph()
    branches = {}
    for name, rows in (("then_branch", 64), ("else_branch", 16)):
        tables = [
            numpy_helper.from_array(np.ones((rows, 4), np.float32), f"{kind}_{rows}")
            for kind in ("cos", "sin")
        ]
        outputs = [helper.make_tensor_value_info(t.name, FLOAT, [rows, 4]) for t in tables]
        branches[name] = helper.make_graph([], name, [], outputs, tables)
    chosen = graph.op("If", "long", outputs=2, **branches).split()
    attend = {"num_heads": 2, "kv_num_heads": 1, "do_rotary": 1, "rotary_interleaved": 1}
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "last", "total",
             *chosen, "at"],
            ["out", "present.0.key", "present.0.value"],
            name="attends", domain="com.microsoft", **attend,
        )
    )  # fmt: skip
    past = (FLOAT, ["batch", 1, "past", 8])
    heads = (FLOAT, ["batch", "sequence", 16])
    inputs = {"q": heads, "k": heads, "v": heads, "long": (TensorProto.BOOL, [])}
    inputs |= {f"past_key_values.{i}.{kind}": past for i in (0, 1) for kind in ("key", "value")}
    inputs |= {name: (TensorProto.INT32, []) for name in ("last", "total")}
    inputs["at"] = (INT64, ["batch", "sequence"])
    model = graph.model(inputs, "out", "present.0.key", "present.0.value")
    report = inspect_model(saved(model, tmp_path))
    (rotation,) = report.rotations
    assert (rotation.operator, rotation.nodes) == (GQA, ("attends",))
    assert (rotation.layout, rotation.width, rotation.angles.kind) == ("interleaved", 8, "table")
    assert rotation.angles.positions == ("at",)
    assert "first position id only" in rotation.remark
    assert report.longest == 64  # the longer tables are there for long sequences
    assert {table.shape for table in rotation.angles.tables} == {(64, 4), (16, 4)}
    assert report.cache is not None
    assert report.cache.layers == 2
    assert len(report.cache.inputs) == 4
    assert report.cache.outputs == ("present.0.key", "present.0.value")


def test_scores_masks_and_a_softmax_that_is_no_attention(tmp_path):
    graph = Graph()
    keys = graph.op("Transpose", "k", perm=[0, 1, 3, 2])
    scores = graph.op("MatMul", "q", keys)
    length = graph.op("Shape", "q", start=2, end=3)
    whole = graph.constant(np.zeros((1, 1, 128, 128)), np.float32, "whole")
    zero, axis = graph.constant([0]), graph.constant([3])
    part = graph.op("Slice", whole, zero, length, axis)
    weights = graph.op("Softmax", graph.op("Add", scores, part), axis=-1)
    fixed = graph.constant(np.zeros((1, 1, 32, 32)), np.float32, "fixed")
    others = graph.op("Softmax", graph.op("Add", scores, fixed), axis=-1)
    gates = graph.op("MatMul", "q", graph.constant(np.ones((8, 4)), np.float32))
    router = graph.op("Softmax", gates, axis=-1)
    outs = [graph.op("MatMul", x, "v") for x in (weights, others)]
    outs.append(graph.op("MatMul", router, graph.constant(np.ones((4, 8)), np.float32)))
    heads = (FLOAT, ["batch", 2, "sequence", 8])
    model = graph.model({"q": heads, "k": heads, "v": heads}, *outs)
    report = inspect_model(saved(model, tmp_path))
    assert (report.rotations, report.positions, report.longest) == ((), "none", None)
    (use,) = report.attention
    assert (use.operator, len(use.nodes), use.scores) == (WRITTEN_OUT, 2, "always")
    assert {mask.name: (mask.length, mask.cut) for mask in report.masks} == {
        "whole": (128, True),
        "fixed": (32, False),
    }
    assert [note for note in report.notes if "mask" in note] == [
        "the mask fixed is a constant [1, 1, 32, 32]: it fits one length"
    ]
