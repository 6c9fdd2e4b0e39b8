"""Graphs built by hand for the inspector, and what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

GQA, MHA = "com.microsoft::GroupQueryAttention", "com.microsoft::MultiHeadAttention"
WRITTEN_OUT = "MatMul, Softmax, MatMul"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def saved(model: onnx.ModelProto, tmp_path: Path, name: str = "model.onnx") -> Path:
    path = tmp_path / name
    onnx.save(model, path)
    return path


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


def concatenated(graph: Graph, first: str, second: str) -> str:
    return graph.op("Concat", first, second, axis=-1)


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


# --- files ----------------------------------------------------------------------------------


def rotating(tmp_path: Path, **options: object) -> Path:
    graph = Graph()
    heads = graph.op("MatMul", "x", graph.constant(np.eye(8), np.float32, "weight"))
    out = turned_at_once(graph, heads, half_by_slices, concatenated, "table half")
    inputs = {"x": (FLOAT, [1, 2, "sequence", 8]), "positions": (INT64, ["sequence"])}
    return saved(graph.model(inputs, out, **options), tmp_path)
