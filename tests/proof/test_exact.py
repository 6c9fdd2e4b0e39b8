"""`exactly`: any module in float64, held to plain PyTorch in double and to angles of NumPy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import Given, enlivened, example, language_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rope_export import Attention, RotaryEmbedding, dispatch
from rope_export.proof.full_precision import exactly
from rope_export.proof.reference import Semantics, attention_truth

LIMIT = 1e-12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module_of(forward: Callable[..., Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear layer and what is done with it."""
    made = enlivened(type("Given", (Given,), {"forward": forward})()).eval()
    return made.to(dtype)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def evaluated(module: nn.Module, *args: Any, **options: Any) -> list[Tensor]:
    with exactly(module, **options):
        return tensors(module(*args))


@torch.no_grad()
def in_double(module: nn.Module, *args: Any) -> list[Tensor]:
    return tensors(copy.deepcopy(module).double()(*args))


def same(got: list[Tensor], wanted: list[Tensor], limit: float = LIMIT) -> None:
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if ours.is_floating_point():
            scale = max(float(theirs.abs().max()), 1e-300)
            assert float((ours - theirs).abs().max()) <= limit * scale
        else:
            assert torch.equal(ours, theirs)


# --- any module -----------------------------------------------------------------------------

X = drawn(3, 5, 4)


def buffered(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(3, 5, 4)
    out[:, :3] = self.linear(x)[:, :3]
    out[0].add_(1)
    return out


def into(self: Any, x: Tensor) -> Tensor:
    out = torch.empty(3, 5, 4)
    torch.mul(self.linear(x), 3, out=out)
    return out


def autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x)


def turned(self: Any, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(self.linear(x).float().unflatten(-1, (2, 2)).contiguous())
    turn = torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None])
    return torch.view_as_real(pairs * turn.to(torch.complex64)).flatten(-2)


def turned_in_double(self: Any, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(self.linear(x).unflatten(-1, (2, 2)).contiguous())
    angles = torch.arange(5, dtype=torch.float64)[:, None]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def while_loop(self: Any, x: Tensor) -> Tensor:
    def step(count: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, self.linear(value)

    return torch.while_loop(lambda count, _: count < 3, step, (torch.tensor(0), x))[1]


def attend(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x).half()
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, float("-inf"))
    return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)


# What a module does, and the same without its casts.
CASTS = {
    "nothing": (lambda self, x: self.linear(x), None),
    "float()": (lambda self, x: self.linear(x).float() * 3, lambda self, x: self.linear(x) * 3),
    "half()": (lambda self, x: self.linear(x).half() + 1, lambda self, x: self.linear(x) + 1),
    "to(x.dtype)": (
        lambda self, x: self.linear(x).float().softmax(-1).to(x.dtype),
        lambda self, x: self.linear(x).softmax(-1),
    ),
    "to(weight.dtype)": (
        lambda self, x: self.linear(x).to(self.linear.weight.dtype) / 3,
        lambda self, x: self.linear(x) / 3,
    ),
    "type_as": (lambda self, x: self.linear(x).type_as(self.linear.weight) ** 2, None),
    "type": (
        lambda self, x: self.linear(x).type(torch.float16),
        lambda self, x: self.linear(x),
    ),
    "softmax(dtype)": (
        lambda self, x: F.softmax(self.linear(x), -1, dtype=torch.float32),
        lambda self, x: F.softmax(self.linear(x), -1),
    ),
    "sum(dtype)": (
        lambda self, x: self.linear(x).sum(-1, dtype=torch.float32),
        lambda self, x: self.linear(x).sum(-1),
    ),
    "in place": (
        lambda self, x: self.linear(x).mul_(2).add_(1).relu_().div_(3),
        lambda self, x: (self.linear(x) * 2 + 1).relu() / 3,
    ),
    "into a buffer": (
        buffered,
        lambda self, x: (
            F.pad(self.linear(x)[:, :3], (0, 0, 0, 2))
            + torch.tensor([1.0, 0, 0], dtype=x.dtype)[:, None, None]
        ),
    ),
    "out=": (into, lambda self, x: self.linear(x) * 3),
    "autocast": (autocast, lambda self, x: self.linear(x)),
    "complex": (turned, turned_in_double),
    "attention": (
        attend,
        lambda self, x: F.scaled_dot_product_attention(*[self.linear(x)] * 3, is_causal=True),
    ),
    "a limit of its dtype": (
        lambda self, x: self.linear(x).masked_fill(x > 0, torch.finfo(x.dtype).min).softmax(-1),
        None,
    ),
    "integers": (lambda self, x: (self.linear(x).argmax(-1), self.linear(x) > 0.5), None),
    "a loop": (while_loop, lambda self, x: self.linear(self.linear(self.linear(x)))),
    "branches": (
        lambda self, x: torch.cond(x.sum() > 0, self.linear, lambda t: t / 3, (x,)),
        lambda self, x: self.linear(x) if x.sum() > 0 else x / 3,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_casts_round_nothing(name, dtype):
    forward, plain = CASTS[name]
    module, twin = module_of(forward, dtype), module_of(plain or forward, dtype)
    for x in (X, -X):
        same(evaluated(module, x), in_double(twin, x))
    assert module.linear.weight.dtype == dtype


def test_a_truth_in_single_precision_would_not_do():
    """The limit is one that PyTorch itself misses by far."""
    module = module_of(lambda self, x: self.linear(x))
    (truth,), eager = in_double(module, X), module(X.float()).detach().double()
    assert 1e-9 < float((eager - truth).abs().max()) < 1e-5


LAYERS = {
    "LSTM": (lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), (X,)),
    "GRU": (lambda: nn.GRU(4, 6), (X,)),
    "RNN": (lambda: nn.RNN(4, 6), (X,)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 6), (X[0],)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (X, X, X)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        (X,),
    ),
    "Conv1d": (lambda: nn.Conv1d(5, 3, 2), (X,)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 3, 2), (X,)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (X,)),
    "GroupNorm": (lambda: nn.GroupNorm(1, 5), (X,)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (X,)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (X,)),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 2), (X, X)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), (torch.arange(6).view(2, 3),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_pytorch(name, dtype):
    make, args = LAYERS[name]
    module = enlivened(make()).eval().to(dtype)
    same(evaluated(module, *args), in_double(module, *args))
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_a_compiled_part_runs_as_written():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    module = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(4, 2))
    plain = nn.Sequential(inner, module[1])
    same(evaluated(module, X), in_double(plain, X))
    whole = torch.compile(plain)
    same(evaluated(whole, X), in_double(plain, X))


