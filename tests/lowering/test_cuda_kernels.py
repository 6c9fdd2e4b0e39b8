"""What is said of CUDA's kernels, asked of them: on the host, before they launch anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from onnx import TensorProto, helper

from rope_export.runtime import cudnn

FLOAT, HALF, INTEGER = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32
KV_HEADS, HEADS = 2, 8


def asked(
    cuda: FakeCuda,
    folder: Any,
    node: onnx.NodeProto,
    inputs: dict[str, tuple[int, list[int]]],
    constants: dict[str, Any] | None = None,
    kind: int = HALF,
    opset: int = 23,
) -> dict[str, Any]:
    """What becomes of one node."""
    values = [helper.make_tensor_value_info(n, t, shape) for n, (t, shape) in inputs.items()]
    outputs = [helper.make_tensor_value_info(n, kind, None) for n in node.output]
    initializers = [onnx.numpy_helper.from_array(a, n) for n, a in (constants or {}).items()]
    graph = helper.make_graph([node], "g", values, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return cuda.look(path)


def grouped(
    cuda: FakeCuda,
    folder: Any,
    *,
    batch: int = 1,
    new: int = 7,
    past: int = 0,
    capacity: int | None = None,
    width: int = 64,
    kind: int = HALF,
    bias: bool = False,
    **attributes: Any,
) -> dict[str, Any]:
    """GroupQueryAttention with a past that is all there."""
    capacity, total = past if capacity is None else capacity, new + past
    inputs = {"q": (kind, [batch, new, HEADS * width])}
    inputs |= {n: (kind, [batch, new, KV_HEADS * width]) for n in "kv"}
    names = ["q", "k", "v", "", "", "lengths", "total"]
    if capacity:
        names[3:5] = ["past_key", "past_value"]
        inputs |= {n: (kind, [batch, KV_HEADS, capacity, width]) for n in names[3:5]}
    if bias:
        names += ["", "", "", "bias"]
        inputs["bias"] = (kind, [1, 1, new, total])
    constants = {
        "lengths": np.full(batch, total - 1, np.int32),
        "total": np.array(total, np.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        **attributes,
    )
    return asked(cuda, folder, node, inputs, constants, kind)


def standard(
    cuda: FakeCuda,
    folder: Any,
    *,
    kind: int = FLOAT,
    kv_heads: int = HEADS,
    length: int = 300,
    width: int = 64,
    mask: bool = False,
) -> list[str]:
    """Kernels of Attention."""
    inputs = {"q": (kind, [2, length, HEADS * width])}
    inputs |= {n: (kind, [2, length, kv_heads * width]) for n in "kv"}
    if mask:
        inputs["mask"] = (TensorProto.BOOL, [2, 1, length, length])
    heads = {"q_num_heads": HEADS, "kv_num_heads": kv_heads, "is_causal": int(not mask)}
    node = helper.make_node("Attention", list(inputs), ["y"], **heads)
    found = asked(cuda, folder, node, inputs, kind=kind)
    assert found["refused"] == []
    kernels: list[str] = found["kernels"]
    return kernels


def test_float32_goes_to_the_cpu(tmp_path, cuda):
    assert "CUDA" not in grouped(cuda[False], tmp_path, kind=FLOAT)["placed"]


@pytest.mark.parametrize(
    ("width", "kernel"),
    [(8, "FLASH_ATTENTION"), (256, "FLASH_ATTENTION"), (264, "EFFICIENT_ATTENTION"),
     (512, "EFFICIENT_ATTENTION")],
)  # fmt: skip
def test_heads_up_to_512_take_no_kernel_with_all_scores(tmp_path, cuda, width, kernel):
    found = grouped(cuda[False], tmp_path, width=width)
    assert (found["refused"], found["kernels"]) == ([], [kernel])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 20}, "head_size must be a multiple of 8"),
        ({"width": 520}, "exceeds maximum supported MAX_HEAD_SIZE (512)"),
        ({"batch": 2, "new": 4, "past": 5}, "batch_size must be 1 when sequence_length > 1"),
    ],
)
def test_what_grouped_heads_refuse(tmp_path, cuda, options, said):
    found = grouped(cuda[False], tmp_path, **options)
    assert found["refused"]
    assert all(said in line for line in found["refused"])


@pytest.mark.parametrize(("capacity", "said"), [(20, "to equal local_window_size"), (16, "share")])
def test_a_cache_of_the_window_is_as_long_as_it_and_one_buffer(tmp_path, cuda, capacity, said):
    window = {"local_window_size": 16, "sliding_window_cache": 1}
    found = grouped(cuda[False], tmp_path, new=1, past=100, capacity=capacity, **window)
    assert all(said in line for line in found["refused"])


def test_a_bias_takes_a_kernel_with_all_scores(tmp_path, cuda):
    assert grouped(cuda[False], tmp_path, bias=True)["kernels"] == ["MATH"]


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "EFFICIENT_ATTENTION"),
        ({"kind": HALF}, "FLASH_ATTENTION"),
        ({"kind": HALF, "kv_heads": 2}, "FLASH_ATTENTION"),
        ({"kv_heads": 2}, "MATH"),
        ({"width": 20}, "MATH"),
        ({"mask": True}, "EFFICIENT_ATTENTION"),
        ({"mask": True, "length": 301}, "MATH"),
        ({"kind": HALF, "mask": True, "length": 301}, "MATH"),
    ],
)
def test_kernels_of_the_standard_attention(tmp_path, cuda, options, kernel):
    assert standard(cuda[False], tmp_path, **options) == [kernel]


def multi_head(cuda: FakeCuda, folder: Any, kind: int, length: int) -> dict[str, Any]:
    inputs = {n: (kind, [2, length, 64]) for n in "qkv"}
    node = helper.make_node(
        "MultiHeadAttention", list(inputs), ["y"], domain="com.microsoft", num_heads=4
    )
    return asked(cuda, folder, node, inputs, kind=kind)


def test_multi_head_attention_needs_cudnn_and_many_tokens(tmp_path, cuda):
    refused = multi_head(cuda[False], tmp_path, FLOAT, 300)["refused"]
    assert any("cuDNN is unavailable" in line for line in refused)
    assert multi_head(cuda[True], tmp_path, FLOAT, 255)["kernels"] == ["MATH"]
    assert multi_head(cuda[True], tmp_path, FLOAT, 256)["kernels"] == ["EFFICIENT_ATTENTION"]


# Operators that need cuDNN, and their nearest that do not.
AXES = {"axes": np.array([1])}
X = [2, 4, 8, 8]


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes", "needs"),
    [
        *((f"Reduce{kind}", [X], {}, True) for kind in ("L1", "L2", "LogSumExp", "Max", "Min")),
        ("ReduceProd", [X], {}, True),
        ("ReduceSum", [X], {}, False),
        ("AveragePool", [X], {"kernel_shape": [2, 2]}, True),
        ("MaxPool", [X], {"kernel_shape": [2, 2]}, True),
        ("GlobalAveragePool", [X], {}, True),
        ("GlobalMaxPool", [X], {}, True),
        ("BatchNormalization", [X, [4], [4], [4], [4]], {}, True),
        ("InstanceNormalization", [X, [4], [4]], {}, True),
        ("LayerNormalization", [X, [8]], {}, False),
        ("Conv", [X, [4, 4, 3, 3]], {}, True),
        ("ConvTranspose", [X, [4, 4, 3, 3]], {}, True),
        ("Einsum", [[2, 4, 8], [2, 8, 4]], {"equation": "bij,bjk->bik"}, True),
        ("LSTM", [[5, 2, 8], [1, 32, 8], [1, 32, 8]], {"hidden_size": 8}, True),
        ("RNN", [[5, 2, 8], [1, 8, 8], [1, 8, 8]], {"hidden_size": 8}, True),
        ("LRN", [X], {"size": 3}, True),
        ("Softmax", [X], {}, False),
    ],
)  # fmt: skip
def test_operators_that_need_cudnn_are_listed(tmp_path, cuda, operator, shapes, attributes, needs):
    inputs = {f"x{i}": (FLOAT, shape) for i, shape in enumerate(shapes)}
    constants = AXES if operator.startswith("Reduce") else {}
    node = helper.make_node(operator, [*inputs, *constants], ["y"], **attributes)
    found = asked(cuda[False], tmp_path, node, inputs, constants, FLOAT, opset=18)
    said = [found.get("error", ""), *found.get("refused", [])]
    if operator == "LRN":  # refused when it is opened, in words that do not name cuDNN
        assert "lrn.cc" in said[0]
    else:
        assert any("cudnn" in line.lower() for line in said) == needs, found
    assert bool(cudnn.needing([operator])) == needs
