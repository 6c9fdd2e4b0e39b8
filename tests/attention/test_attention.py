"""The attention block against transformers' own attention modules, eager and compiled."""

import copy
import itertools

import numpy as np
import pytest
import torch
from selection import slow_unless
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GlmConfig, LlamaConfig, PhiConfig
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.phi.modeling_phi import PhiAttention

from rope_export.attention.block import Attention
from rope_export.attention.specs import Latent, QKNorm
from rope_export.errors import BadInputError
from rope_export.rope.embedding import RotaryEmbedding

HIDDEN, HEADS, HEAD_DIM, THETA = 24, 4, 8, 500.0
HEAD_SHARING = pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
# Of outputs near 3. Eager transformers rounds the softmax to float32 even in double, and our
# tables are float32 by design.
CLOSE = {"rtol": 0, "atol": 5e-6}


def random_weights(module, seed=0):
    """Fill a module with weights that make the scores spread, in float64."""
    rng = np.random.default_rng(seed)
    for parameter in module.double().parameters():
        parameter.data = torch.from_numpy(rng.standard_normal(parameter.shape) / 3)
    return module.eval()


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def common(num_kv_heads):
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": num_kv_heads,
        "attn_implementation": "eager",
    }


def llama(num_kv_heads, *, bias=False):
    config = LlamaConfig(**common(num_kv_heads), head_dim=HEAD_DIM, attention_bias=bias)
    return random_weights(LlamaAttention(config, layer_idx=0))


def phi(num_kv_heads):
    """Partial rotation of halves; the head is ``hidden_size / heads`` and everything has a bias."""
    config = PhiConfig(
        **(common(num_kv_heads) | {"hidden_size": HEADS * HEAD_DIM}),
        rope_parameters={"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5},
    )
    theirs = random_weights(PhiAttention(config, layer_idx=0))
    theirs.o_proj = theirs.dense
    return theirs


def glm(num_kv_heads):
    """Partial rotation of neighbours, biases on the way in only."""
    config = GlmConfig(
        **common(num_kv_heads), head_dim=HEAD_DIM, attention_bias=True, pad_token_id=0
    )
    return random_weights(GlmAttention(config, layer_idx=0))


def ours_from(theirs, *, layout="half", rotary_dim=HEAD_DIM, max_seq_len=64, **options):
    """Our block with a copy of their weights, under the names both have."""
    rope = None
    if rotary_dim:
        rope = RotaryEmbedding(rotary_dim, theta=THETA, layout=layout, max_seq_len=max_seq_len)
    block = Attention(
        theirs.q_proj.in_features,
        HEADS,
        num_kv_heads=theirs.k_proj.out_features // HEAD_DIM,
        head_dim=HEAD_DIM,
        rope=rope,
        qkv_bias=theirs.q_proj.bias is not None,
        out_bias=theirs.o_proj.bias is not None,
        **options,
    ).double()
    weights = {n: t for n, t in theirs.state_dict().items() if not n.startswith("dense")}
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["rope.freqs"] if rope else [], [])
    return block.eval()


def cos_sin(position_ids, rotary_dim=HEAD_DIM):
    """Their ``position_embeddings``, in float64."""
    inv_freq = THETA ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = position_ids.double().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def run_theirs(theirs, x, *, position_ids=None, causal=True, rotary_dim=HEAD_DIM):
    batch, length, _ = x.shape
    if position_ids is None:
        position_ids = torch.arange(length)
    angles = cos_sin(position_ids.expand(batch, length), rotary_dim or HEAD_DIM)
    if not rotary_dim:
        angles = (torch.ones_like(angles[0]), torch.zeros_like(angles[0]))
    hidden = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
    mask = hidden[None, None] if causal else None
    return theirs(x, position_embeddings=angles, attention_mask=mask)[0]


@HEAD_SHARING
@CAUSAL
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_the_block_is_llamas_attention(num_kv_heads, causal, bias):
    theirs = llama(num_kv_heads, bias=bias)
    ours = ours_from(theirs, causal=causal)
    for batch, length in [(2, 13), (1, 1), (3, 64)]:
        x = normal(batch, length, HIDDEN)
        torch.testing.assert_close(ours(x), run_theirs(theirs, x, causal=causal), **CLOSE)


