"""RotaryEmbedding against transformers, rotary-embedding-torch, ONNX's own tests and float64."""

import copy
import importlib
import itertools
import pickle

import numpy as np
import onnx.backend.test.case.node as onnx_cases
import pytest
import rotary_embedding_torch
import torch
from onnx import numpy_helper
from rotary import (
    ANY_LENGTH,
    CALLS,
    IN_FLOAT64,
    assert_rotated,
    inverse_frequencies,
    normal,
    queries_and_keys,
)
from transformers import LlamaConfig
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from rope_export.errors import BadInputError
from rope_export.rope.embedding import RotaryEmbedding
from rope_export.rope.pairs import LAYOUTS, rotate_pairs

LAST_WITHOUT_LENGTH = 4096 * 8192 - 1


# Other people's implementations


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("explicit", [False, True])
def test_layout_half_is_the_rotation_of_llama(theta, explicit):
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=3,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    q, k = queries_and_keys(20, head_dim=16)
    position_ids = torch.arange(20).expand(2, 20)
    if explicit:
        position_ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 20)))
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, position_ids)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    rope = RotaryEmbedding(16, theta=theta, layout="half", max_seq_len=64)
    actual = rope.rotate(q, k, position_ids=position_ids if explicit else None)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # their angles are float32


@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_layout_interleaved_is_the_rotation_of_gptj(rotary_dim):
    q, k = queries_and_keys(20, head_dim=16)
    sincos = modeling_gptj.create_sinusoidal_positions(64, rotary_dim)
    position_ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 20)))
    sin, cos = sincos[position_ids].chunk(2, dim=-1)
    rope = RotaryEmbedding(rotary_dim, layout="interleaved", max_seq_len=64)
    for ours, x in zip(rope.rotate(q, k, position_ids=position_ids), (q, k), strict=True):
        tokens_first = x.transpose(1, 2)
        turned = modeling_gptj.apply_rotary_pos_emb(tokens_first[..., :rotary_dim], sin, cos)
        theirs = torch.cat((turned, tokens_first[..., rotary_dim:]), dim=-1).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@ANY_LENGTH
@pytest.mark.parametrize("theta", [10000, 500.0])
@pytest.mark.parametrize("offset", [0, 1, 37])
@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 3, 27, 12)], ids=str)
def test_one_tensor_is_rotated_as_in_rotary_embedding_torch(max_seq_len, theta, offset, shape):
    t = normal(*shape)
    theirs = rotary_embedding_torch.RotaryEmbedding(dim=8, theta=theta)
    ours = RotaryEmbedding(8, theta=theta, max_seq_len=max_seq_len)
    expected = theirs.rotate_queries_or_keys(t, offset=offset)
    for given in (offset, torch.tensor(offset)):
        actual = ours.rotate_queries_or_keys(t, offset=given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


ONNX_CASES = [
    "test_rotary_embedding",
    "test_rotary_embedding_3d_input",
    "test_rotary_embedding_interleaved",
    "test_rotary_embedding_no_position_ids",
    "test_rotary_embedding_no_position_ids_interleaved",
    "test_rotary_embedding_no_position_ids_rotary_dim",
    "test_rotary_embedding_with_interleaved_rotary_dim",
    "test_rotary_embedding_with_rotary_dim",
]


@pytest.fixture(scope="module")
def onnx_backend_cases():
    """ONNX's node tests of RotaryEmbedding (collecting those of all operators takes seconds)."""
    importlib.import_module("onnx.backend.test.case.node.rotaryembedding")
    cases = {case.name: case for case in onnx_cases._NodeTestCases}
    return {name: case for name, case in cases.items() if not name.endswith("_expanded")}


def case_arrays(case):
    """Inputs and the expected output, 3-D tensors split into heads."""
    (node,) = case.model.graph.node
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    inputs, (expected,) = (
        [a if isinstance(a, np.ndarray) else numpy_helper.to_array(a) for a in arrays]
        for arrays in case.data_sets[0]
    )
    x, cos, sin, *position_ids = (torch.from_numpy(a) for a in inputs)
    expected = torch.from_numpy(expected)
    if x.ndim == 3:
        heads = (attributes["num_heads"], -1)
        x, expected = (t.unflatten(-1, heads).transpose(1, 2) for t in (x, expected))
    layout = "interleaved" if attributes.get("interleaved") else "half"
    return x, cos, sin, position_ids, expected, layout


def test_no_onnx_case_is_left_out(onnx_backend_cases):
    found = [name for name in onnx_backend_cases if name.startswith("test_rotary_embedding")]
    assert sorted(found) == ONNX_CASES


@pytest.mark.parametrize("name", ONNX_CASES)
def test_onnx_node_tests_are_reproduced(onnx_backend_cases, name):
    x, cos, sin, position_ids, expected, layout = case_arrays(onnx_backend_cases[name])
    rows = [table[position_ids[0]] if position_ids else table for table in (cos, sin)]
    actual = rotate_pairs(x, *(table.unsqueeze(1) for table in rows), layout=layout)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ONNX_CASES if "no_position_ids" not in name])
