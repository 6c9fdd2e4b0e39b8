"""Attention without causal order: right in every row whatever its padding, and proven to be."""

from __future__ import annotations

import shutil

import bidirectional_mutants as wrong
import mutants
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from combinations import CLOSE, kinds
from selection import slow_unless

from rope_export import Attention, RotaryEmbedding, export, validate
from rope_export.artifacts.targets import TARGETS
from rope_export.attention.random_block import random_block

HIDDEN, HEAD_DIM, LONGEST = 32, 16, 1300


def exact(block: Attention, tokens: np.ndarray) -> np.ndarray:
    """One row without padding, ``[S, hidden]``, written out in float64."""
    weight = {name: p.detach().double().numpy() for name, p in block.named_parameters()}
    length, groups = len(tokens), block.num_heads // block.num_kv_heads
    x = tokens.astype(np.float64)
    q, k, v = (
        (x @ weight[f"{name}_proj.weight"].T).reshape(length, -1, HEAD_DIM).transpose(1, 0, 2)
        for name in "qkv"
    )
    half = HEAD_DIM // 2
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    q, k = (
        np.concatenate(
            (y[..., :half] * cos - y[..., half:] * sin, y[..., half:] * cos + y[..., :half] * sin),
            axis=-1,
        )
        for y in (q, k)
    )
    k, v = (y.repeat(groups, axis=0) for y in (k, v))
    scores = q @ k.transpose(0, 2, 1) * HEAD_DIM**-0.5
    if block.softcap is not None:
        scores = block.softcap * np.tanh(scores / block.softcap)
    if block.window is not None:
        place = np.arange(length)
        scores[:, np.abs(place[:, None] - place) > block.window] = -np.inf
    if block.sinks is not None:
        sinks = np.broadcast_to(weight["sinks"][:, None, None], (block.num_heads, length, 1))
        scores = np.concatenate((scores, sinks), axis=-1)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share = (scores / scores.sum(axis=-1, keepdims=True))[..., :length]
    mixed = (share @ v).transpose(1, 0, 2).reshape(length, -1)
    return mixed @ weight["o_proj.weight"].T


# Shapes, how it is exported, and what is around the operator then.
VARIANTS = {
    "rows": ({"num_kv_heads": 2}, {"attention_mask": True}, "MultiHeadAttention"),
    "rows, left": ({}, {"attention_mask": True, "padding": "left"}, "MultiHeadAttention"),
    "window": ({"window": 7, "num_kv_heads": 2}, {"attention_mask": True}, "GroupQueryAttention"),
    "wide window": (
        {"window": 301, "sinks": True},
        {"attention_mask": True},
        "GroupQueryAttention",
    ),
    "window without padding": ({"window": 130}, {}, "GroupQueryAttention"),
    "sinks": ({"sinks": True, "num_kv_heads": 1}, {"attention_mask": True}, "GroupQueryAttention"),
    "soft cap": (
        {"softcap": 3.0},
        {"attention_mask": True, "padding": "left"},
        "GroupQueryAttention",
    ),
    "sinks without padding": ({"sinks": True, "softcap": 9.0}, {}, "GroupQueryAttention"),
}
QUICK = ("rows", "window", "wide window", "sinks")
DTYPES = ("float32", "float16")
# Around a block of queries, several of them, and where blocks begin.
LENGTHS = (1, 2, 127, 256, 257, 512, 513, 514, 640, 769, 1204, 1205)


