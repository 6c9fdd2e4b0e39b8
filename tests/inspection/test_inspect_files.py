"""Whatever is in a file, inspection says it, notes it or refuses it in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from inspected import FLOAT, Graph, rotating, saved
from onnx import TensorProto, helper, numpy_helper

from rope_export import BadInputError
from rope_export.inspection.report import inspect_model


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


def test_other_protobufs_are_no_models(tmp_path):
    path = tmp_path / "input_0.pb"
    path.write_bytes(numpy_helper.from_array(np.ones((2, 3)), "x").SerializeToString())
    with pytest.raises(BadInputError, match="not an ONNX model"):
        inspect_model(path)