def test_onnx_node_tests_are_reproduced_by_the_module_with_their_tables(onnx_backend_cases, name):
    x, cos, sin, (position_ids,), expected, layout = case_arrays(onnx_backend_cases[name])
    rope = RotaryEmbedding(2 * cos.shape[1], layout=layout, max_seq_len=cos.shape[0])
    rope.angles.cos, rope.angles.sin = cos, sin
    for actual in rope.rotate(x, x, position_ids=position_ids):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# Positions

POSITIONS = {
    "implied": ({}, np.arange(6)),
    "offset": ({"offset": 50}, np.arange(50, 56)),
    "tensor offset": ({"offset": torch.tensor(50)}, np.arange(50, 56)),
    "int32 tensor offset": ({"offset": torch.tensor(58, dtype=torch.int32)}, np.arange(58, 64)),
    "ids [S]": ({"position_ids": torch.tensor([5, 0, 63, 5, 1, 2])}, [5, 0, 63, 5, 1, 2]),
    "ids [1, S]": ({"position_ids": torch.arange(9, 3, -1)[None]}, [[9, 8, 7, 6, 5, 4]]),
    "ids [B, S]": (
        {"position_ids": torch.arange(12).reshape(2, 6) * 5},
        np.arange(12).reshape(2, 6) * 5,
    ),
    "int32 ids": (
        {"position_ids": torch.arange(12, dtype=torch.int32).reshape(2, 6)},
        np.arange(12).reshape(2, 6),
    ),
}


@ANY_LENGTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [2, 6, 8])
@pytest.mark.parametrize(("arguments", "positions"), POSITIONS.values(), ids=POSITIONS)
def test_every_way_to_give_positions(max_seq_len, layout, dim, arguments, positions):
    rope = RotaryEmbedding(dim, theta=100.0, layout=layout, max_seq_len=max_seq_len)
    inputs = queries_and_keys(6)
    outputs = rope.rotate(*inputs, **arguments)
    assert_rotated(outputs, inputs, positions, inverse_frequencies(dim, 100.0), layout)


@pytest.mark.parametrize(("dim", "theta"), [(8, 10000.0), (128, 500000.0), (6, 2.0)])
def test_without_a_longest_length_every_position_is_within_a_millionth(dim, theta):
    boundaries = [4096 * n + step for n in (1, 2, 1221, 2442, 8191) for step in (-1, 0, 1)]
    drawn = np.random.default_rng(0).integers(0, LAST_WITHOUT_LENGTH, 2000)
    positions = np.array([0, 1, *boundaries, *drawn, 10_000_000, 2**24 + 1, LAST_WITHOUT_LENGTH])
    rope = RotaryEmbedding(dim, theta=theta)
    assert rope.positions == LAST_WITHOUT_LENGTH + 1
    angles = np.outer(positions, inverse_frequencies(dim, theta))
    cos, sin = rope.cos_sin(torch.from_numpy(positions))
    assert np.abs(cos.numpy() - np.cos(angles)).max() < 1e-6
    assert np.abs(sin.numpy() - np.sin(angles)).max() < 1e-6


@pytest.mark.parametrize("offset", [4090, 9_999_990, LAST_WITHOUT_LENGTH - 15])
def test_long_offsets_need_no_longest_length(offset):
    inputs = [x.clamp(-0.7, 0.7) for x in queries_and_keys(16)]  # no pair is longer than one
    positions = np.arange(offset, offset + 16)
    for given in (offset, torch.tensor(offset)):
        outputs = RotaryEmbedding(8).rotate(*inputs, offset=given)
        assert_rotated(outputs, inputs, positions, IN_FLOAT64)


