"""Float64 truth against a naive evaluation token by token, and against transformers in double."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from rope_export.attention.block import Attention
from rope_export.proof import reference
from rope_export.proof.reference import (
    Semantics,
    attention_truth,
    exact_angles,
    rotate_exactly,
    truth_flops,
)
from rope_export.rope.embedding import RotaryEmbedding
from rope_export.rope.frequencies import Frequencies

HIDDEN, HEAD_DIM, THETA = 12, 6, 50.0


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def block_of(heads=4, kv_heads=2, *, rotary_dim=HEAD_DIM, layout="half", bias=True, **variant):
    """A small block whose weights make the scores spread."""
    rope = RotaryEmbedding(rotary_dim, theta=THETA, layout=layout) if rotary_dim else None
    block = Attention(
        HIDDEN,
        heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        **variant,
    ).double()
    rng = np.random.default_rng(0)
    for parameter in block.parameters():
        parameter.data = torch.from_numpy(rng.standard_normal(parameter.shape) / 2)
    return block.eval()


def project(layer, vector):
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    return layer.weight.detach().double().numpy() @ vector + bias


def turn(head, position, inv_freq, layout):
    """Rotate one head of one token, pair by pair."""
    head = head.copy()
    for pair, frequency in enumerate(inv_freq):
        first, second = (
            (pair, pair + len(inv_freq)) if layout == "half" else (2 * pair, 2 * pair + 1)
        )
        turned = complex(head[first], head[second]) * np.exp(1j * position * frequency)
        head[first], head[second] = turned.real, turned.imag
    return head


def naive_sequence(block, x, positions, defect):
    """One sequence ``[S, hidden]`` in plain loops; ``defect`` replaces what the block states."""
    heads, kv_heads = block.num_heads, block.num_kv_heads
    layout = defect.get("layout", block.rope.layout if block.rope else "half")
    rotary_dim = block.rope.dim if block.rope else 0
    frequencies = defect.get(
        "inv_freq", [THETA ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    )
    q, k, v = (
        [project(layer, token).reshape(-1, width) for token in x]
        for layer, width in (
            (block.q_proj, HEAD_DIM),
            (block.k_proj, HEAD_DIM),
            (block.v_proj, block.value_head_dim),
        )
    )
    if block.q_norm is not None and "norm_eps" not in defect:
        q, k = (
            [[normalised(head, norm) for head in token] for token in x]
            for x, norm in ((q, block.q_norm), (k, block.k_norm))
        )
    length = np.ones(HEAD_DIM)
    length[: 2 * len(frequencies)] = defect.get("attention_factor", 1.0)
    shift, roll = defect.get("query_shift", 0), defect.get("value_roll", 0)
    rows = []
    for row in range(len(x)):
        causal, window = defect.get("causal", block.causal), defect.get("window", block.window)
        visible = [
            j
            for j in range(len(x))
            if not (causal and j > row)
            and (window is None or (j > row - window if causal else abs(j - row) <= window))
        ]
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            query = length * turn(q[row][head], positions[row] + shift, frequencies, layout)
            keys = [length * turn(k[j][shared], positions[j], frequencies, layout) for j in visible]
            scores = np.array([query @ key for key in keys]) * defect.get("scale", block.scale)
            softcap = defect.get("softcap", block.softcap)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            sinks = defect.get("sinks", None if block.sinks is None else block.sinks.detach())
            sink = 0.0 if sinks is None else math.exp(float(sinks[head]) - scores.max())
            weights /= weights.sum() + sink
            values = [v[j][(shared - roll) % kv_heads] for j in visible]
            mixed.append(sum(w * value for w, value in zip(weights, values, strict=True)))
        rows.append(project(block.o_proj, np.concatenate(mixed)))
    return np.stack(rows)


def normalised(head, norm):
    return head / math.sqrt(np.mean(head**2) + norm.eps) * norm.weight.detach().double().numpy()


def naive(block, x, position_ids=None, **defect):
    batch, length, _ = x.shape
    positions = np.arange(length) if position_ids is None else position_ids.numpy()
    positions = np.broadcast_to(positions, (batch, length))
    sequences = zip(x.double().numpy(), positions, strict=True)
    return np.stack([naive_sequence(block, tokens, ids, defect) for tokens, ids in sequences])


def assert_exact(actual, expected):
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


BLOCKS = {
    "multi-head": {"heads": 2, "kv_heads": 2},
    "grouped": {"heads": 4, "kv_heads": 2},
    "multi-query": {"heads": 3, "kv_heads": 1},
    "interleaved": {"layout": "interleaved"},
    "partial": {"rotary_dim": 4},
    "partial interleaved": {"rotary_dim": 2, "layout": "interleaved"},
    "no rope": {"rotary_dim": 0},
    "no biases": {"bias": False},
    "window": {"window": 3},
    "soft cap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "query and key norms": {"qk_norm": True},
    "narrow values": {"value_head_dim": 3},
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_truth_is_the_naive_evaluation(options, causal):
    block = block_of(**options, causal=causal)
    for batch, length in [(2, 7), (1, 1), (3, 4)]:
        x = normal(batch, length, HIDDEN)
        assert_exact(attention_truth(block, x), naive(block, x))


def test_scores_beyond_the_range_of_exp_do_not_overflow():
    block, x = block_of(), 60 * normal(2, 7, HIDDEN)
    q, k, _ = block.heads(x)
    assert (q @ k.repeat_interleave(2, dim=1).mT * block.scale).max() > 2000
    np.testing.assert_allclose(attention_truth(block, x), naive(block, x), rtol=1e-9)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "position_ids",
    [torch.tensor([5, 0, 900, 900, 3]), torch.tensor([[0, 1, 2, 0, 1], [70, 71, 72, 73, 10**7]])],
    ids=["[S]", "[B, S]"],
)
def test_positions_are_taken_as_given(causal, position_ids):
    block, x = block_of(causal=causal), normal(2, 5, HIDDEN)
    actual = attention_truth(block, x, position_ids=position_ids)
    # Angles of ten million radians carry an error of 1e-9 in float64.
    np.testing.assert_allclose(actual.numpy(), naive(block, x, position_ids), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_truth_is_of_the_rounded_weights_and_inputs(dtype):
    """Nothing is rounded again: the float64 result is that of the values as they are."""
    block, x = block_of().to(dtype), normal(2, 5, HIDDEN).to(dtype)
    assert_exact(attention_truth(block, x), naive(block, x))
    assert block.q_proj.weight.dtype == dtype


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("implementation", "atol"),
    [("sdpa", 1e-12), ("eager", 5e-6)],  # eager rounds its softmax to float32
)
def test_truth_is_transformers_llama_attention_in_double(num_kv_heads, implementation, atol):
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        attention_bias=True,
        attn_implementation=implementation,
    )
    block = block_of(4, num_kv_heads)
    theirs = LlamaAttention(config, layer_idx=0).double().eval()
    theirs.load_state_dict({n: t for n, t in block.state_dict().items() if n != "rope.freqs"})
    x = normal(2, 33, HIDDEN)
    inv_freq = THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.outer(torch.arange(33, dtype=torch.float64), inv_freq).repeat(1, 2)[None]
    mask = torch.full((33, 33), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = theirs(
            x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=mask
        )
    torch.testing.assert_close(attention_truth(block, x), expected, rtol=0, atol=atol)


ROWS = {
    "first": [0],
    "last": [22],
    "both ends": [0, 1, 21, 22],
    "runs": [0, 1, 2, 9, 10, 11, 20, 21, 22],
    "all": list(range(23)),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_sampled_rows_are_those_of_the_whole(causal, with_ids, rows):
    block, x = block_of(causal=causal), normal(2, 23, HIDDEN)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 99, (2, 23))) if with_ids else None
    actual = attention_truth(block, x, position_ids=ids, rows=torch.tensor(rows))
    assert actual.shape == (2, len(rows), HIDDEN)
    assert_exact(actual, naive(block, x, ids)[:, rows])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("rows", [None, [0, 1, 5, 11, 12]])
def test_slicing_for_memory_changes_nothing(monkeypatch, causal, rows):
    block, x = block_of(causal=causal), normal(2, 13, HIDDEN)
    # Three rows of scores at a time, four projected tokens at a time: neither divides the length.
    monkeypatch.setattr(reference, "_SLICE_ELEMENTS", 3 * 2 * 4 * 13)
    monkeypatch.setattr(reference, "_PROJECTED_TOKENS", 4)
    picked = None if rows is None else torch.tensor(rows)
    expected = naive(block, x)[:, slice(None) if rows is None else rows]
    assert_exact(attention_truth(block, x, rows=picked), expected)


DEFECTS = {
    "scale": {"scale": 1.02 * HEAD_DIM**-0.5},
    "sine negated": {"found": {"inv_freq": -(THETA ** -(torch.arange(3.0).double() / 3))}},
    "other theta": {"found": {"inv_freq": 60.0 ** -(torch.arange(3.0).double() / 3)}},
    "other pairing": {"layout": "interleaved"},
    "mask": {"causal": False},
    "queries one late": {"query_shift": 1},
    "values rolled": {"value_roll": 1},
    "attention factor": {"found": {"attention_factor": 1.1}},
    "window": {"window": 3},
    "soft cap": {"softcap": 0.7},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_a_stated_defect_is_evaluated_and_seen(defect):
    block, x = block_of(), normal(2, 9, HIDDEN)
    meaning, in_found = Semantics.of(block), defect.get("found", {})
    meaning = replace(meaning, **defect | {"found": replace(meaning.found, **in_found)})
    actual = attention_truth(block, x, semantics=meaning)
    naive_defect = {n: v for n, v in (defect | in_found).items() if n != "found"}
    if "inv_freq" in naive_defect:
        naive_defect["inv_freq"] = naive_defect["inv_freq"].tolist()
    assert_exact(actual, naive(block, x, **naive_defect))
    truth = attention_truth(block, x)
    assert (actual - truth).norm() / truth.norm() > 5e-3


def test_every_field_of_the_semantics_has_a_defect_or_is_a_shape():
    # xPos, norms and caches of integers: elsewhere.
    shapes = {"num_heads", "num_kv_heads", "decay", "norm_eps", "rounding"}
    stated = {name for defect in DEFECTS.values() for name in defect}
    assert stated | shapes == set(Semantics.__dataclass_fields__)


def test_the_semantics_are_read_off_the_block():
    block = block_of(4, 2, rotary_dim=4, layout="interleaved", causal=False)
    meaning = Semantics.of(block)
    expected = THETA ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    torch.testing.assert_close(meaning.found.inv_freq, expected, rtol=1e-15, atol=0)
    assert replace(meaning, found=None) == Semantics(
        num_heads=4,
        num_kv_heads=2,
        causal=False,
        scale=HEAD_DIM**-0.5,
        found=None,
        layout="interleaved",
    )
    assert Semantics.of(block_of(rotary_dim=0)).found is None


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [2, 4, 6])
@pytest.mark.parametrize("batched", [False, True])
def test_the_exact_rotation_turns_pair_by_pair(layout, rotary_dim, batched):
    heads = normal(2, 3, 5, HEAD_DIM)
    inv_freq = THETA ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    positions = torch.arange(10).reshape(2, 5) if batched else torch.arange(5)
    angles = exact_angles(positions, Frequencies(inv_freq), longest=10)
    actual = rotate_exactly(heads, angles, layout).numpy()
    per_row = np.broadcast_to(positions.numpy(), (2, 5))
    for b, h, s in np.ndindex(2, 3, 5):
        expected = turn(heads[b, h, s].numpy(), per_row[b, s], inv_freq.tolist(), layout)
        np.testing.assert_allclose(actual[b, h, s], expected, rtol=0, atol=1e-13)


def with_rope(**arguments):
    block = block_of()
    block.rope = RotaryEmbedding(HEAD_DIM, **{"theta": THETA} | arguments)
    return block


@pytest.mark.parametrize("length", [5, 8, 9, 23])
def test_dynamic_ntk_is_plain_rope_with_another_base(length):
    """transformers' ``_compute_dynamic_ntk_parameters``, in float64."""
    scaling = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8}
    stretched = (3.0 * max(length, 8) / 8 - 2.0) ** (HEAD_DIM / (HEAD_DIM - 2))
    x = normal(2, length, HIDDEN)
    actual = attention_truth(with_rope(scaling=scaling, max_seq_len=64), x)
    assert_exact(actual, attention_truth(with_rope(theta=THETA * stretched), x).numpy())