def test_everything_is_as_it_was_even_after_an_exception():
    def failing(self, x):
        self.recurrent(x)
        raise KeyError("stop")

    module = module_of(failing)
    module.recurrent = nn.LSTM(4, 4).half()
    model = language_model("float16")
    data = {name: p.data_ptr() for name, p in module.named_parameters()}
    with pytest.raises(KeyError, match="stop"), exactly(module):
        module(X)
    assert {p.dtype for p in module.recurrent.parameters()} == {torch.float16}
    assert module.linear.weight.dtype == torch.float32
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == data
    assert dispatch.truth() is None
    assert (torch.ones(2) / 3).dtype == torch.float32
    given = example(model)
    assert model(**given)["logits"].dtype == torch.float16
    assert torch.is_grad_enabled()
    assert model(**given)["logits"].requires_grad


def test_a_buffer_that_is_assigned_is_put_back():
    def forward(self, x):
        self.mean = x.mean((0, 1))
        return self.linear(x) - self.mean

    module = module_of(forward)
    module.register_buffer("mean", torch.zeros(4))
    mean = module.mean
    (got,) = evaluated(module, X)
    assert module.mean is mean
    same([got], in_double(module, X))


def test_weights_that_are_kept_are_read_once_and_right():
    module, kept = module_of(lambda self, x: self.linear(x).tanh()), {}
    first = evaluated(module, X, kept=kept)
    assert kept
    same(evaluated(module, X, kept=kept), first, 0.0)
    same(first, in_double(module, X))


# --- rotations ------------------------------------------------------------------------------

WIDTH = 16
SERIES = 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)


class Rotating(nn.Module):
    def __init__(self, **rope: Any) -> None:
        super().__init__()
        self.rope = RotaryEmbedding(WIDTH, **rope)

    def forward(self, q: Tensor, k: Tensor, ids: Tensor | None = None, offset: int = 0) -> Any:
        return self.rope.rotate(q, k, position_ids=ids, offset=offset)