def test_the_inverse_frequencies_stay_float64():
    inv_freq = RotaryEmbedding(8, theta=500.0).bfloat16().inv_freq
    assert inv_freq.dtype == torch.float64
    np.testing.assert_allclose(inv_freq, inverse_frequencies(8, 500.0), rtol=5e-16)


# State

TRAINED = [0.9, 0.123, 0.04, 0.0017]


def nested(rope):
    return torch.nn.ModuleDict({"rope": rope}).to(torch.bfloat16)["rope"]


CONVERSIONS = {
    "nothing": lambda rope: rope,
    "bfloat16": lambda rope: rope.to(torch.bfloat16),
    "half": lambda rope: rope.half(),
    "double": lambda rope: rope.double(),
    "half and back": lambda rope: rope.half().float(),
    "bfloat16 in a parent": nested,
    "deepcopy": copy.deepcopy,
    "deepcopy of bfloat16": lambda rope: copy.deepcopy(rope.bfloat16()),
    "pickle": lambda rope: pickle.loads(pickle.dumps(rope)),
    "through meta": lambda rope: rope.to("meta").to_empty(device="cpu"),
    "to_empty": lambda rope: rope.to_empty(device="cpu"),
    "bfloat16 on meta": lambda rope: rope.to("meta").bfloat16().to_empty(device="cpu"),
    "reset_parameters": lambda rope: rope.reset_parameters() or rope,
}


def assert_exact(rope, inv_freq):
    """Float32 tables, each entry within one rounding of float64, and a rotation to match."""
    for angles_per_row, cos, sin in [
        (1, rope.angles.cos, rope.angles.sin),
        (4096, rope.angles.coarse_cos, rope.angles.coarse_sin),
    ]:
        if cos is None:
            assert rope.max_seq_len is not None
            continue
        angles = np.outer(angles_per_row * np.arange(len(cos)), inv_freq)
        for table, exact in ((cos, np.cos(angles)), (sin, np.sin(angles))):
            assert table.dtype == torch.float32
            assert np.abs(table.numpy() - exact).max() <= 6e-8
    assert rope.freqs.dtype == torch.float32
    np.testing.assert_allclose(rope.freqs.numpy(), inv_freq, rtol=6e-8)
    inputs = queries_and_keys(9)
    assert_rotated(rope.rotate(*inputs, offset=55), inputs, np.arange(55, 64), inv_freq)


@ANY_LENGTH
@pytest.mark.parametrize("trained", [False, True], ids=["as built", "loaded"])
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_tables_stay_exact(max_seq_len, trained, convert):
    rope, inv_freq = RotaryEmbedding(8, max_seq_len=max_seq_len), IN_FLOAT64
    if trained:
        rope.load_state_dict({"freqs": torch.tensor(TRAINED)})
        inv_freq = np.array(TRAINED, dtype=np.float32).astype(np.float64)
    assert_exact(convert(rope), inv_freq)


@ANY_LENGTH
@pytest.mark.parametrize("then", ["to_empty", "bfloat16, then to_empty"])
def test_tables_of_a_module_made_on_meta_come_with_its_device(max_seq_len, then):
    with torch.device("meta"):
        rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    assert all(buffer.is_meta for buffer in rope.buffers())
    if then.startswith("bfloat16"):
        rope = rope.bfloat16()
    assert_exact(rope.to_empty(device="cpu"), IN_FLOAT64)


@ANY_LENGTH
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_a_module_made_on_meta_takes_a_state_dict_by_assignment(max_seq_len, theta):
    state = RotaryEmbedding(8, theta=theta).state_dict()
    with torch.device("meta"):
        rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    rope.load_state_dict(state, assign=True)
    loaded = IN_FLOAT64 if theta == 10000.0 else state["freqs"].double().numpy()
    assert_exact(rope, loaded)


@ANY_LENGTH
def test_a_module_left_on_meta_copies_nothing_as_torch_warns(max_seq_len):
    with torch.device("meta"):
        rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    with pytest.warns(UserWarning, match="no-op"):
        rope.load_state_dict(RotaryEmbedding(8).state_dict())
    assert_exact(rope.to_empty(device="cpu"), IN_FLOAT64)


@ANY_LENGTH
def test_the_state_dict_holds_the_frequencies_alone(max_seq_len):
    state = RotaryEmbedding(8, theta=500.0, max_seq_len=max_seq_len).bfloat16().state_dict()
    assert list(state) == ["freqs"]
    expected = inverse_frequencies(8, 500.0).astype(np.float32)
    np.testing.assert_array_equal(state["freqs"].numpy(), expected)


