"""What the ``onnx`` target relies on is what the standard says: its node tests, its evaluator."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from selection import slow_unless

from rope_export import Attention, RotaryEmbedding, export

# Heads in the last axis, grouped or not, masks of bool, a past, a soft cap before the mask.
RELIED_ON = (
    "attention_3d",
    "attention_3d_gqa",
    "attention_3d_diff_heads_sizes",
    "attention_3d_scaled",
    "attention_3d_gqa_scaled",
    "attention_3d_causal",
    "attention_3d_gqa_causal",
    "attention_3d_attn_mask",
    "attention_3d_gqa_attn_mask",
    "attention_3d_softcap",
    "attention_3d_gqa_softcap",
    "attention_3d_with_past_and_present",
    "attention_3d_gqa_with_past_and_present",
    "attention_3d_diff_heads_with_past_and_present",
    "attention_3d_transpose_verification",
    "attention_4d_attn_mask_bool_4d",
    "attention_4d_softcap_neginf_mask",
    "attention_4d_softcap_neginf_mask_poison",
    "attention_23_boolmask_fullymasked_row_nan_robustness",
    "rotary_embedding_3d_input",
    "rotary_embedding_interleaved",
    "rotary_embedding_no_position_ids",
    "rotary_embedding_no_position_ids_interleaved",
    "rotary_embedding_no_position_ids_rotary_dim",
    "rms_normalization_3d_axis_negative_1_epsilon",
)


@pytest.fixture(scope="module")
def node_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX's own generators divide by zero on purpose
        from onnx.backend.test.case.node import collect_testcases

        return {case.name: case for case in collect_testcases(None)}


@pytest.mark.parametrize("name", RELIED_ON)
def test_the_runtime_has_the_standards_semantics(node_tests, name):
    case = node_tests[f"test_{name}"]
    session = onnxruntime.InferenceSession(
        case.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    for inputs, outputs in case.data_sets:
        given = dict(zip(names, inputs, strict=True))
        for actual, expected in zip(session.run(None, given), outputs, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


VARIANTS = {
    "plain": {},
    "window, cap, norm": {"window": 4, "softcap": 1.5, "qk_norm": True},
    "sinks, narrow values": {"sinks": True, "value_head_dim": 8},
}


@pytest.mark.parametrize(
    ("target", "name"),
    slow_unless(
        lambda target, name: target == "onnx" and name.startswith("window"),
        itertools.product(("onnx", "primitive"), VARIANTS),
    ),
)
def test_the_standards_own_evaluator_agrees(tmp_path, target, name):
    variant = VARIANTS[name]
    torch.manual_seed(0)
    rope = RotaryEmbedding(16, layout="half", max_seq_len=32)
    block = Attention(32, 4, num_kv_heads=2, head_dim=16, rope=rope, **variant).eval()
    with torch.no_grad():
        for of, parameter in block.named_parameters():
            if "norm" in of or "sinks" in of:
                parameter.normal_()
    evaluator = ReferenceEvaluator(
        str(export(block, tmp_path / "block", target=target, cache=True).model)
    )
    x = torch.randn(2, 9, 32)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    with torch.no_grad():
        _, cache = block(x[:, :6], past=block.empty_cache(2), attention_mask=mask)
        mask = torch.cat((mask, torch.ones(2, 3, dtype=torch.int64)), dim=1)
        expected = block(x[:, 6:], past=cache, attention_mask=mask)
    names = ("hidden_states", "past_key", "past_value", "attention_mask")
    given = (x[:, 6:], *cache, mask)
    actual = evaluator.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
    for ours, theirs in zip(actual, (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=2e-6)
