"""What starts as CUDA and computes nothing is never taken for a GPU."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from rope_export import ProviderUnavailableError, runtime
from rope_export.runtime import cudnn, providers

NOTHING = "CUDAExecutionProvider starts but does not compute: Relu of [-2.0, 3.0, -1.0, 5.0] gives"
# Where pip installed CUDA's own libraries, onnxruntime finds those first, and no driver.
REFUSALS = (NOTHING, "CUDAExecutionProvider does not start: ")


@pytest.fixture
def where_the_loader_looks(fake_libraries):
    return os.environ | {"LD_LIBRARY_PATH": str(fake_libraries)}


def test_doctor_says_that_it_does_not_compute(cli, where_the_loader_looks):
    found = cli("doctor", "--provider", "cuda", "--json", env=where_the_loader_looks)
    assert found.returncode == 3
    state = json.loads(found.stdout)["providers"]["cuda"]
    assert not state["loads"]
    assert state["reason"].startswith(REFUSALS)


def test_validate_refuses_it(cli, where_the_loader_looks, artifact_of_block):
    folder = str(artifact_of_block.path)
    found = cli("validate", folder, "--provider", "cuda", env=where_the_loader_looks)
    assert found.returncode == 3
    assert any(refusal in found.stderr for refusal in REFUSALS)
    assert "passed" not in found.stdout


@pytest.mark.slow
def test_export_neither_asks_it_nor_names_it(cli, where_the_loader_looks):
    shape = ("--seq", "16", "--hidden", "32", "--heads", "2")
    found = cli("block", *shape, "--out", "x", "--json", env=where_the_loader_looks)
    assert found.returncode == 0
    states = json.loads(found.stdout)["providers"]
    assert states["cuda"]["status"] == "unavailable"
    assert states["cuda"]["reason"].startswith(REFUSALS)


class Started:
    """A session that starts on CUDA, and gives what it is told to."""

    def __init__(self, given):
        self.given = given

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def run(self, _, inputs):
        if isinstance(self.given, Exception):
            raise self.given
        return [self.given(inputs["x"])]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda x: np.zeros_like(x), "gives [0.0, 0.0, 0.0, 0.0]"),
        (lambda x: x, "gives [-2.0, 3.0, -1.0, 5.0]"),
        (RuntimeError("no kernel image\nis available"), "does not run: no kernel image"),
        (lambda x: np.maximum(x, 0), None),
    ],
)
def test_a_provider_is_what_it_computes(monkeypatch, given, said):
    runtime.unavailable_reason.cache_clear()
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda *_, **__: None)
    monkeypatch.setattr(providers, "open_session", lambda *_: Started(given))
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(providers.onnxruntime_module(), "get_available_providers", lambda: listed)
    try:
        reason = runtime.unavailable_reason("cuda")
    finally:
        runtime.unavailable_reason.cache_clear()
    assert reason is None if said is None else said in reason


def test_nothing_is_run_again_on_the_cpu():
    """By default onnxruntime does that when a kernel of CUDA fails, and prints it."""
    assert not providers.open_session(providers.tiny_model(), "cpu")._enable_fallback


# cuDNN


def test_operators_that_need_cudnn_are_told_from_their_namesakes():
    assert cudnn.needing(["Attention", "::Attention", "MatMul"]) == []
    assert cudnn.needing(["com.microsoft::MultiHeadAttention", "::ReduceMax"]) == [
        "MultiHeadAttention",
        "ReduceMax",
    ]


def test_a_graph_that_needs_cudnn_is_refused_where_it_is_not(monkeypatch):
    monkeypatch.setattr(cudnn, "is_missing", lambda: True)
    cudnn.require(["::MatMul"])
    with pytest.raises(
        ProviderUnavailableError, match="MultiHeadAttention of this graph needs"
    ) as e:
        cudnn.require(["com.microsoft::MultiHeadAttention"])
    assert "libcudnn.so.9 does not load: pip install 'onnxruntime-gpu[cudnn]==" in str(e.value)
    monkeypatch.setattr(cudnn, "is_missing", lambda: False)
    cudnn.require(["com.microsoft::MultiHeadAttention"])