@HEAD_SHARING
@CAUSAL
@pytest.mark.parametrize(
    ("make", "layout", "rotary_dim"),
    [(phi, "half", 4), (glm, "interleaved", 4), (glm, "interleaved", 8)],
    ids=["half of Phi", "half of GLM", "all of GLM"],
)
def test_partial_and_interleaved_rotation(num_kv_heads, causal, make, layout, rotary_dim):
    theirs = make(num_kv_heads)
    ours = ours_from(theirs, layout=layout, rotary_dim=rotary_dim, causal=causal)
    x = normal(2, 13, theirs.q_proj.in_features)
    expected = run_theirs(theirs, x, causal=causal, rotary_dim=rotary_dim)
    torch.testing.assert_close(ours(x), expected, **CLOSE)


@CAUSAL
def test_without_rope_no_position_is_seen(causal):
    theirs = llama(2)
    ours = ours_from(theirs, rotary_dim=0, causal=causal)
    x = normal(2, 13, HIDDEN)
    torch.testing.assert_close(ours(x), run_theirs(theirs, x, rotary_dim=0, causal=causal), **CLOSE)


def drawn_ids(*shape):
    return torch.from_numpy(np.random.default_rng(5).integers(0, 64, shape))


POSITIONS = {
    "offset": ({"offset": 40}, torch.arange(40, 53)),
    "tensor offset": ({"offset": torch.tensor(40)}, torch.arange(40, 53)),
    "ids [S]": ({"position_ids": drawn_ids(13)}, drawn_ids(13)),
    "ids [B, S]": ({"position_ids": drawn_ids(2, 13)}, drawn_ids(2, 13)),
}


@CAUSAL
@pytest.mark.parametrize("max_seq_len", [64, None])
@pytest.mark.parametrize(("arguments", "position_ids"), POSITIONS.values(), ids=POSITIONS)
def test_positions_turn_the_heads_and_leave_the_mask(causal, max_seq_len, arguments, position_ids):
    theirs = llama(2)
    ours = ours_from(theirs, causal=causal, max_seq_len=max_seq_len)
    x = normal(2, 13, HIDDEN)
    expected = run_theirs(theirs, x, position_ids=position_ids, causal=causal)
    torch.testing.assert_close(ours(x, **arguments), expected, **CLOSE)


def test_the_scale_can_be_chosen():
    theirs = llama(2)
    theirs.scaling = 0.7
    x = normal(2, 13, HIDDEN)
    torch.testing.assert_close(ours_from(theirs, scale=0.7)(x), run_theirs(theirs, x), **CLOSE)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)],
    ids=str,
)
def test_every_dtype_stays_within_its_own_rounding(dtype, limit):
    theirs = llama(2, bias=True)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype).double()
    x = normal(2, 33, HIDDEN, dtype=dtype)
    actual = ours_from(theirs).to(dtype)(x)
    assert actual.dtype == dtype
    expected = run_theirs(theirs, x.double())
    assert (actual.double() - expected).norm() / expected.norm() < limit


