"""Caches of integers: the arithmetic of onnxruntime's kernel, and scales that hold everywhere."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from rope_export import Attention, BadInputError, RotaryEmbedding
from rope_export.attention.cache_rounding import CacheRounding
from rope_export.attention.calibration import calibrated, with_rounded_cache
from rope_export.attention.random_block import random_block

HEADS, WIDTH = 2, 16
RANGES = {"int8": (-128, 127), "int4": (-8, 7)}
STORED = {"int8": TensorProto.INT8, "int4": TensorProto.UINT8}


def scales(seed: int, low: float = 0.01, high: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, (HEADS, WIDTH)).astype(np.float32)


def rounding_of(dtype: str) -> CacheRounding:
    return CacheRounding(dtype, torch.from_numpy(scales(1)), torch.from_numpy(scales(2)))


def near_ties(dtype: str, scale: np.ndarray, tokens: int) -> np.ndarray:
    """Heads half-way between integers, and an ulp or two beside that, beyond the last ones too."""
    rng = np.random.default_rng(3)
    low, high = RANGES[dtype]
    half = rng.integers(low - 4, high + 4, (1, HEADS, tokens, WIDTH)) + np.float32(0.5)
    x = (half * scale[None, :, None, :]).astype(np.float32)
    for _ in range(2):
        x = np.where(rng.random(x.shape) < 0.3, np.nextafter(x, np.float32(np.inf)), x)
        x = np.where(rng.random(x.shape) < 0.3, np.nextafter(x, np.float32(-np.inf)), x)
    return x.astype(np.float32)


def kept_by_onnxruntime(dtype: str, keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """What GroupQueryAttention keeps of a prompt."""
    width = WIDTH if dtype == "int8" else WIDTH // 2
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "pk", "pv", "last", "total", *[""] * 5, "ks", "vs"],
        ["o", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8 if dtype == "int8" else 4,
    )
    stored = STORED[dtype]
    graph = helper.make_graph(
        [node],
        "g",
        [
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "qkv"),
            *(helper.make_tensor_value_info(n, stored, None) for n in ("pk", "pv")),
            helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total", TensorProto.INT32, []),
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("ks", "vs")),
        ],
        [
            helper.make_tensor_value_info("o", TensorProto.FLOAT, None),
            *(helper.make_tensor_value_info(f"present_{n}", stored, None) for n in "kv"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    tokens = keys.shape[2]
    flat = [x.transpose(0, 2, 1, 3).reshape(1, tokens, HEADS * WIDTH) for x in (keys, values)]
    empty = np.zeros((1, HEADS, 0, width), helper.tensor_dtype_to_np_dtype(stored))
    return session.run(
        ["present_k", "present_v"],
        {
            "q": np.zeros_like(flat[0]),
            **dict(zip("kv", flat, strict=True)),
            **{"pk": empty, "pv": empty},
            "last": np.array([tokens - 1], np.int32),
            "total": np.array(tokens, np.int32),
            "ks": scales(1)[None, :, None, :],
            "vs": scales(2)[None, :, None, :],
        },
    )


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("tokens", [1, 300])
def test_what_is_stored_is_what_the_kernel_stores_to_the_last_bit(dtype, tokens):
    keys, values = near_ties(dtype, scales(1), tokens), near_ties(dtype, scales(2), tokens)
    stored = rounding_of(dtype).encode(torch.from_numpy(keys), torch.from_numpy(values))
    for ours, theirs in zip(stored, kept_by_onnxruntime(dtype, keys, values), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_nearest_integers_ties_to_even_and_no_further_than_there_are():
    one = torch.ones(1, 8)
    x = torch.tensor([-1e9, -128.5, -2.5, -0.5, 0.5, 1.5, 126.5, 127.5]).reshape(1, 1, 1, 8)
    stored, _ = CacheRounding("int8", one, one).encode(x, x)
    assert stored.dtype == torch.int8
    assert stored.flatten().tolist() == [-128, -128, -2, 0, 0, 2, 126, 127]


def test_of_two_channels_the_first_is_in_the_low_half_of_a_byte():
    one = torch.ones(1, 6)
    x = torch.tensor([-8.0, 7.0, 0.0, 1.0, -1.0, 9.0]).reshape(1, 1, 1, 6)
    rounding = CacheRounding("int4", one, one)
    stored, _ = rounding.encode(x, x)
    assert stored.dtype == torch.uint8
    assert stored.flatten().tolist() == [0xF0, 0x98, 0xF7]
    back, _ = rounding.decode(stored, stored)
    assert back.flatten().tolist() == [-8, 7, 0, 1, -1, 7]


# The block in PyTorch


@pytest.mark.parametrize("dtype", RANGES)
def test_a_block_attends_to_what_its_cache_holds_new_tokens_included(dtype):
    block = random_block(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=32)
    rounded = with_rounded_cache(block, calibrated(block, dtype, None, seed=0))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 9, 32), dtype=np.float32))
    with torch.no_grad():
        q, k, v = (t.double().numpy() for t in block.heads(x))
        y, (keys, values) = rounded(x, past=rounded.empty_cache(2))
    assert rounded.cache_rounding is not None
    seen = []
    low, high = RANGES[dtype]
    for part, kind in ((k, "key"), (v, "value")):
        scale = getattr(rounded.cache_rounding, f"{kind}_scale").double().numpy()
        seen.append(np.clip(np.rint(part / scale), low, high) * scale)
    k, v = (part.repeat(2, axis=1) for part in seen)
    scores = q @ k.swapaxes(-1, -2) * 8**-0.5
    scores = np.where(np.triu(np.ones((9, 9)), 1) == 1, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = (weights @ v).transpose(0, 2, 1, 3).reshape(2, 9, 32)
    wanted = context @ block.o_proj.weight.detach().double().numpy().T
    np.testing.assert_allclose(y.numpy(), wanted, rtol=0, atol=2e-6)
    assert keys.shape == values.shape == (2, 2, 9, 8 if dtype == "int8" else 4)


def test_calls_one_after_the_other_are_one_pass():
    block = random_block(hidden_size=32, num_heads=2, head_dim=16, max_seq_len=32, window=5)
    rounded = with_rounded_cache(block, calibrated(block, "int4", None, seed=0))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 9, 32), dtype=np.float32))
    with torch.no_grad():
        whole, present = rounded(x, past=rounded.empty_cache())
        past, parts = rounded.empty_cache(), []
        for start, end in ((0, 4), (4, 8), (8, 9)):
            y, past = rounded(x[:, start:end], past=past)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(past, present, strict=True))


def test_the_block_it_was_made_of_keeps_a_cache_of_numbers():
    block = random_block(hidden_size=32, num_heads=2, max_seq_len=32)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    rounded = with_rounded_cache(block, calibrated(block, "int8", None, seed=0))
    assert block.cache_rounding is None
    assert block.empty_cache()[0].dtype == torch.float32
    assert rounded.state_dict().keys() == before.keys()
    assert rounded.q_proj is block.q_proj
    with pytest.raises(BadInputError, match=r"past must hold keys .* of torch\.int8, got"):
        rounded(torch.zeros(1, 1, 32), past=block.empty_cache())


# Scales


ROPES = {
    "half": {"dim": 8, "layout": "half"},
    "interleaved": {"dim": 8, "layout": "interleaved"},
    "partial": {"dim": 4, "layout": "half"},
    "partial-interleaved": {"dim": 4, "layout": "interleaved"},
    "yarn": {
        "dim": 8,
        "layout": "half",
        "scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dtype", RANGES)
def test_no_key_is_clipped_at_any_position_and_some_come_close(rope, dtype):
    torch.manual_seed(0)
    # At a frequency of one radian, twelve thousand positions turn a pair almost anywhere.
    rotary = RotaryEmbedding(**ROPES[rope], theta=1.5, max_seq_len=12_000)
    block = Attention(24, 2, head_dim=8, rope=rotary, qk_norm=rope == "half")
    x = torch.randn(40, 24)
    rounding = calibrated(block, dtype, x, seed=0)
    with torch.no_grad():
        keys, values = block.project(x[None])[1:]
        heads = keys.unflatten(-1, (2, 8)).transpose(1, 2)
        steps = torch.zeros(2, 8)
        for start in range(0, 12_000, 40):
            _, turned = rotary.rotate(heads, heads, offset=start)
            reach = (turned / rounding.key_scale).abs().amax((0, 2))
            steps = torch.maximum(steps, reach)
    largest = RANGES[dtype][1]
    assert float(steps.max()) <= largest * (1 + 1e-6)
    turning = 8 if rope in ("half", "interleaved", "yarn") else 4
    assert float(steps[:, turning:].min() if turning < 8 else steps.min()) > 0.5 * largest
    spread = (
        values.unflatten(-1, (2, 8)).abs().amax((0, 1)) / rounding.value_scale[0, :, 0]
    ).detach()
    torch.testing.assert_close(spread, torch.full((2, 8), float(largest)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layout", "partner"), [("half", [2, 3, 0, 1]), ("interleaved", [1, 0, 3, 2])]
)
def test_two_channels_of_a_pair_share_the_bound_of_its_norm(layout, partner):
    block = random_block(
        hidden_size=16, num_heads=2, head_dim=6, rotary_dim=4, layout=layout, max_seq_len=32
    )
    x = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    keys = (x @ block.k_proj.weight.detach().numpy().T).astype(np.float64).reshape(50, 2, 6)
    norm = np.hypot(keys[..., :4], keys[..., partner])
    wanted = np.concatenate((norm, np.abs(keys[..., 4:])), axis=-1).max(axis=0) / 127
    got = calibrated(block, "int8", x, seed=0).key_scale[0, :, 0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_channel_that_is_always_zero_has_a_scale_all_the_same():
    block = random_block(hidden_size=16, num_heads=2, max_seq_len=32)
    block.v_proj.weight.data[3] = 0
    rounding = calibrated(block, "int8", None, seed=0)
    assert bool((rounding.value_scale > 0).all())
    block.v_proj.weight.data[:] = 0
    assert bool(calibrated(block, "int8", None, seed=0).value_reciprocal.isfinite().all())


@pytest.mark.parametrize("shape", [(7, 16), (2, 7, 16)])
def test_calibration_is_given_by_rows_or_in_batches_as_tensor_or_array(shape):
    block = random_block(hidden_size=16, num_heads=2, max_seq_len=32)
    x = np.random.default_rng(0).standard_normal(shape)
    first = calibrated(block, "int8", x, seed=0)
    again = calibrated(block, "int8", torch.from_numpy(x).reshape(-1, 16), seed=1)
    assert torch.equal(first.key_scale, again.key_scale)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((3, 15)), r"\[tokens, 16\] or \[batch, sequence, 16\], got \[3, 15\]"),
        (np.zeros(16), r"got \[16\]"),
        (np.zeros((0, 16)), r"got \[0, 16\]"),
        (np.zeros((1, 1, 2, 16)), r"got \[1, 1, 2, 16\]"),
        (np.zeros((3, 16), np.int64), "of floating point, got int64"),
        (np.full((3, 16), np.nan), "finite"),
        ("text", "got str"),
        ([[1.0], [2.0, 3.0]], "got list"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(given, said):
    block = random_block(hidden_size=16, num_heads=2, max_seq_len=32)
    with pytest.raises(BadInputError, match=said) as error:
        calibrated(block, "int8", given, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("made", "dtype", "said"),
    [
        ({}, "int2", "cache_dtype must be one of int8, int4, got 'int2'"),
        ({}, [8], r"cache_dtype must be one of int8, int4, got \[8\]"),
        ({"head_dim": 7, "rotary_dim": 4}, "int4", "head_dim must be even .* got 7"),
        ({"value_head_dim": 9}, "int4", "value_head_dim must be even .* got 9"),
    ],
)
def test_blocks_without_such_a_cache_are_refused(made, dtype, said):
    block = random_block(**{"hidden_size": 16, "num_heads": 2, "max_seq_len": 32, **made})
    with pytest.raises(BadInputError, match=said):
        calibrated(block, dtype, None, seed=0)


def test_keys_that_grow_with_their_position_are_refused():
    block = Attention(16, 2, rope=RotaryEmbedding(8, use_xpos=True))
    with pytest.raises(BadInputError, match="xPos: no scale would hold"):
        calibrated(block, "int8", None, seed=0)


def test_scales_come_back_from_json_to_the_last_bit():
    rounding = rounding_of("int4")
    again = CacheRounding.from_json(rounding.to_json())
    assert again.dtype == "int4"
    assert torch.equal(again.key_scale, rounding.key_scale)
    assert torch.equal(again.value_scale, rounding.value_scale)
