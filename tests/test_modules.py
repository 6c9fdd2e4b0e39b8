"""`export` of modules of any kind: rotations, masks and caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modules
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from modules import (
    AXES,
    LONGEST,
    ONE,
    SelfAttention,
    Served,
    agrees,
    drawn,
    interface,
    module_of,
    with_past,
)
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from rope_export import (
    Attention,
    RotaryEmbedding,
    apply_rotary_emb,
    export,
    replay,
)
from rope_export.lowering import rules
from rope_export.runtime import Decoder

TARGETS = rules.TARGETS


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
        pytest.param(*row, id=f"{row[2]}-{row[0].__name__}-{'-'.join(row[1]) or 'plain'}")
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
    ("name", "target"), [(name, target) for name, row in OTHERS.items() for target in row[3]]
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


# --- masks and caches of other kinds ---------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_padding_is_proven_where_the_length_is_fixed(tmp_path, batch):
    module = modules.enlivened(Served())
    given = drawn(batch, 7, 32), torch.ones(batch, 7, dtype=torch.int64)
    result = export(module, tmp_path / "x", args=given, validate=True)
    assert result.report.passed, result.report.to_markdown()
    case = next(c for c in result.report.cases if c.name == "rows of different lengths")
    assert 0 < case.tokens < 7 * batch
    assert replay(result.path).passed


def of_one_token(folder: Path, target: str) -> Any:
    labels = [{0: "batch"}, {0: "batch", 1: "past+1"}, {0: "batch", 2: "past"}]
    return export(
        modules.enlivened(Served()),
        folder,
        args=with_past(1),
        dynamic_shapes=labels,
        target=target,
        validate=True,
    )


def test_a_graph_for_one_token_is_proven_after_a_past(tmp_path):
    result = of_one_token(tmp_path / "x", "ort")
    assert result.report.passed, result.report.to_markdown()
    assert {case.past for case in result.report.cases} == {0, 1, 16, LONGEST - 1}
    assert result.graph["ranges"]["past"] == [0, LONGEST - 1]


class Placed(Served):
    def forward(self, x: Tensor, attention_mask: Tensor, past: Any, position_ids: Tensor) -> Any:
        return self.attention(
            x, attention_mask=attention_mask, past=past, position_ids=position_ids
        )


def test_positions_continue_where_the_past_ends(tmp_path):
    """The example's begin at 3, after a past of 3: those of an empty past begin at 0."""
    model = modules.enlivened(Placed())
    ids_after = (torch.arange(4) + 3).expand(2, -1)
    result = export(
        model,
        tmp_path / "x",
        args=(*with_past(4), ids_after),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}, ONE],
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert LONGEST in {case.sequence for case in result.report.cases}
    decoder = Decoder.open(result.path)
    x, places = drawn(1, 5, 32, seed=3), torch.tensor([[7, 9, 4, 4, 20]])
    parts = [
        decoder.prefill(x[:, :4].numpy(), position_ids=places[:, :4].numpy()),
        decoder.decode(x[:, 4:].numpy(), position_ids=places[:, 4:].numpy()),
    ]
    mask, empty = torch.ones(1, 5, dtype=torch.int64), model.attention.empty_cache()
    truth, *_ = modules.in_double(model, x, mask, empty, places)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), truth, rtol=1e-4, atol=1e-5)


def test_token_ids_that_count_up_are_no_positions(tmp_path):
    model = modules.language_model(layers=1)
    given = modules.example(model) | {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
    result = export(model, tmp_path / "x", kwargs=given, dynamic_shapes=modules.LABELS)
    stored = onnx.TensorProto()
    for file in sorted(result.path.glob("test_data_set_*/input_0.pb")):
        stored.ParseFromString(file.read_bytes())
        assert set(numpy_helper.to_array(stored).ravel()) <= set(range(1, 9))


class AnyMask(nn.Module):
    """A mask that says who sees whom, under the name of a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
MASKS = {
    "of pairs": (CAUSAL.expand(2, 1, 7, 7), {0: "batch", 2: "sequence", 3: "sequence"}),
    "of one batch": (CAUSAL, {0: "sequence", 1: "sequence"}),
}


def exported_with_mask(name: str, folder: Path) -> Any:
    mask, labels = MASKS[name]
    shapes = {"x": ONE, "attention_mask": labels}
    module = modules.enlivened(AnyMask())

    def draw(sizes: Any, _: Any) -> dict[str, Tensor]:
        length = sizes["sequence"]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        pairs = seen.expand(sizes["batch"], 1, length, length)
        return {"attention_mask": pairs if mask.ndim == 4 else seen}

    given = drawn(2, 7, 16), mask
    return export(module, folder, args=given, dynamic_shapes=shapes, inputs=draw, validate=True)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_pairs_are_not_taken_for_padding(tmp_path, name):
    result = exported_with_mask(name, tmp_path / "x")
    assert result.report.passed, result.report.to_markdown()


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_a_padding_mask_in_attention_of_pytorch(tmp_path, target):
    module = module_of(
        lambda _, x, padding: F.scaled_dot_product_attention(
            x, x, x, attn_mask=~padding[:, None, None, :]
        )
    )
    labels = {"x": {0: "b", 2: "s"}, "padding": AXES}
    given = drawn(2, 2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    result = export(
        module, tmp_path / "x", args=given, dynamic_shapes=labels, target=target, validate=True
    )
    assert result.report.passed, result.report.to_markdown()


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_pairs_replays(tmp_path, name):
    assert replay(exported_with_mask(name, tmp_path / "x").path).passed


def test_a_cache_that_no_decoder_can_drive_replays(tmp_path):
    result = of_one_token(tmp_path / "x", "onnx")
    assert result.graph["cache"] is None
    assert replay(result.path).passed


def test_masks_of_other_dtypes_are_served(tmp_path):
    result = export(
        modules.enlivened(Served()),
        tmp_path / "x",
        args=with_past(4, dtype=torch.bool),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}],
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()


def test_a_past_of_fixed_length(tmp_path):
    result = export(
        modules.enlivened(Served()),
        tmp_path / "x",
        args=with_past(4),
        dynamic_shapes=[ONE, {0: "batch", 1: "sequence+3"}, {0: "batch"}],
        validate=True,
    )
    assert result.graph["ranges"]["sequence"] == [1, LONGEST - 3]
    assert result.report.passed, result.report.to_markdown()
