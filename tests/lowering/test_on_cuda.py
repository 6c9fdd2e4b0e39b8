"""Graphs for CUDA on a made-up device: where their nodes go, and whether its kernels take them.

No number is looked at: there is no GPU. What onnxruntime and its CUDA kernels decide on the host is
decided as on one: placement, shapes, types, attributes, whether a step can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from decoders import replaced
from onnx import TensorProto, helper
from providers import VARIANTS
from visit.graphs import asked, graph
from visit.proofs import TELLING, others

from rope_export import Attention, export
from rope_export.artifacts.artifact import Artifact
from rope_export.artifacts.cache_layout import CacheLayout
from rope_export.attention.random_block import random_block
from rope_export.lowering import rules
from rope_export.lowering.choice import Choice
from rope_export.models.decoder_with_cache import DecoderWithCache
from rope_export.runtime import cudnn

# What the telling cases of a visit leave out of forms and of ways to count rows.
MORE = (
    ("ort", "float32", "a cache, padded on the left"),
    ("ort", "float32", "sinks"),
    ("ort", "float32", "not causal"),
    ("ort", "bfloat16", "not causal"),
    ("ort", "bfloat16", "a cache, padded on the left"),
    ("onnx", "float32", "a cache and a window"),
    ("onnx", "float16", "sinks"),
    ("primitive", "float16", "a cache, padded on the left"),
)
QUICK = (*TELLING, *MORE)


def block_of(dtype: str, variant: str) -> tuple[Attention, dict[str, Any]]:
    shape, options = VARIANTS[variant]
    shape = {"hidden_size": 64, "num_heads": 8, "head_dim": 64, "max_seq_len": 48} | shape
    if "num_kv_heads" in shape:
        shape["num_kv_heads"] = min(4, shape["num_kv_heads"])
    return random_block(**shape, dtype=dtype), options


def assert_served(
    cuda: Any, model: Path, layout: CacheLayout | None, *, needing: Sequence[str] = ()
) -> Any:
    """All arithmetic is on CUDA, every call runs, and a step copies nothing and is captured.

    Without cuDNN, unless something is ``needing`` it.
    """
    nodes = onnx.load(model, load_external_data=False).graph.node
    assert cudnn.needing(f"{n.domain}::{n.op_type}" for n in nodes) == [*needing]
    found = cuda[bool(needing)].look(model, layout)
    assert "error" not in found, found["error"]
    assert found["offences"] == []
    assert found["refused"] == []
    assert found.get("copies", [0, 0]) == [0, 0]
    if layout is not None and layout.packs_rows and layout.by_rows:
        assert "the model has control flow nodes" in found["captured"]
    else:
        assert found.get("captured", True) is True
    return found


def choice_of(target: str, dtype: str, variant: str) -> Choice:
    block, options = block_of(dtype, variant)
    return asked(block, ["cuda"], target=target, **options).choose()


def assert_case_served(folder: Path, cuda: Any, target: str, dtype: str, variant: str) -> None:
    block, options = block_of(dtype, variant)
    found = assert_served(cuda, *graph(block, folder, ["cuda"], target=target, **options))
    choice = choice_of(target, dtype, variant)
    assert bool(found["kernels"]) == choice.form.attention.endswith("Attention")
    if not choice.score_copies["cuda"]:  # no kernel that holds the scores of all pairs
        assert "MATH" not in found["kernels"]


@pytest.mark.parametrize(("target", "dtype", "variant"), QUICK)
def test_a_graph_is_on_cuda_and_taken_by_its_kernels(tmp_path, cuda, target, dtype, variant):
    assert_case_served(tmp_path, cuda, target, dtype, variant)


def test_a_token_is_attended_by_a_kernel_of_its_own(tmp_path, cuda):
    block, options = block_of("float16", "a cache")
    found = assert_served(cuda, *graph(block, tmp_path, ["cuda"], **options))
    assert found["kernels"] == ["FLASH_ATTENTION", "XQA"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "variant"), [case for case in others() if case not in MORE]
)
def test_so_is_every_other(tmp_path, cuda, target, dtype, variant):
    assert_case_served(tmp_path, cuda, target, dtype, variant)


def test_every_form_is_among_them():
    taken = {(case[0], choice_of(*case).form.name) for case in QUICK}
    forms = {(target, form.name) for target, forms in rules.FORMS.items() for form in forms}
    # On CUDA, Attention needs no other dtype than its inputs'; MultiHeadAttention is for graphs
    # that run on the CPU too.
    others = {(t, rules.ATTENTION_IN_FLOAT32.name) for t in ("ort", "onnx")}
    assert taken == forms - others - {("ort", rules.MHA.name)}


@pytest.mark.parametrize(
    ("dtype", "variant", "needing"),
    [("float16", "a cache", []), ("float32", "not causal", ["MultiHeadAttention"])],
)
def test_a_graph_for_both_providers_is_served_too(tmp_path, cuda, dtype, variant, needing):
    block, options = block_of(dtype, variant)
    made = graph(block, tmp_path, ["cpu", "cuda"], **options)
    assert_served(cuda, *made, needing=needing)


class Layer(torch.nn.Module):
    """Attention of PyTorch's own, between a norm and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.qkv, self.up, self.down = (
            torch.nn.Linear(*n) for n in ((64, 192), (64, 96), (96, 64))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        seen = mask[:, None, None, :] != 0
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("target", ["ort", "onnx", "primitive"])
def test_a_module_is_on_cuda(tmp_path, cuda, target):
    x, mask = torch.randn(2, 7, 64).half(), torch.ones(2, 7, dtype=torch.int64)
    shapes = {0: "batch", 1: "sequence"}
    result = export(
        Layer().half().eval(),
        tmp_path / "x",
        args=(x, mask),
        dynamic_shapes=(shapes, shapes),
        target=target,
        providers=["cuda"],
    )
    assert_served(cuda, result.model, Artifact.read(result.path, verify=True).cache)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float16", "Mistral"), pytest.param("float32", "Llama 2", marks=pytest.mark.slow)],
)
def test_a_decoder_is_on_cuda(tmp_path, cuda, dtype, name):
    decoder = DecoderWithCache(replaced(name).to(getattr(torch, dtype)))
    result = export(decoder, tmp_path / "x", **decoder.example(), providers=["cuda"])
    assert_served(cuda, result.model, Artifact.read(result.path, verify=True).cache)


