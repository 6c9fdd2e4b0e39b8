"""Modules of any kind are exported and proven, rotations in them as operators."""

from __future__ import annotations

from typing import Any

import modules
import pytest
import torch
import torch.nn.functional as F
from modules import (
    ONE,
    SelfAttention,
    agrees,
    drawn,
    interface,
    module_of,
)
from selection import slow_unless
from torch import Tensor, nn
from torch.export import Dim

from rope_export import Attention, RotaryEmbedding, apply_rotary_emb, export, replay
from rope_export.artifacts.targets import TARGETS

TARGETS = TARGETS


def ids(*shape: int, high: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def heads(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    return rope.rotate(q, k)


def each(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    return rope.rotate_queries_or_keys(q, offset=5), rope.rotate_queries_or_keys(k, offset=3)


def together(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    return rope.rotate_queries_and_keys(q, k)


def given_places(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    places = torch.arange(q.shape[2]) * 2 + 1
    return rope.rotate(q, k, position_ids=places[None].expand(q.shape[0], -1))


def by_angles(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    angles = rope(torch.arange(q.shape[2]))
    return apply_rotary_emb(angles, q), apply_rotary_emb(angles, k)


# Which rotation, with which RoPE, in which targets; whether it is one RotaryEmbedding each.
ROTATIONS = [
    (heads, {"max_seq_len": 40, "layout": "half"}, "onnx", True),
    (heads, {"max_seq_len": 40, "layout": "half"}, "primitive", False),
    (heads, {"learned_freq": True}, "ort", True),
    (each, {"max_seq_len": 48}, "ort", True),
    (together, {"use_xpos": True, "max_seq_len": 40}, "ort", True),
    (given_places, {"max_seq_len": 80, "layout": "half"}, "ort", True),
    (by_angles, {}, "ort", False),
]


@pytest.mark.parametrize(
    ("rotate", "rope", "target", "as_operators"),
    [
        pytest.param(
            *row,
            id=f"{row[2]}-{row[0].__name__}-{'-'.join(row[1]) or 'plain'}",
            marks=() if row[0] is heads and row[2] != "primitive" else pytest.mark.slow,
        )
        for row in ROTATIONS
    ],
)
def test_rotations_in_attention_of_pytorch(tmp_path, rotate, rope, target, as_operators):
    causal = rotate is not each  # an encoder, for once
    module = modules.enlivened(SelfAttention(rotate, causal=causal, **rope))
    labels = {"x": {0: "batch", 1: Dim("sequence", max=36)}}
    result = export(
        module,
        tmp_path / "x",
        args=(drawn(2, 6, 32),),
        dynamic_shapes=labels,
        target=target,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert (result.ops.get("RotaryEmbedding") == 2) == as_operators
    assert max(case.sequence for case in result.report.cases) == 36
    for batch, length in ((1, 1), (3, 33)):
        agrees(result, module, drawn(batch, length, 32, seed=length), limit=1e-5)
    if rotate is not by_angles:
        assert result.report.sensitivity["sine negated"] > 1e-2


class Mixed(nn.Module):
    """Embedding, convolution, both norms, an einsum, and a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.batch_norm, self.layer_norm = nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.batch_norm.running_mean.copy_(torch.linspace(-1, 1, 8))
        self.batch_norm.running_var.copy_(torch.linspace(0.5, 2, 8))
        self.weight = nn.Parameter(torch.empty(8, 2, 4))
        self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        x = F.gelu(self.batch_norm(self.convolution(x))).transpose(1, 2) + self.table
        return torch.einsum("bsd,dhk->bhsk", self.layer_norm(x), self.weight)


class Vision(nn.Module):
    """Patches with a class token, whose number is fixed by the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        rope = RotaryEmbedding(8, layout="half", max_seq_len=17)
        self.attention = Attention(32, 4, causal=False, rope=rope)
        self.token = nn.Parameter(torch.empty(1, 1, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.head(x + self.attention(x))[:, 0]


class Cross(nn.Module):
    """Queries of one sequence, keys of another, each with positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rope = RotaryEmbedding(8)
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2)
            for t in (self.q(x), *self.kv(memory).chunk(2, -1))
        )
        q, k = self.rope.rotate_queries_or_keys(q), self.rope.rotate_queries_or_keys(k, offset=2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Branching(modules.Given):
    """Control flow that a graph can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: self.linear(t) * 2, lambda t: t - 1, (x,))


ATTENDING = {"query": ONE, "key": {0: "batch", 1: "keys"}, "value": {0: "batch", 1: "keys"}}
OTHERS = {
    "mixed": (Mixed, lambda b, s: (ids(b, s, seed=s),), {"ids": ONE}, ["onnx", "primitive"]),
    "vision, nothing dynamic": (Vision, lambda *_: (drawn(1, 3, 16, 16),), None, TARGETS),
    "cross attention": (
        Cross,
        lambda b, s: (drawn(b, s, 16), drawn(b, s + 2, 16, seed=1)),
        {"x": ONE, "memory": {0: "batch", 1: "keys"}},
        ["ort"],
    ),
    "attention of PyTorch": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda b, s: (drawn(b, s, 16), *[drawn(b, s + 2, 16, seed=1)] * 2),
        ATTENDING,
        ["ort"],
    ),
    "encoder layer, in training": (
        lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True).train(),
        lambda b, s: (drawn(b, s, 16),),
        {"src": ONE},
        ["ort"],
    ),
    "branches": (Branching, lambda b, _: (drawn(b, 3, 4, seed=b),), {"x": {0: "batch"}}, ["ort"]),
}


@pytest.mark.parametrize(
    ("name", "target"),
    slow_unless(
        lambda name, target: target == OTHERS[name][3][0] and name != "attention of PyTorch",
        [(name, target) for name, row in OTHERS.items() for target in row[3]],
    ),
)
def test_modules_of_any_kind(tmp_path, name, target):
    make, draw, labels, _ = OTHERS[name]
    module = modules.enlivened(make())
    result = export(
        module,
        tmp_path / "x",
        args=draw(2, 5),
        dynamic_shapes=labels,
        target=target,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert replay(result.path).passed
    for batch, length in ((1, 1), (3, 8)):
        agrees(result, module, *draw(batch, length), limit=1e-5)


@pytest.mark.slow
def test_a_model_of_transformers_with_padding(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=12,
        max_position_embeddings=40,
    )
    model = BertModel(config).eval()
    given = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    result = export(
        model,
        tmp_path / "bert",
        kwargs=given,
        dynamic_shapes=dict.fromkeys(given, ONE),
        max_seq_len=40,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert "rows of different lengths" in {case.name for case in result.report.cases}
    _, outputs = interface(result)
    assert outputs == {
        "last_hidden_state": ["batch", "sequence", 32],
        "pooler_output": ["batch", 32],
    }
    agrees(result, model, ids(3, 9, seed=2), torch.ones(3, 9, dtype=torch.int64), limit=1e-5)


def test_half_precision_inside_a_float32_model(tmp_path):
    module = module_of(lambda self, x: self.half(self.linear(x).half()).float())
    module.half_layer = nn.Linear(4, 4).half()
    type(module).half = lambda self, x: self.half_layer(x)
    result = export(
        module, tmp_path / "x", args=(drawn(3, 4),), dynamic_shapes=[{0: "batch"}], validate=True
    )
    assert result.report.passed
    assert result.graph["dtype"] == "float16"