def turned_by(x: Tensor, angles: np.ndarray, layout: str, scale: Any = 1.0) -> Tensor:
    """Rotation by angles ``[..., S, 8]`` in NumPy, pair by pair."""
    heads = x.numpy()
    result = heads.copy()
    for pair in range(WIDTH // 2):
        first, second = (pair, pair + WIDTH // 2) if layout == "half" else (2 * pair, 2 * pair + 1)
        cos, sin = np.cos(angles[..., pair]), np.sin(angles[..., pair])
        a, b = heads[..., first], heads[..., second]
        factor = scale[..., pair] if isinstance(scale, np.ndarray) else scale
        result[..., first] = (a * cos - b * sin) * factor
        result[..., second] = (a * sin + b * cos) * factor
    return torch.from_numpy(result)


Q, K = drawn(2, 3, 5, WIDTH + 4), drawn(2, 1, 5, WIDTH + 4, seed=1)
FAR = torch.tensor([[0, 1, 77, 4095, 999_999], [5, 3, 1_000_000, 123_456, 31]])


def of_positions(ids: Any, series: np.ndarray = SERIES) -> np.ndarray:
    return np.asarray(ids, dtype=np.float64)[..., None] * series


@pytest.mark.parametrize("longest", [None, 1_000_001], ids=["two tables", "one table"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_angles_are_exact_at_positions_up_to_a_million(layout, longest):
    module = Rotating(layout=layout, max_seq_len=longest)
    angles = of_positions(FAR)[:, None]
    wanted = [turned_by(x, angles, layout) for x in (Q, K)]
    same(evaluated(module, Q, K, FAR), wanted)
    # Which eager PyTorch, whose tables are float32, is not.
    eager = float((module(Q.float(), K.float(), FAR)[0].double() - wanted[0]).abs().max())
    assert 1e-9 < eager < 2e-6
    angles = of_positions(np.arange(5) + 999_990)
    wanted = [turned_by(x, angles, layout) for x in (Q, K)]
    same(evaluated(module, Q, K, None, 999_990), wanted)


def test_a_mirrored_rotation_turns_the_other_way():
    module = Rotating(layout="half")
    wanted = [turned_by(x, -of_positions(FAR)[:, None], "half") for x in (Q, K)]
    same(evaluated(module, Q, K, FAR, mirrored="angles"), wanted)


def test_learned_frequencies():
    module = Rotating(learned_freq=True)
    module.rope.freqs.data *= torch.linspace(0.9, 1.1, WIDTH // 2)
    series = module.rope.freqs.detach().double().numpy()
    wanted = [turned_by(x, of_positions(FAR, series)[:, None], "interleaved") for x in (Q, K)]
    same(evaluated(module, Q, K, FAR), wanted)


@pytest.mark.parametrize("longest", [None, 128])
def test_xpos(longest):
    module = Rotating(use_xpos=True, xpos_scale_base=64, max_seq_len=longest)
    ids = torch.tensor([[0, 1, 77, 95, 99], [5, 3, 10, 12, 31]])
    angles = of_positions(ids)[:, None]
    base = (np.arange(0, WIDTH, 2) / WIDTH + 0.4) / 1.4
    origin = 0 if longest is None else longest // 2  # scores are the same from any
    scale = base ** ((ids.numpy()[:, None, :, None] - origin) / 64)
    wanted = [turned_by(Q, angles, "interleaved", scale)]
    wanted += [turned_by(K, angles, "interleaved", 1 / scale)]
    same(evaluated(module, Q, K, ids), wanted)


@pytest.mark.parametrize("length", [5, 16, 17, 40])
def test_frequencies_that_follow_the_length(length):
    q, k = drawn(1, 2, length, WIDTH), drawn(1, 2, length, WIDTH, seed=1)
    places = np.arange(length)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    growth = 1.0 if length <= 16 else 2 * length / 16 - 1
    base = 10000.0 * growth ** (WIDTH / (WIDTH - 2))
    angles = of_positions(places, base ** (-np.arange(0, WIDTH, 2) / WIDTH))
    wanted = [turned_by(x, angles, "half") for x in (q, k)]
    same(evaluated(Rotating(layout="half", scaling=dynamic, max_seq_len=64), q, k), wanted)
    factors = np.linspace(1.0, 8.0, WIDTH // 2)
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * (WIDTH // 2),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    angles = of_positions(places, SERIES / (factors if length > 16 else 1.0))
    factor = math.sqrt(1 + math.log(4) / math.log(16))
    wanted = [turned_by(x, angles, "half", factor) for x in (q, k)]
    same(evaluated(Rotating(layout="half", scaling=longrope, max_seq_len=64), q, k), wanted)


@pytest.mark.parametrize(
    ("scaling", "axis_of_pair", "series"),
    [
        (
            {"rope_type": "default", "mrope_section": [2, 3, 3]},
            [0, 0, 1, 1, 1, 2, 2, 2],
            SERIES,
        ),
        (
            {"rope_type": "axial"},
            [0, 0, 0, 0, 1, 1, 1, 1],
            np.tile(10000.0 ** (-np.arange(4) / 4), 2),
        ),
    ],
    ids=["mrope", "axial"],
)
def test_several_axes_of_positions(scaling, axis_of_pair, series):
    module = Rotating(layout="half", scaling=scaling, max_seq_len=100)
    axes = max(axis_of_pair) + 1
    ids = torch.randint(0, 100, (axes, 2, 5), generator=torch.Generator().manual_seed(0))
    angles = ids.numpy()[axis_of_pair].transpose(1, 2, 0)[:, None] * series
    same(evaluated(module, Q, K, ids), [turned_by(x, angles, "half") for x in (Q, K)])


# --- attention ------------------------------------------------------------------------------

VARIANTS = {
    "grouped": {},
    "window": {"window": 3},
    "capped, with sinks": {"softcap": 5.0, "sinks": True},
    "normalised, with biases": {"qk_norm": True, "qkv_bias": True, "out_bias": True},
    "both ways": {"causal": False},
    "without positions": {"rope": None},
    "wider values": {"value_head_dim": 12, "scale": 0.3},
}


class Normed(nn.Module):
    """Attention of ours after a norm of PyTorch's."""

    def __init__(self, **variant: Any) -> None:
        super().__init__()
        rope = RotaryEmbedding(8, layout="half")
        self.norm = nn.LayerNorm(32)
        self.attention = Attention(32, 4, num_kv_heads=2, **{"rope": rope, **variant})

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_inside_is_the_reference(name, dtype):
    module = enlivened(Normed(**VARIANTS[name])).to(dtype)
    x = drawn(2, 9, 32)
    (normed,) = in_double(module.norm, x)
    (got,) = evaluated(module, x)
    same([got], [attention_truth(module.attention, normed)])
    # And that is what the module itself computes, up to its own rounding.
    eager = module(x.to(dtype)).detach().double()
    error = float((eager - got).norm() / got.norm())
    assert 0 < error < {torch.float32: 1e-5, torch.float16: 2e-2}[dtype]


def test_attention_by_hand():
    """Scores, softmax and mix in NumPy, one head and one token at a time."""
    module = enlivened(Normed(rope=None, window=3))
    attention, x = module.attention, drawn(1, 6, 32)
    (normed,) = in_double(module.norm, x)
    q, k, v = (
        (normed[0] @ layer.weight.detach().double().T).unflatten(-1, (-1, 8)).numpy()
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    context = np.zeros((6, 4, 8))
    for token in range(6):
        for head in range(4):
            seen = slice(max(0, token - 2), token + 1)
            scores = k[seen, head // 2] @ q[token, head] * 8**-0.5
            weights = np.exp(scores - scores.max())
            context[token, head] = weights @ v[seen, head // 2] / weights.sum()
    wanted = context.reshape(6, 32) @ attention.o_proj.weight.detach().double().numpy().T
    same(evaluated(module, x), [torch.from_numpy(wanted)[None]])


def test_a_model_in_several_calls_is_one_full_pass():
    """Rows of different lengths, padding in between, a cache: float64 leaves no other error."""
    model = language_model()
    ids = example(model, batch=2, length=7)["input_ids"]

    def given(columns: list[list[int]], mask: list[list[int]], past: Any) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor(columns),
            "attention_mask": torch.tensor(mask),
            "past_key_values": past,
        }

    empty = [
        tuple(t.double().expand(2, -1, -1, -1) for t in layer.attention.empty_cache())
        for layer in model.layers
    ]
    with exactly(model):
        whole = model(ids, torch.ones_like(ids), empty)["logits"]
        first, second = ids.tolist()
        now = given([first[:4], [*second[:2], 0, 0]], [[1] * 4, [1, 1, 0, 0]], empty)
        start = model(**now)
        mask = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1]]
        rest = model(**given([first[4:], second[2:5]], mask, start["present_key_values"]))
    assert whole.dtype == torch.float64
    same([start["logits"][0], rest["logits"][0]], [whole[0, :4], whole[0, 4:]], 1e-11)
    same([start["logits"][1, :2], rest["logits"][1]], [whole[1, :2], whole[1, 2:5]], 1e-11)


def test_defects_are_what_they_are_called():
    model = language_model()
    given = example(model, length=6, past=0)
    given["past_key_values"] = [
        tuple(t.double() for t in pair) for pair in given["past_key_values"]
    ]

    def logits(alter: Callable[[Semantics], Semantics] | None = None) -> Tensor:
        with exactly(model, alter):
            return model(**given)["logits"]

    right = logits()
    same([logits(lambda meaning: meaning)], [right], 0.0)
    both_ways = copy.deepcopy(model)
    for layer in both_ways.layers:
        layer.attention.causal = False

    def uncausal(meaning: Semantics) -> Semantics:
        return replace(meaning, causal=False)

    with exactly(both_ways):
        wanted = both_ways(**given)["logits"]
    same([logits(uncausal)], [wanted], 0.0)
    assert float((wanted - right).norm() / right.norm()) > 0.1