OTHERS = {
    "same theta": {},
    "other theta": {"theta": 500.0},
    "learned": {"custom_freqs": torch.tensor(TRAINED), "learned_freq": True},
}


@ANY_LENGTH
@pytest.mark.parametrize("prefix", ["", "rope."])
@pytest.mark.parametrize("theirs", OTHERS.values(), ids=OTHERS)
def test_after_loading_rotary_embedding_torch_the_rotation_is_theirs(max_seq_len, prefix, theirs):
    other = rotary_embedding_torch.RotaryEmbedding(dim=8, **theirs)
    rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    holder = torch.nn.ModuleDict({"rope": rope}) if prefix else rope
    holder.load_state_dict({prefix + name: t for name, t in other.state_dict().items()})
    t = normal(2, 3, 60, 12)
    expected = other.rotate_queries_or_keys(t).detach()
    torch.testing.assert_close(rope.rotate_queries_or_keys(t), expected, rtol=0, atol=2e-5)
    # Rounded to float32 the default frequencies are the same: ours stay the exact ones.
    freqs = other.freqs.detach().double().numpy() if theirs else IN_FLOAT64
    assert_exact(rope, freqs)


@pytest.mark.parametrize("state", [{}, RotaryEmbedding(8).state_dict()], ids=["no freqs", "own"])
def test_a_checkpoint_with_the_same_frequencies_costs_no_precision(state):
    rope = RotaryEmbedding(8)
    rope.load_state_dict(state, strict=bool(state))
    np.testing.assert_allclose(rope.inv_freq, IN_FLOAT64, rtol=5e-16)
    assert_exact(rope, IN_FLOAT64)


def test_a_checkpoint_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for freqs.*\[2\].*\[4\]"):
        RotaryEmbedding(8).load_state_dict(RotaryEmbedding(4).state_dict())


@ANY_LENGTH
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CALLS, 2)))
def test_no_call_depends_on_an_earlier_one(max_seq_len, first, second):
    rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    CALLS[first](rope)
    fresh = CALLS[second](RotaryEmbedding(8, max_seq_len=max_seq_len))
    for again, expected in zip(CALLS[second](rope), fresh, strict=True):
        assert torch.equal(again, expected)
        assert again.dtype == expected.dtype


@ANY_LENGTH
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_changes_nothing_in_the_module(max_seq_len, call):
    rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    before = pickle.dumps(rope)
    versions = [buffer._version for buffer in rope.buffers()]
    call(rope)
    assert pickle.dumps(rope) == before
    assert [buffer._version for buffer in rope.buffers()] == versions


def test_inputs_are_left_as_they_were():
    inputs = queries_and_keys(6)
    copies = [x.clone() for x in inputs]
    RotaryEmbedding(4).rotate(*inputs)
    assert all(torch.equal(x, original) for x, original in zip(inputs, copies, strict=True))


# Refusals

