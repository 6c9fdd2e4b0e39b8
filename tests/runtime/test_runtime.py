"""Providers are what they do, not what they are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import mutants
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from rope_export import ProviderUnavailableError, export, replay, runtime, validate
from rope_export.artifacts import artifact
from rope_export.runtime import replay as trial


@pytest.fixture(autouse=True)
def fresh_probe():
    runtime.unavailable_reason.cache_clear()
    yield
    runtime.unavailable_reason.cache_clear()


def pretend(monkeypatch, name, value):
    monkeypatch.setattr(runtime, name, value)
    monkeypatch.setattr(runtime.providers, name, value)


def test_the_cpu_is_always_there():
    assert runtime.unavailable_reason("cpu") is None
    runtime.require("cpu")


def test_cuda_that_is_listed_but_does_not_load_is_unavailable():
    """On this machine onnxruntime-gpu lists CUDA, and a session on it silently uses the CPU."""
    reason = runtime.unavailable_reason("cuda")
    assert reason is not None
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert "lists CUDAExecutionProvider but it does not load: lib" in reason
    else:
        assert "has no CUDAExecutionProvider; install onnxruntime-gpu" in reason


def test_cuda_whose_session_falls_back_is_unavailable(monkeypatch):
    """The library loads, but there is no device: the session comes back on the CPU."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(runtime.providers.ctypes, "CDLL", lambda *_, **__: None)
    assert "falls back to the CPU" in str(runtime.unavailable_reason("cuda"))


def test_a_build_without_cuda_says_what_to_install(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailableError, match="install onnxruntime-gpu"):
        runtime.require("cuda")


def test_arithmetic_placed_elsewhere_is_no_proof(artifact_of_block, monkeypatch):
    """A session that claims CUDA while its operators sit on the CPU: the classic false pass."""
    pretend(monkeypatch, "unavailable_reason", lambda _: None)
    session = runtime.Session.open(artifact_of_block.model, "cuda")
    assert session.nodes.keys() == {"CPUExecutionProvider"}
    assert session.misplaced == ("GroupQueryAttention", "MatMul")
    status, cases = trial.run_trials(
        artifact.Artifact.read(artifact_of_block.path, verify=True),
        "cuda",
        list(first_trials(artifact_of_block.path)),
        print,
    )
    assert status.status == "unavailable"
    assert "GroupQueryAttention, MatMul was placed on another provider" in str(status.reason)
    assert cases
    assert not any(case.passed for case in cases)


def first_trials(folder: Path):
    return trial.stored_trials(artifact.Artifact.read(folder, verify=True))


def test_a_provider_without_the_operators_is_left_out_unless_named(tmp_path, monkeypatch):
    """float32 GroupQueryAttention has no CUDA kernel: said, not failed, and not run."""
    pretend(monkeypatch, "unavailable_reason", lambda _: None)
    report = export(mutants.block(), tmp_path / "block", validate=True).report
    assert report.passed
    assert report.providers["cuda"].status == "unavailable"
    assert "no float32 kernel on CUDA" in str(report.providers["cuda"].reason)
    with pytest.raises(ProviderUnavailableError, match="no float32 kernel on CUDA"):
        replay(tmp_path / "block", providers=["cuda"])


def test_a_graph_that_does_not_load_fails_every_case(artifact_of_block, tmp_path):
    folder = Path(shutil.copytree(artifact_of_block.path, tmp_path / "copy"))
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "NoSuchAttention"
    onnx.save(model, folder / "model.onnx")
    report = validate(folder, mutants.block())
    assert not report.passed
    assert report.graph["sha256"] == artifact.sha256(folder / "model.onnx")
    assert len(report.cases) == 7
    assert all("NoSuchAttention" in str(case.reason) for case in report.cases)


def test_bfloat16_tensors_go_in_and_out_unchanged(tmp_path):
    """Cast has bfloat16 on the CPU: enough to check the way in and the way out."""
    import ml_dtypes

    shape = ["n"]
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "wide"], ["double"]),
        helper.make_node("Cast", ["double"], ["y"], to=TensorProto.BFLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.BFLOAT16, shape)],
        [value("y", TensorProto.BFLOAT16, shape)],
    )
    path = tmp_path / "double.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path
    )
    x = np.array([1.5, -3.0, 1e30, 0.0], dtype=ml_dtypes.bfloat16)
    y = runtime.Session.open(path, "cpu").run({"x": x})["y"]
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.astype(np.float32), 2 * x.astype(np.float32))


def test_memory_of_a_container_counts(monkeypatch):
    import psutil

    free = psutil.virtual_memory().available
    assert 0 < runtime.available_memory() <= 1.1 * free
    files = {"/sys/fs/cgroup/memory.max": "5000", "/sys/fs/cgroup/memory.current": "2000"}
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    assert runtime.available_memory() == 3000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert runtime.available_memory() > 3000


def test_a_target_too_large_for_memory_is_proven_as_far_as_it_goes(tmp_path, monkeypatch):
    block = mutants.block(max_seq_len=600)
    pretend(monkeypatch, "available_memory", lambda: 8_000_000)
    result = export(block, tmp_path / "block", target="primitive", validate=True)
    assert result.report.passed
    longest = max(case.sequence for case in result.report.cases)
    assert 33 < longest < 600
    (note,) = result.report.notes
    assert note.startswith(f"proven only up to length {longest} of 600: target primitive holds")
    assert note in result.report.to_markdown()
    fused = export(block, tmp_path / "fused", target="ort", validate=True)
    assert max(case.sequence for case in fused.report.cases) == 600
    assert not fused.report.notes


def test_long_sequences_are_sampled_and_say_so(tmp_path, monkeypatch):
    from rope_export.proof import block_shapes as shapes

    monkeypatch.setattr(shapes, "TRUTH_FLOPS", 1e8)
    block = mutants.block(max_seq_len=2000)
    result = export(block, tmp_path / "block", validate=True)
    assert result.report.passed
    (longest,) = [case for case in result.report.cases if case.sequence == 2000]
    assert 200 <= longest.tokens <= 256
    assert any(
        "compared on" in note and "tokens (the first" in note for note in result.report.notes
    )
    # A wrong last row is seen although most rows are not looked at.
    model = onnx.load(result.model)
    mutants.last_table_row_stale(model)
    onnx.save(model, result.model)
    report = validate(result, block)
    assert [case.sequence for case in report.cases if not case.passed] == [2000]
