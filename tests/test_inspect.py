"""Inspection says of graphs what is known from how they were built, and of the rest one line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from rope_export._cli import main as commands
from rope_export._cli.inspect import inspect

from rope_export import Attention, BadInputError, RotaryEmbedding, export
from rope_export.inspection.report import inspect_model
from rope_export.synthetic import random_block

GQA, MHA = "com.microsoft::GroupQueryAttention", "com.microsoft::MultiHeadAttention"
WRITTEN_OUT = "MatMul, Softmax, MatMul"
LONGEST = 48
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def counted(graph: onnx.GraphProto) -> Counter[str]:
    """Operators of a graph and its subgraphs, straight from the file."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                counts += counted(attribute.g)
    return counts


def saved(model: onnx.ModelProto, tmp_path: Path, name: str = "model.onnx") -> Path:
    path = tmp_path / name
    onnx.save(model, path)
    return path


# --- exports of this package ----------------------------------------------------------------

# What is exported, and: operator that rotates, how often, layout, width, angles, positions' input;
# operator that attends, how often, heads, key/value heads, where scores are in memory.
EXPORTS = {
    "ort, float16, cache": (
        {"dtype": "float16"},
        {"target": "ort", "cache": True},
        (GQA, 3, "half", 16, "table", ()),  # one token, the whole batch, and row by row
        (GQA, 3, 4, 2, "never"),
    ),
    "ort, window, cache": (
        {"window": 8, "max_seq_len": 1024, "layout": "interleaved"},
        {"target": "ort", "cache": True},
        ("RotaryEmbedding", 2, "interleaved", 16, "table", ("attention_mask",)),
        (GQA, 4, 4, 2, "never"),  # one token, by blocks, at once, row by row
    ),
    "onnx, partial, interleaved, positions": (
        {"rotary_dim": 8, "layout": "interleaved"},
        {"target": "onnx", "position_ids": True},
        ("RotaryEmbedding", 2, "interleaved", 8, "table", ("position_ids",)),
        ("Attention", 1, 4, 2, "on cpu"),
    ),
    "onnx, float16, cache": (
        {"dtype": "float16"},
        {"target": "onnx", "cache": True},
        ("RotaryEmbedding", 2, "half", 16, "table", ("attention_mask",)),
        ("Attention", 1, 4, 2, "on cpu"),
    ),
    "primitive, float16, partial, interleaved, cache": (
        {"dtype": "float16", "rotary_dim": 8, "layout": "interleaved"},
        {"target": "primitive", "cache": True},
        ("arithmetic", 2, "interleaved", 8, "table", ("attention_mask",)),
        (WRITTEN_OUT, 1, None, None, "always"),
    ),
    "primitive, angles by length": (
        {
            "scaling": {
                "rope_type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"target": "primitive"},
        ("arithmetic", 2, "half", 16, "computed", ()),
        (WRITTEN_OUT, 1, None, None, "always"),
    ),
    "primitive, static": (
        {},
        {"target": "primitive", "static": True},
        ("arithmetic", 2, "half", 16, "constant", ()),
        (WRITTEN_OUT, 1, None, None, "always"),
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_own_exports(name, tmp_path):
    shape, options, rotation, attends = EXPORTS[name]
    size = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": LONGEST}
    block = random_block(**{**size, **shape})
    result = export(block, tmp_path / "block", validate=False, **options)
    model = onnx.load(result.path / "model.onnx")
    report = inspect_model(result.path / "model.onnx")

    operator, count, layout, width, kind, positions = rotation
    longest = shape.get("max_seq_len", LONGEST)
    (found,) = report.rotations
    assert (found.operator, len(found.nodes), found.layout) == (operator, count, layout)
    assert (found.width, found.angles.kind, found.angles.positions) == (width, kind, positions)
    assert (report.positions, report.longest) == ("bounded", longest)
    if kind != "computed":
        half = shape.get("dtype") == "float16" and operator == GQA  # else tables stay float32
        assert [table.shape for table in found.angles.tables] == [(longest, width // 2)] * 2
        assert sum(t.bytes for t in found.angles.tables) == longest * width * (2 if half else 4)

    operator, count, heads, kv_heads, scores = attends
    (use,) = report.attention
    assert (use.operator, len(use.nodes), use.scores) == (operator, count, scores)
    assert (use.heads, use.kv_heads) == (heads, kv_heads)
    assert use.window == (shape.get("window") if operator == GQA else None)

    assert report.operators == counted(model.graph)
    assert report.ir_version == model.ir_version
    assert report.opsets["ai.onnx"] == {"ort": 23, "onnx": 23, "primitive": 18}[options["target"]]
    assert report.producer.startswith("rope-export ")
    assert report.weights[shape.get("dtype", "float32")] >= 64 * (64 + 32 + 32 + 64) * 2
    assert (report.external, report.local_paths) == ((), None)
    if options.get("static"):
        assert report.inputs[0].axes == (1, LONGEST, 64)
        assert [mask.length for mask in report.masks] == [LONGEST]
        assert any("constants of 48 tokens" in note for note in report.notes)
        assert any("no axis of any input is dynamic" in note for note in report.notes)
    else:
        assert report.inputs[0].axes == ("batch", "sequence", 64)
        assert report.notes == ()
    if options.get("cache"):
        assert report.cache is not None
        assert report.cache.layers == 1
        assert report.cache.inputs == ("past_key", "past_value")
        assert report.cache.outputs == ("present_key", "present_value")
        assert report.cache.axes == ("batch", 2, "past_sequence", 16)
    else:
        assert report.cache is None


def test_without_a_longest_position_and_both_ways(tmp_path):
    rope = RotaryEmbedding(8, layout="half")
    block = Attention(64, 4, causal=False, rope=rope).eval()
    result = export(block, tmp_path / "endless", target="ort", validate=False)
    report = inspect_model(result.path / "model.onnx")
    assert (report.positions, report.longest) == ("bounded", 2**25)  # beyond them is NaN
    (rotation,) = report.rotations
    assert (rotation.operator, rotation.layout, rotation.width) == ("RotaryEmbedding", "half", 8)
    assert len(rotation.angles.tables) == 4  # two pairs, composed
    assert [(use.operator, use.scores) for use in report.attention] == [(MHA, "never")]


# --- plain exports --------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
def test_a_plain_export_of_a_llama(tmp_path):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = LlamaRotaryEmbedding(config)
            self.attention = LlamaAttention(config, 0)

        def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            turns = self.rotary(hidden, position_ids)
            return self.attention(hidden, turns, attention_mask=None)[0]

    path = tmp_path / "llama.onnx"
    axes = ({0: "batch", 1: "sequence"},) * 2
    inputs = torch.zeros(2, 9, 64), torch.arange(9).expand(2, -1)
    torch.onnx.export(Layer().eval(), inputs, path, dynamo=True, dynamic_shapes=axes, verbose=False)
    plain = onnx.load(path, load_external_data=False)
    report = inspect_model(path)
    (rotation,) = report.rotations
    assert (rotation.operator, len(rotation.nodes)) == ("arithmetic", 2)  # q and k
    assert (rotation.layout, rotation.width) == ("half", 16)
    assert (rotation.angles.kind, rotation.angles.tables) == ("computed", ())
    assert rotation.angles.positions == ("position_ids",)
    assert (report.positions, report.longest) == ("unbounded", None)
    (use,) = report.attention
    assert (use.operator, len(use.nodes), use.scores) == (WRITTEN_OUT, 1, "always")
    assert [each.axes for each in report.inputs] == [
        ("batch", "sequence", 64),
        ("batch", "sequence"),
    ]
    assert report.operators == counted(plain.graph)
    traced = sum(
        any('File "/' in entry.value for entry in node.metadata_props) for node in plain.graph.node
    )
    assert traced > 30
    assert report.local_paths is not None
    assert report.local_paths.nodes == traced
    assert report.local_paths.example.endswith(".py")
    assert any(f"{traced} nodes carry local file paths" in note for note in report.notes)
    (file,) = report.external
    assert (file.name, file.problem) == ("llama.onnx.data", None)


# --- arithmetic, built by hand --------------------------------------------------------------


class Graph:
    """Nodes by name of operator, and their constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: object, dtype: type = np.int64, name: str = "") -> str:
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def op(self, name: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        made = [f"{name}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(name, inputs, made, name=f"node_{len(self.nodes)}", **attributes)
        )
        return made[0] if outputs == 1 else " ".join(made)

    def model(
        self,
        inputs: dict[str, tuple[int, list[int | str]]],
        *outputs: str,
        opset: int = 18,
        ir_version: int = 10,
        **options: object,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(n, kind, axes) for n, (kind, axes) in inputs.items()],
            [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
            self.constants,
        )
        versions = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=ir_version, **options)


def sliced(graph: Graph, x: str, start: int, end: int, step: int = 1, axis: int = 3) -> str:
    return graph.op("Slice", x, *(graph.constant([n]) for n in (start, end, axis, step)))


def half_by_slices(graph: Graph, x: str) -> tuple[str, str]:
    return sliced(graph, x, 0, 4), sliced(graph, x, 4, 2**62)


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


def concatenated(graph: Graph, first: str, second: str) -> str:
    return graph.op("Concat", first, second, axis=-1)


SPLITS = {
    "half, slices": (half_by_slices, concatenated, "half"),
    "half, split": (half_by_split, concatenated, "half"),
    "interleaved, every other": (every_other, stacked, "interleaved"),
    "interleaved, pairs": (pairs_by_gather, stacked, "interleaved"),
}


def angles_of(graph: Graph, source: str, width: int) -> tuple[str, str]:
    """Cosines and sines ``[1, 1, S, width]`` of 8 channels, repeated for ``width`` 8."""
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    if width == 8 and source.endswith("half"):
        frequencies = np.concatenate([frequencies, frequencies])
    elif width == 8:
        frequencies = np.repeat(frequencies, 2)
    angles = np.outer(np.arange(32), frequencies)
    if source.startswith("computed"):
        at = graph.op("Cast", graph.op("Unsqueeze", "positions", graph.constant([1])), to=FLOAT)
        turns = graph.op("Mul", at, graph.constant(frequencies, np.float32))
        cos, sin = graph.op("Cos", turns), graph.op("Sin", turns)
    elif source.startswith("table"):
        tables = [graph.constant(f(angles), np.float32) for f in (np.cos, np.sin)]
        cos, sin = (graph.op("Gather", table, "positions") for table in tables)
    else:
        return tuple(  # type: ignore[return-value]
            graph.constant(f(angles[None, None, :9]), np.float32) for f in (np.cos, np.sin)
        )
    first = graph.constant([0, 1])
    return graph.op("Unsqueeze", cos, first), graph.op("Unsqueeze", sin, first)


def turned_at_once(graph: Graph, x: str, split, join, source: str) -> str:
    """``x * cos + (-b, a) * sin``."""
    cos, sin = angles_of(graph, source, 8)
    first, second = split(graph, x)
    turned = join(graph, graph.op("Neg", second), first)
    return graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", turned, sin))


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


# --- files ----------------------------------------------------------------------------------


def rotating(tmp_path: Path, **options: object) -> Path:
    graph = Graph()
    heads = graph.op("MatMul", "x", graph.constant(np.eye(8), np.float32, "weight"))
    out = turned_at_once(graph, heads, half_by_slices, concatenated, "table half")
    inputs = {"x": (FLOAT, [1, 2, "sequence", 8]), "positions": (INT64, ["sequence"])}
    return saved(graph.model(inputs, out, **options), tmp_path)


def test_external_weights_are_not_needed(tmp_path):
    model = onnx.load(rotating(tmp_path))
    (tmp_path / "apart").mkdir()
    path = tmp_path / "apart" / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    data = path.with_name("weights.bin")
    report = inspect_model(path)
    assert [(f.name, f.bytes, f.problem) for f in report.external] == [
        ("weights.bin", data.stat().st_size, None)
    ]
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    problem = inspect_model(path).external[0].problem
    assert problem == f"truncated: {len(content) - 1} of {len(content)} bytes"
    data.unlink()
    without = inspect_model(path)
    assert (without.external[0].bytes, without.external[0].problem) == (None, "missing")
    assert any("weights.bin: missing" in note for note in without.notes)
    assert (without.rotations, without.longest) == (report.rotations, 32)
    assert without.weights == report.weights

    moved = onnx.load(path, load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    onnx.save(moved, path)
    assert "outside" in str(inspect_model(path).external[0].problem)


def test_constants_that_lie_in_an_external_file_are_read_when_small(tmp_path):
    model = onnx.load(rotating(tmp_path))
    path = tmp_path / "all.onnx"
    onnx.save(model, path, save_as_external_data=True, location="all.bin", size_threshold=0)
    assert len(inspect_model(path).rotations) == 1
    (tmp_path / "all.bin").unlink()
    report = inspect_model(path)
    assert report.rotations == ()  # where the halves are cut is not known
    assert report.external[0].problem == "missing"


def test_versions_paths_and_foreign_operators_are_noted(tmp_path):
    path = rotating(tmp_path, opset=27, ir_version=14)
    model = onnx.load(path)
    node = model.graph.node[0]
    node.metadata_props.add(key="trace", value='File "/home/ada/model.py", line 3, in forward')
    model.graph.node[1].doc_string = "C:\\Users\\ada\\train.py(12): forward"
    model.graph.node[2].doc_string = "/model/layers.0/self_attn/MatMul"  # a name, not a path
    model.graph.node[3].domain = "ada"
    onnx.save(model, path)
    report = inspect_model(path)
    assert report.local_paths is not None
    assert (report.local_paths.nodes, report.local_paths.elsewhere) == (2, False)
    assert report.local_paths.example == "/home/ada/model.py"
    notes = "\n".join(report.notes)
    for part in ("opset 27", "up to opset 26", "IR version 14", "up to 13", "operators of ada"):
        assert part in notes


def test_bfloat16_is_noted(tmp_path):
    model = onnx.load(rotating(tmp_path))
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16()
            raw = values.view(torch.int16).numpy().tobytes()
            tensor.CopyFrom(
                helper.make_tensor(
                    tensor.name, TensorProto.BFLOAT16, list(tensor.dims), raw, raw=True
                )
            )
    report = inspect_model(saved(model, tmp_path))
    assert report.weights["bfloat16"] == (8 * 8 + 2 * 32 * 8) * 2
    assert report.longest == 32
    assert any("bfloat16" in note for note in report.notes)


def test_a_graph_that_is_not_valid_is_reported_as_far_as_it_goes(tmp_path):
    graph = Graph()
    model = graph.model({"x": (FLOAT, ["n"])}, graph.op("Add", "x", "nowhere"))
    report = inspect_model(saved(model, tmp_path))
    assert report.operators == {"Add": 1}
    assert any("not valid ONNX" in note and "nowhere" in note for note in report.notes)


def test_a_graph_that_goes_in_circles_is_refused(tmp_path):
    graph = Graph()
    for taken, given in (("a", "b"), ("b", "a")):
        graph.nodes.append(helper.make_node("Neg", [taken], [given]))
    out = graph.op("Add", graph.op("Mul", "a", "x"), graph.op("Mul", "x", "a"))
    path = saved(graph.model({"x": (FLOAT, ["n"])}, out), tmp_path)
    with pytest.raises(BadInputError, match=r"not a valid ONNX model: .*cycle"):
        inspect_model(path)


def refusal(path: Path) -> str | None:
    try:
        json.dumps(inspect_model(path).to_json(), allow_nan=False)
    except BadInputError as error:
        return str(error)
    return None


def test_damaged_files_are_refused_or_reported_but_never_crash(tmp_path):
    content = rotating(tmp_path).read_bytes()
    path = tmp_path / "damaged.onnx"
    draw = random.Random(0)
    refused = 0
    for round_ in range(300):
        damaged = bytearray(content)
        if round_ % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        for _ in range(draw.choice((1, 3, 10)) if round_ % 4 else 0):
            damaged[draw.randrange(len(damaged))] = draw.choice((0, 1, 127, 255))
        path.write_bytes(damaged)
        message = refusal(path)
        assert message is None or message.startswith(f"{path}: ")
        assert "\n" not in (message or "")
        refused += message is not None
    assert 75 < refused < 300


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[object]:
    """Run ``rope-export inspect`` in this process: exit code, stdout, stderr."""
    monkeypatch.setitem(commands.main.commands, "inspect", inspect)

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stopped:
            commands.run(["inspect", *map(str, arguments)])
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return run


def test_the_command_on_a_file(command, tmp_path):
    path = rotating(tmp_path)
    code, out, err = command(path)
    assert (code, err) == (0, "")
    lines = {line[:12].strip(): line[13:] for line in out.splitlines()}
    assert lines["format"] == "ONNX IR 10, opset 18, com.microsoft 1"
    assert lines["input"] == "positions int64 [sequence]"
    assert lines["rotation"].startswith("arithmetic, half, 8 channels of a head: tables constant_")
    assert lines["rotation"].endswith("positions from positions")
    assert lines["positions"] == "up to 32 tokens"
    assert (lines["attention"], lines["cache"]) == ("none found", "none")
    code, out, err = command(path, "--json")
    document = json.loads(out)
    assert (code, err, document["kind"]) == (0, "", "model")
    assert document["path"] == str(path)
    assert document["model"] == json.loads(json.dumps(inspect_model(path).to_json()))


def test_the_command_on_an_artifact(command, artifact_of_block):
    folder = artifact_of_block.path
    code, out, err = command(folder)
    assert (code, err) == (0, "")
    assert "block        hidden_size 64, num_heads 4" in out
    assert "  rope       dim 16, theta 10000.0, layout half" in out
    assert f"rotation     {GQA}, half, 16 channels" in out
    assert "positions    up to 48 tokens" in out
    cases = json.loads((folder / "report.json").read_text())["cases"]
    assert f"PASSED: {len(cases)} comparisons" in out
    code, out, _ = command(folder, "--json")
    document = json.loads(out)
    assert (code, document["kind"], document["passed"]) == (0, "artifact", True)
    assert document["block"]["num_kv_heads"] == 2
    assert document["model"]["longest"] == 48


def test_the_command_on_a_checkpoint(command, tmp_path):
    kinds = ("sliding", "sliding", "full", "sliding", "full")
    config = {
        "model_type": "gemma2",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "max_position_embeddings": 128,
        "sliding_window": 32,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "rope_theta": 10000.0,
        "layer_types": [f"{kind}_attention" for kind in kinds],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = command(tmp_path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"checkpoint   {tmp_path}  (5 layers)"
    assert lines[1].startswith("every layer  family gemma2, hidden_size 64, num_heads 4, num_kv_")
    assert "  rope       dim 16, theta 10000.0, layout half" in lines
    assert lines[-2:] == ["layers       0-1, 3: window 32", "layers       2, 4: no window"]
    code, out, _ = command(tmp_path, "--json")
    document = json.loads(out)
    assert (code, document["kind"]) == (0, "checkpoint")
    assert [layer["window"] for layer in document["layers"]] == [32, 32, None, 32, None]
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    code, out, err = command(tmp_path)
    assert (code, out) == (2, "")
    assert f"error: {tmp_path / 'config.json'}: model_type" in err
    assert "no-such-model" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere", None, ("does not exist", "give an ONNX file")),
        ("empty.onnx", b"", ("is empty",)),
        ("text.onnx", b"import torch\n", ("not an ONNX model",)),
        ("prose.onnx", b"The quick brown fox jumps over it. " * 40, ("not an ONNX model",)),
        ("zeros.onnx", bytes(4096), ("not an ONNX model",)),
        ("noise.onnx", bytes(range(256)) * 8, ("not an ONNX model",)),
        ("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
        ("model.ort", b"\x08\0\0\0ORTM" + bytes(64), ("onnxruntime's own format",)),
        ("folder/x.txt", b"", ("no artifact or checkpoint", "config.json")),
        ("folder/model.onnx", b"", ("config.json", "for its graph give", "model.onnx")),
        ("folder/config.json", b"{", ("config.json", "not readable JSON")),
        ("folder/config.json", b"\xff\xfe", ("config.json", "not readable JSON")),
        ("folder/config.json", b"[" * 100000, ("config.json", "not readable JSON")),
        ("folder/config.json", b"[1]", ("config.json", "JSON object", "list")),
        ("folder/config.json", b"{}", ("'format'", "'model_type'")),
        ("folder/config.json", b'{"format": 99}', ("config.json", "99")),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    given = path.parent if name.startswith("folder/") else path
    code, out, err = command(given)
    assert (code, out) == (2, "")
    assert err.startswith("rope-export: error: ")
    assert err.count("\n") == 1
    for part in (str(given), *says):
        assert part in err


def test_a_truncated_model_is_bad_input(command, tmp_path):
    path = rotating(tmp_path)
    content = path.read_bytes()
    for length in (1, 2, 100, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:length])
        code, out, err = command(path)
        assert (code, out) == (2, "")
        assert "truncated" in err


def test_other_protobufs_are_no_models(tmp_path):
    path = tmp_path / "input_0.pb"
    path.write_bytes(numpy_helper.from_array(np.ones((2, 3)), "x").SerializeToString())
    with pytest.raises(BadInputError, match="not an ONNX model"):
        inspect_model(path)


def test_nothing_heavy_is_imported(tmp_path, artifact_of_block):
    script = (
        "import sys\n"
        "from rope_export._cli.inspect import inspect\n"
        "inspect(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'onnxruntime'} & set(sys.modules)\n"
    )
    for given in (["--help"], [str(rotating(tmp_path))], [str(artifact_of_block.path), "--json"]):
        result = subprocess.run(
            [sys.executable, "-c", script, *given], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert result.stdout