@HEAD_SHARING
def test_gradients_are_those_of_llamas_attention(num_kv_heads):
    theirs = llama(num_kv_heads, bias=True)
    ours = ours_from(theirs)
    upstream = normal(2, 13, HIDDEN, seed=7)
    gradients = []
    for run, module in ((ours, ours), (lambda x: run_theirs(theirs, x), theirs)):
        x = normal(2, 13, HIDDEN).requires_grad_()
        run(x).backward(upstream)
        gradients.append({"x": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The gradient of a key bias is zero: a softmax does not see a shift.
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=2e-5)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def step(run, block, x):
    """One training step: the output, and the gradients of everything."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    output = run(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize(
    ("num_kv_heads", "max_seq_len"),
    slow_unless(
        lambda *row: row == (2, 64),
        itertools.product((4, 2, 1), (64, None)),
    ),
)
def test_training_compiles_to_one_full_graph_with_the_same_gradients(
    counter, num_kv_heads, max_seq_len
):
    block = ours_from(llama(num_kv_heads, bias=True), max_seq_len=max_seq_len).float().train()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    exact = copy.deepcopy(block).double()
    for seed in range(3):
        x = normal(2, 13, HIDDEN, seed=seed, dtype=torch.float32)
        truth = step(exact, exact, x.double())
        for run in (compiled, block):  # their roundings differ: both are held to float64
            for actual, expected in zip(step(run, block, x), truth, strict=True):
                atol = 2e-6 * float(expected.abs().max())
                torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=atol)
    assert counter.frame_count == 1


def test_changing_lengths_compile_to_at_most_two_full_graphs(counter):
    theirs = llama(2)
    block = ours_from(theirs)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in (7, 2, 33, 16, 64, 3):
        x = normal(2, length, HIDDEN)
        torch.testing.assert_close(compiled(x), run_theirs(theirs, x), **CLOSE)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("bias", [False, True])
def test_the_packed_projection_is_the_three_projections_side_by_side(bias):
    theirs = llama(2, bias=bias)
    x = normal(2, 5, HIDDEN)
    expected = torch.cat([p(x) for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)], dim=-1)
    actual = ours_from(theirs).packed_projection(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_the_parts_of_the_block_serve_chosen_query_rows():
    """As the proof of long sequences uses them: some rows, under an explicit mask."""
    theirs = llama(2)
    block, x, rows = ours_from(theirs), normal(2, 13, HIDDEN), torch.tensor([0, 5, 12])
    q, k, v = block.heads(x)
    mask = torch.arange(13) <= rows.unsqueeze(1)
    actual = block.merge(block.attend(q[:, :, rows], k, v, visible=mask))
    torch.testing.assert_close(actual, run_theirs(theirs, x)[:, rows], **CLOSE)


def test_the_state_dict_holds_weights_and_frequencies():
    block = Attention(8, 2, rope=RotaryEmbedding(4), qkv_bias=True, out_bias=True)
    names = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    assert set(block.state_dict()) == names | {"rope.freqs"}


NARROW = {"hidden_size": 8, "num_heads": 2}
BAD_CONSTRUCTIONS = [
    ({"hidden_size": 0}, "hidden_size must be an integer above 0, got 0"),
    ({"num_heads": 0}, "num_heads must be an integer above 0, got 0"),
    ({"num_heads": -2}, "num_heads must be an integer above 0, got -2"),
    ({"num_kv_heads": 0}, "num_kv_heads must be an integer above 0, got 0"),
    ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 2 and 3"),
    (
        {"num_heads": 3},
        "hidden_size must be a multiple of num_heads when head_dim is not given, got 8 and 3",
    ),
    ({"head_dim": 0}, "head_dim must be an integer above 0, got 0"),
    ({"head_dim": -8}, "head_dim must be an integer above 0, got -8"),
    ({"rope": RotaryEmbedding(6)}, "rotary_dim must be at most head_dim, got 6 and 4"),
    ({"scale": 0.0}, r"scale must be a finite number above 0, got 0\.0"),
    ({"scale": -1.0}, r"scale must be a finite number above 0, got -1\.0"),
    ({"scale": float("nan")}, "scale must be a finite number above 0, got nan"),
    ({"scale": float("inf")}, "scale must be a finite number above 0, got inf"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_CONSTRUCTIONS, ids=[message for _, message in BAD_CONSTRUCTIONS]
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(BadInputError, match=f"^{message}$"):
        Attention(**(NARROW | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.arange(4)}, r"sequence length 5 as last axis, got \(4,\)"),
        ({"position_ids": torch.rand(5)}, "position_ids must be int32 or int64, got torch.float32"),
        ({"offset": 4}, "positions must lie in 0 … 7, got 4 … 8"),
        ({"offset": -1}, "positions must lie in 0 … 7, got -1 … 3"),
    ],
)
def test_positions_that_do_not_fit_are_refused(arguments, message):
    block = Attention(8, 2, rope=RotaryEmbedding(4, max_seq_len=8))
    with pytest.raises(BadInputError, match=message):
        block(torch.zeros(1, 5, 8), **arguments)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ({"kind": "batch"}, "kind of a norm must be one of rms, layer, got 'batch'"),
        ({"over": "token"}, "over of a norm must be one of head, each_head, projection"),
        ({"bias": True}, "bias is of a layer norm, got it with kind 'rms'"),
        ({"eps": 0.0}, "qk_norm_eps must be a finite number above 0, got 0.0"),
    ],
)
def test_norms_that_cannot_be_are_refused(norm, message):
    with pytest.raises(BadInputError, match=message):
        QKNorm(**norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": None}, "latent needs a rope that rotates part of each head, got None"),
        ({"num_kv_heads": 2}, "latent needs num_kv_heads equal to num_heads, got 2 and 4"),
        ({"qkv_bias": True}, "latent has a bias of its own, got qkv_bias=True"),
    ],
)
def test_latents_that_cannot_be_are_refused(options, message):
    given = {"rope": RotaryEmbedding(4, max_seq_len=8), "head_dim": 12} | options
    with pytest.raises(BadInputError, match=message):
        Attention(32, 4, latent=Latent(8), **given)


@pytest.mark.parametrize("rank", [None, 6])
def test_what_goes_through_latents_is_their_definition(rank):
    """DeepSeek-V2, equations 9 to 19, in float64."""
    torch.manual_seed(0)
    rope = RotaryEmbedding(4, max_seq_len=16)
    block = Attention(32, 4, head_dim=12, value_head_dim=10, rope=rope, latent=Latent(8, rank))
    random_weights(block)
    w = {name: p.detach() for name, p in block.latent.named_parameters()}
    x = normal(2, 13, 32)

    def rms(low, name):
        mean = low.square().mean(-1, keepdim=True)
        return low / torch.sqrt(mean + 1e-6) * w[f"{name}.weight"]

    low = x if rank is None else rms(x @ w["q_a_proj.weight"].T, "q_a_norm")
    q = low @ w["q_proj.weight" if rank is None else "q_b_proj.weight"].T
    mixed = x @ w["kv_a_proj.weight"].T
    low = rms(mixed[..., :8], "kv_a_norm")
    plain, v = (low @ w[f"{name}_b_proj.weight"].T for name in "kv")
    got_q, got_k, got_v = block.project(x)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(got_q, q, **close)
    torch.testing.assert_close(got_v, v, **close)
    heads = got_k.unflatten(-1, (4, 12))
    torch.testing.assert_close(heads[..., 4:].flatten(2), plain, **close)
    for head in range(4):
        torch.testing.assert_close(heads[..., head, :4], mixed[..., 8:], **close)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("over", ["head", "each_head", "projection"])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms_of_queries_and_keys_are_their_definition(kind, over, unit_offset):
    norm = QKNorm(kind, over, bias=kind == "layer", unit_offset=unit_offset, eps=0.1)
    block = random_weights(Attention(HIDDEN, HEADS, num_kv_heads=2, qk_norm=norm))
    x = normal(2, 7, HIDDEN)
    q, k, v = block.project(x)
    width = block.head_dim
    for got, made, layer, count in (
        (q, block.q_proj(x), block.q_norm, HEADS),
        (k, block.k_proj(x), block.k_norm, 2),
    ):
        parts = [made] if over == "projection" else made.split(width, dim=-1)
        expected = []
        for head, part in enumerate(parts):
            weight, bias = layer.weight, layer.bias
            if over == "each_head":
                weight, bias = weight[head], None if bias is None else bias[head]
            if kind == "layer":
                part = part - part.mean(-1, keepdim=True)
            normal_part = part / (part.square().mean(-1, keepdim=True) + 0.1).sqrt()
            scaled = normal_part * (weight + 1 if unit_offset else weight)
            expected.append(scaled if bias is None else scaled + bias)
        assert len(parts) == (1 if over == "projection" else count)
        torch.testing.assert_close(got, torch.cat(expected, dim=-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(v, block.v_proj(x))