def drawn_block(shape: dict[str, object], dtype: str) -> Attention:
    heads = {"num_heads": 4, "head_dim": HEAD_DIM, "hidden_size": HIDDEN}
    return random_block(**heads, causal=False, max_seq_len=LONGEST, dtype=dtype, **shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A block of `VARIANTS` and a session of its graph."""
    known = {}

    def get(name, dtype="float32"):
        if (name, dtype) not in known:
            shape, options, operator = VARIANTS[name]
            block = drawn_block(shape, dtype)
            folder = tmp_path_factory.mktemp("bidirectional") / "block"
            model = export(block, folder, target="ort", validate=False, **options).model
            assert {"Scan", f"com.microsoft::{operator}"} <= kinds(model)
            assert "Attention" not in kinds(model)
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            known[name, dtype] = block, session
        return known[name, dtype]

    return get


def answers(session, hidden, mask=None):
    feed = {"hidden_states": hidden}
    if mask is not None:
        feed["attention_mask"] = mask
    return session.run(None, feed)[0]


def assert_right(block, got, tokens, dtype):
    truth = exact(block, tokens)
    assert np.isfinite(got).all()
    worst = np.abs(got.astype(np.float64) - truth).max()
    assert worst <= CLOSE[dtype] * np.abs(truth).max(), worst


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_unless(
        lambda name, dtype: (name in QUICK and dtype == "float32") or name == "window",
        [(name, dtype) for name in VARIANTS for dtype in DTYPES],
    ),
)
def test_every_length_is_right_around_the_edges_of_blocks(made, name, dtype):
    block, session = made(name, dtype)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        hidden = rng.standard_normal((1, length, HIDDEN)).astype(dtype)
        mask = (
            np.ones((1, length), dtype=np.int64) if "attention_mask" in VARIANTS[name][1] else None
        )
        assert_right(block, answers(session, hidden, mask)[0], hidden[0], dtype)


def masks(width: int) -> dict[str, np.ndarray]:
    """Four rows of ``width`` columns: full, cut, of one token, and without any."""
    lengths = np.array([width, width // 2 + 1, 1, 0])
    column = np.arange(width)
    right = (column < lengths[:, None]).astype(np.int64)
    rng = np.random.default_rng(1)
    holes = np.stack([rng.permutation(row) for row in right])
    return {"right": right, "left": right[:, ::-1].copy(), "holes": holes}


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name in QUICK, [name for name, (_, options, _) in VARIANTS.items() if options]
    ),
)
def test_rows_are_right_wherever_their_padding_is(made, name):
    """Junk under the padding, rows of one token, rows of none: real tokens are never touched."""
    block, session = made(name)
    rng = np.random.default_rng(2)
    for width in (3, 300, 700):
        for mask in masks(width).values():
            hidden = rng.standard_normal((4, width, HIDDEN)).astype(np.float32)
            hidden[mask == 0] *= 50
            got = answers(session, hidden, mask)
            for row in range(3):
                real = mask[row] == 1
                assert_right(block, got[row, real], hidden[row, real], "float32")
            # What a row holds is nobody else's business.
            alone = answers(session, hidden[1:2], mask[1:2])
            assert np.abs(alone[0] - got[1])[mask[1] == 1].max() < 1e-5


def test_two_layers_with_a_row_of_padding_alone(tmp_path):
    """What the first makes of padding is what the second is given: no NaN may come of it."""

    class Encoder(torch.nn.Module):
        def __init__(self, window):
            super().__init__()
            torch.manual_seed(0)
            rope = RotaryEmbedding(HEAD_DIM, layout="half", max_seq_len=LONGEST)
            self.layers = torch.nn.ModuleList(
                Attention(HIDDEN, 2, causal=False, rope=rope, window=w) for w in (None, window)
            )

        def forward(self, x, attention_mask):
            for layer in self.layers:
                x = x + layer(x, attention_mask=attention_mask)
            return x

    model = Encoder(5).eval()
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 40:] = 0
    example = {"x": torch.randn(2, 64, HIDDEN), "attention_mask": mask}
    result = export(
        model,
        tmp_path / "encoder",
        kwargs=example,
        dynamic_shapes={name: {0: "batch", 1: "length"} for name in example},
        max_seq_len=600,
        target="ort",
        validate=True,
    )
    assert result.report.passed
    found = kinds(result.model)
    assert {"Scan", "com.microsoft::MultiHeadAttention"} <= found
    assert "com.microsoft::GroupQueryAttention" in found
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    for width in (9, 530):
        for mask in masks(width).values():
            x = rng.standard_normal((4, width, HIDDEN)).astype(np.float32)
            got = session.run(None, {"x": x, "attention_mask": mask})[0]
            for row in range(3):
                real = mask[row] == 1
                own = x[row, real]
                for layer in model.layers:
                    own = own + exact(layer, own)
                assert np.abs(got[row, real] - own).max() < 1e-4


# What is wrong is found

PROVEN = {
    "plain": ({}, {}),
    "padded": ({}, {"attention_mask": True}),
    "window": ({"window": wrong.WINDOW, "max_seq_len": 530}, {"attention_mask": True}),
    "sinks": ({"sinks": True, "max_seq_len": 300}, {"attention_mask": True}),
}


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    known = {}

    def get(target, name):
        if (target, name) not in known:
            shape, options = PROVEN[name]
            block = mutants.block(causal=False, **shape)
            folder = tmp_path_factory.mktemp("proven") / "block"
            result = export(block, folder, target=target, validate=True, **options)
            assert result.report.passed
            known[target, name] = block, result
        return known[target, name]

    return get


@pytest.mark.parametrize(
    ("target", "name", "mutate"),
    slow_unless(
        lambda target, name, _: target == "ort" and name != "plain",
        [
            (target, name, mutate)
            for target in TARGETS
            for name, mutate in (
                ("plain", wrong.causal_order_added),
                ("padded", wrong.causal_order_added),
                ("window", wrong.window_one_wider),
                ("window", wrong.window_one_narrower),
            )
        ],
    ),
)
def test_the_graph_fails_against_another_block(proven, target, name, mutate):
    block, result = proven(target, name)
    assert not validate(result, mutants.mutated(block, mutate)).passed


@pytest.mark.parametrize("target", slow_unless(lambda target: target == "ort", TARGETS))
def test_the_graph_of_a_causal_block_fails_against_one_that_is_not(target, tmp_path):
    result = export(mutants.block(), tmp_path / "causal", target=target, validate=False)
    assert not validate(result, mutants.block(causal=False)).passed


MUTATED = [
    *(
        (target, name, mutate)
        for target in TARGETS
        for name in ("padded", "window")
        for mutate in (wrong.rows_one_longer, wrong.rows_one_shorter)
    ),
    ("ort", "padded", wrong.cut_one_later),
    ("ort", "padded", wrong.cut_one_earlier),
    ("ort", "sinks", wrong.calls_made_causal),
    ("ort", "sinks", wrong.rows_one_longer),
    ("ort", "window", wrong.calls_made_causal),
    ("ort", "window", wrong.left_edge_lost),
    ("ort", "window", wrong.right_edge_lost),
    ("ort", "window", wrong.band_one_to_the_left),
    ("ort", "window", wrong.band_one_to_the_right),
]


@pytest.mark.parametrize(
    ("target", "name", "mutate"), slow_unless(lambda target, *_: target == "ort", MUTATED)
)
def test_a_wrong_graph_fails(proven, target, name, mutate, tmp_path):
    block, result = proven(target, name)
    folder = shutil.copytree(result.path, tmp_path / "copy")
    model = onnx.load(folder / "model.onnx")
    mutate(model)
    onnx.save(model, folder / "model.onnx")
    report = validate(folder, block)
    assert not report.passed
    # By numbers, not because it no longer runs.
    assert all(case.reason is None for case in report.cases)