def test_each_axis_turns_its_own_pairs():
    scaling = {"rope_type": "mrope", "mrope_section": [1, 2]}
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 99, (2, 2, 7)))
    found = with_rope(scaling=scaling).rope.found
    angles = exact_angles(ids, found, longest=100)
    for pair, axis in enumerate([0, 1, 1]):
        exact = ids[axis].double() * THETA ** (-2 * pair / HEAD_DIM)
        torch.testing.assert_close(angles[..., pair], exact, rtol=1e-15, atol=0)


def test_xpos_is_that_of_rotary_embedding_torch():
    from rotary_embedding_torch import RotaryEmbedding as Theirs

    theirs = Theirs(HEAD_DIM, theta=THETA, use_xpos=True, xpos_scale_base=4)
    theirs = theirs.double()
    block = with_rope(use_xpos=True, xpos_scale_base=4)
    x = normal(2, 9, HIDDEN)
    heads = rearrange(normal(2, 9, 4 * HEAD_DIM), "b s (h d) -> b h s d", h=4)
    q, k = theirs.rotate_queries_and_keys(heads, heads)
    scores = q @ k.transpose(-1, -2)
    found, decay = block.rope.found, Semantics.of(block).decay
    positions = torch.arange(9)
    angles = exact_angles(positions, found, longest=9)
    scale = decay ** positions.unsqueeze(-1)
    ours = rotate_exactly(heads, angles, "interleaved", scale) @ rotate_exactly(
        heads, angles, "interleaved", 1 / scale
    ).transpose(-1, -2)
    torch.testing.assert_close(ours, scores, rtol=0, atol=1e-5)
    plain = attention_truth(block, x, semantics=replace(Semantics.of(block), decay=None))
    assert (attention_truth(block, x) - plain).norm() / plain.norm() > 0.05


def test_truth_takes_no_gradient_and_changes_nothing():
    block, x = block_of(), normal(2, 5, HIDDEN).requires_grad_()
    before = [t.detach().clone() for t in (x, *block.parameters())]
    assert not attention_truth(block, x).requires_grad
    after = (x, *block.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("causal", "flops"), [(False, 4.0 * 3 * 4 * 6 * 25), (True, 3600.0)])
def test_work_is_counted_for_scores_and_mix(causal, flops):
    assert truth_flops(block_of(causal=causal), batch=3, length=5) == flops