BAD_CONSTRUCTIONS = [
    ({"dim": 63}, "dim must be a positive even integer, got 63"),
    ({"dim": 0}, "dim must be a positive even integer, got 0"),
    ({"dim": -2}, "dim must be a positive even integer, got -2"),
    ({"dim": 8.0}, r"dim must be a positive even integer, got 8\.0"),
    ({"dim": True}, "dim must be a positive even integer, got True"),
    ({"layout": "neox"}, "layout must be one of half, interleaved, got 'neox'"),
    ({"layout": None}, "layout must be one of half, interleaved, got None"),
    ({"theta": float("nan")}, "theta must be a finite number above 0, got nan"),
    ({"theta": float("inf")}, "theta must be a finite number above 0, got inf"),
    ({"theta": 0}, "theta must be a finite number above 0, got 0"),
    ({"theta": -10000.0}, r"theta must be a finite number above 0, got -10000\.0"),
    ({"max_seq_len": 0}, "max_seq_len must be an integer above 0, got 0"),
    ({"max_seq_len": -5}, "max_seq_len must be an integer above 0, got -5"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_CONSTRUCTIONS, ids=[message for _, message in BAD_CONSTRUCTIONS]
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(BadInputError, match=f"^{message}$"):
        RotaryEmbedding(**({"dim": 8} | arguments))


IDS = torch.arange(10).reshape(2, 5)
BAD_CALLS = [
    ({"position_ids": IDS.float()}, "position_ids must be int32 or int64, got torch.float32"),
    ({"position_ids": IDS.bool()}, "position_ids must be int32 or int64, got torch.bool"),
    ({"position_ids": IDS.to(torch.complex64)}, "position_ids must be .*got torch.complex64"),
    ({"position_ids": IDS.to(torch.int16)}, "position_ids must be .*got torch.int16"),
    ({"position_ids": IDS.to(torch.uint8)}, "position_ids must be .*got torch.uint8"),
    ({"position_ids": IDS[0, :4]}, r"sequence length 5 as last axis, got \(4,\)"),
    ({"position_ids": IDS[:, :1]}, r"sequence length 5 as last axis, got \(2, 1\)"),
    ({"position_ids": IDS[None]}, r"\[S\] or \[B, S\], got \(1, 2, 5\)"),
    ({"position_ids": torch.tensor(3)}, r"\[S\] or \[B, S\], got \(\)"),
    ({"position_ids": torch.zeros(3, 5, dtype=torch.int64)}, r"position_ids .*got \(3, 5\)"),
    ({"offset": 60}, "positions must lie in 0 … 63, got 60 … 64; raise max_seq_len"),
    ({"offset": 64}, "positions must lie in 0 … 63, got 64 … 68; raise max_seq_len"),
    ({"offset": -1}, "positions must lie in 0 … 63, got -1 … 3"),
    ({"offset": 1.5}, r"offset must be .*got .*1\.5"),
    ({"offset": None}, "offset must be .*got None"),
    ({"offset": "1"}, "offset must be .*got '1'"),
    ({"offset": True}, "offset must be .*got True"),
    ({"offset": torch.tensor(1.5)}, r"offset must be .*(1\.5|float32)"),
    ({"offset": torch.arange(5)}, r"offset must be .*\(5,\)"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS]
)
def test_positions_that_do_not_fit_are_refused(arguments, message):
    rope = RotaryEmbedding(8, max_seq_len=64)
    with pytest.raises(BadInputError, match=message):
        rope.rotate(*queries_and_keys(5), **arguments)


def test_batched_positions_never_widen_the_batch():
    rope, inputs = RotaryEmbedding(8, max_seq_len=64), queries_and_keys(5, batch=1)
    with pytest.raises(BadInputError, match=r"position_ids .*got \(2, 5\)"):
        rope.rotate(*inputs, position_ids=IDS)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "message"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 8), r"q must be \[\.\.\., S, D\] with D >= 8, got \(1, 2, 3, 4\)"),
        ((1, 2, 3, 8), (1, 2, 3, 7), r"k must be \[\.\.\., S, D\] with D >= 8, got \(1, 2, 3, 7\)"),
        ((8,), (8,), r"q must be \[\.\.\., S, D\] with D >= 8, got \(8,\)"),
        ((1, 1, 65, 8), (1, 1, 65, 8), "positions must lie in 0 … 63, got 0 … 64"),
    ],
)
def test_heads_that_do_not_fit_are_refused(q_shape, k_shape, message):
    with pytest.raises(BadInputError, match=message):
        RotaryEmbedding(8, max_seq_len=64).rotate(torch.zeros(q_shape), torch.zeros(k_shape))


def test_batched_positions_need_a_batch():
    t = torch.zeros(2, 5, 8)
    with pytest.raises(BadInputError, match=r"got \(2, 5\) and heads without a batch"):
        RotaryEmbedding(8).rotate(t, t, position_ids=IDS)


def test_without_a_longest_length_2_to_the_25_positions_are_the_limit():
    with pytest.raises(
        BadInputError, match="positions must lie in 0 … 33554431, got 33554428 … 33554432"
    ):
        RotaryEmbedding(8).rotate(*queries_and_keys(5), offset=2**25 - 4)


@ANY_LENGTH
@pytest.mark.parametrize("beyond", [-1, 1])
def test_explicit_positions_out_of_range_raise_when_looked_up(max_seq_len, beyond):
    rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    position = -1 if beyond < 0 else rope.positions
    message = f"position_ids must lie in 0 … {rope.positions - 1}, got {position} … {position};"
    with pytest.raises(BadInputError, match=message):
        rope.rotate(*queries_and_keys(1), position_ids=torch.tensor([position]))
    with pytest.raises(BadInputError, match=message):
        rope.rotate(*queries_and_keys(1), offset=torch.tensor(position))
