"""`Attention(window_cache=True)`: past and present hold the window, and answers stay the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from window_layout import resident

from rope_export import Attention, BadInputError, RotaryEmbedding

HIDDEN, HEADS, KV_HEADS, WIDTH, WINDOW, LENGTH = 24, 4, 2, 6, 3, 40


def made(**changes: object) -> Attention:
    torch.manual_seed(0)
    shape = {"num_kv_heads": KV_HEADS, "head_dim": WIDTH, "window": WINDOW, "window_cache": True}
    rope = RotaryEmbedding(WIDTH, layout="half")
    block = Attention(HIDDEN, HEADS, **{"rope": rope, **shape, **changes}).double().eval()
    if block.sinks is not None:
        torch.nn.init.normal_(block.sinks)
    return block


def heads_by_hand(block: Attention, x: np.ndarray) -> list[np.ndarray]:
    """Queries, keys and values ``[B, heads, T, width]`` in float64; pairs are (i, i + width/2)."""
    out = []
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    cos, sin = np.cos(angles), np.sin(angles)
    for layer, rotated in ((block.q_proj, True), (block.k_proj, True), (block.v_proj, False)):
        y = x @ layer.weight.detach().numpy().T
        y = y.reshape(*x.shape[:2], -1, WIDTH).transpose(0, 2, 1, 3)
        if rotated:
            a, b = y[..., : WIDTH // 2], y[..., WIDTH // 2 :]
            y = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        out.append(y)
    return out


def full_pass_by_hand(block: Attention, x: np.ndarray) -> np.ndarray:
    q, k, v = heads_by_hand(block, x)
    k, v = (t.repeat(HEADS // KV_HEADS, axis=1) for t in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * block.scale
    if block.softcap is not None:
        scores = block.softcap * np.tanh(scores / block.softcap)
    place = np.arange(x.shape[1])
    far = place[:, None] - place
    scores[..., (far < 0) | (far >= WINDOW)] = -np.inf
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    if block.sinks is not None:
        total = total + np.exp(block.sinks.detach().numpy())[:, None, None]
    mixed = (weights / total @ v).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return mixed @ block.o_proj.weight.detach().numpy().T


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("capacity", [WINDOW, WINDOW + 1, 8])
@pytest.mark.parametrize("variant", [{}, {"sinks": True, "softcap": 2.0}], ids=["plain", "capped"])
def test_any_calls_are_the_full_pass_and_leave_the_documented_layout(variant, capacity, side):
    block = made(**variant)
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    wanted = full_pass_by_hand(block, x.numpy())
    _, keys, values = heads_by_hand(block, x.numpy())
    # Cosines and sines are float32, explicit scores too.
    close = {"rtol": 0, "atol": 1e-5 if variant else 1e-6}
    past = tuple(torch.full_like(t, torch.nan) for t in block.empty_cache(2, capacity=capacity))
    mask = torch.zeros(2, 0, dtype=torch.int64)
    totals = [0, 0]
    for step in [(2, 1), (1, 1), (9, 4), (1, 1), (0, 7), (1, 0), (3, 3), *[(1, 1)] * 9, (5, 11)]:
        length = max(step)
        tokens = torch.full((2, length, HIDDEN), 9.0, dtype=torch.float64)
        real = torch.zeros(2, length, dtype=torch.int64)
        columns = []
        for row, count in enumerate(step):
            first = length - count if side == "left" else 0
            columns.append(slice(first, first + count))
            tokens[row, columns[row]] = x[row, totals[row] : totals[row] + count]
            real[row, columns[row]] = 1
        mask = torch.cat((mask, real), dim=1)
        with torch.no_grad():
            y, past = block(tokens, past=past, attention_mask=mask)
        for row, count in enumerate(step):
            part = slice(totals[row], totals[row] + count)
            np.testing.assert_allclose(y[row, columns[row]].numpy(), wanted[row, part], **close)
            totals[row] += count
            kept = resident(totals[row], capacity, WINDOW)
            held = slice(totals[row] - kept, totals[row])
            for got, truth in zip(past, (keys, values), strict=True):
                assert got.shape[2] == capacity
                np.testing.assert_allclose(
                    got[row, :, :kept].numpy(), truth[row, :, held], rtol=0, atol=1e-6
                )
    assert max(totals) > 10 * WINDOW


def test_training_is_untouched():
    block, plain = made(), made(window_cache=False)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.tensor([[1] * 9, [1] * 6 + [0] * 3])):
        got, wanted = (b(x, attention_mask=mask) for b in (block, plain))
        assert torch.equal(got, wanted)
        assert torch.equal(
            torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(wanted.sum(), x)[0]
        )


def test_it_compiles_to_one_graph():
    block = made()
    x = torch.randn(1, 4, HIDDEN, dtype=torch.float64)
    mask = torch.ones(1, 9, dtype=torch.int64)
    past = tuple(torch.randn_like(t) for t in block.empty_cache(1, capacity=6))
    with torch.no_grad():
        wanted = block(x, past=past, attention_mask=mask)
        got = torch.compile(block, fullgraph=True, backend="eager")(
            x, past=past, attention_mask=mask
        )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": None}, "needs attention with a window, got window=None"),
        ({"causal": False}, "needs causal attention, got causal=False"),
    ],
)
def test_what_cannot_keep_a_window(changes, says):
    with pytest.raises(BadInputError, match=says):
        made(**changes)


def test_calls_that_are_refused():
    block = made()
    x, mask = torch.zeros(2, 3, HIDDEN).double(), torch.ones(2, 8, dtype=torch.int64)
    past = block.empty_cache(2)
    assert past[0].shape == (2, KV_HEADS, WINDOW, WIDTH)
    with pytest.raises(BadInputError, match="attention_mask must say how many tokens there were"):
        block(x, past=past)
    short = tuple(t[:, :, 1:] for t in past)
    with pytest.raises(BadInputError, match=r"slots of past must be at least .* 3 tokens, got 2"):
        block(x, past=short, attention_mask=mask)
    with pytest.raises(BadInputError, match=r"attention_mask must be \(2, 3 or more\) of bool"):
        block(x, past=past, attention_mask=mask[:, :2])
    with pytest.raises(BadInputError, match=r"capacity must be at least the window of 3 .* got 2"):
        block.empty_cache(2, capacity=2)
    with pytest.raises(BadInputError, match="capacity is of a cache of the window"):
        made(window_cache=False).empty_cache(2, capacity=5)