def model_of(folder: Path, node: onnx.NodeProto, *initializers: onnx.TensorProto) -> Path:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 64])
        for name in ("x", "y")
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "model.onnx")
    return folder / "model.onnx"


def test_a_node_that_cuda_lacks_is_an_offence(tmp_path, cuda):
    found = cuda[False].look(model_of(tmp_path, helper.make_node("Hardmax", ["x"], ["y"])))
    assert [offence.split(":")[0].split()[0] for offence in found["offences"]] == ["Hardmax"]


def test_a_node_that_a_kernel_refuses_is_found(tmp_path, cuda):
    """A table of 32 pairs, of heads that have 8."""
    tables = [helper.make_tensor(n, TensorProto.FLOAT, [64, 32], [0.0] * 2048) for n in "cs"]
    node = helper.make_node("RotaryEmbedding", ["x", "p", "c", "s"], ["y"], num_heads=4)
    node.domain = "com.microsoft"
    positions = helper.make_tensor("p", TensorProto.INT64, [1], [0])
    found = cuda[False].look(model_of(tmp_path, node, positions, *tables))
    assert len(found["refused"]) == 4


def test_what_needs_cudnn_is_found_without_it(tmp_path, cuda):
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    path = model_of(tmp_path, helper.make_node("ReduceMax", ["x", "axes"], ["y"]), axes)
    assert any("cuDNN is unavailable" in line for line in cuda[False].look(path)["refused"])
    assert cuda[True].look(path)["refused"] == []
