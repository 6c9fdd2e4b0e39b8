"""FlexAttention of a user's own, in a graph: against softmax written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from modules import drawn
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rope_export import export

HEADS, WIDTH, LONGEST = 4, 8, 64
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
AXES = {0: "batch", 2: "sequence"}


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    del b, h
    return q >= k


def window(b: Any, h: Any, q: Any, k: Any) -> Any:
    del b, h
    return (q >= k) & (q - k < 4)


def alibi(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    del b
    return score - SLOPES[h] * abs(q - k)


def capped(score: Any, *_: Any) -> Any:
    return 3 * torch.tanh(score / 3)


def hidden(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    del b, h
    return torch.where(q - k >= 1, score, -float("inf"))  # the first token sees nothing


class Flexible(nn.Module):
    def __init__(self, score_mod: Any = None, mask_mod: Any = None, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.score_mod, self.mask_mod = score_mod, mask_mod
        self.grouped = kv_heads < HEADS

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block_mask = None
        if self.mask_mod is not None:
            length = q.shape[2]
            block_mask = create_block_mask(self.mask_mod, None, None, length, length, device="cpu")
        return flex_attention(
            q, k, v, score_mod=self.score_mod, block_mask=block_mask, enable_gqa=self.grouped
        )


def written_out(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, change: Callable[..., np.ndarray]
) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (x.repeat(HEADS // x.shape[1], 1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) / WIDTH**0.5
    head = np.arange(HEADS).reshape(-1, 1, 1)
    ahead = np.arange(q.shape[2])[:, None] - np.arange(k.shape[2])
    scores = np.broadcast_to(change(scores, head, ahead), scores.shape)
    top = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) @ v


CASES: dict[str, tuple[Flexible, int, Callable[..., np.ndarray]]] = {
    "nothing": (Flexible(), HEADS, lambda s, *_: s),
    "causal": (Flexible(None, causal), HEADS, lambda s, _, a: np.where(a >= 0, s, -np.inf)),
    "a window, grouped": (
        Flexible(None, window, 2),
        2,
        lambda s, _, a: np.where((a >= 0) & (a < 4), s, -np.inf),
    ),
    "slopes and a mask": (
        Flexible(alibi, causal),
        HEADS,
        lambda s, h, a: np.where(a >= 0, s - SLOPES.numpy()[h] * abs(a), -np.inf),
    ),
    "a soft cap, grouped": (Flexible(capped, None, 1), 1, lambda s, *_: 3 * np.tanh(s / 3)),
    "a row that sees nothing": (
        Flexible(hidden),
        HEADS,
        lambda s, _, a: np.where(a >= 1, s, -np.inf),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_flex_attention_is_exported_and_proven(tmp_path, name):
    module, kv_heads, change = CASES[name]
    shapes = [(2, HEADS, 6, WIDTH)] + [(2, kv_heads, 6, WIDTH)] * 2
    example = dict(
        zip("qkv", (drawn(*shape, seed=s) for s, shape in enumerate(shapes)), strict=True)
    )
    result = export(
        module,
        tmp_path / "x",
        kwargs=example,
        dynamic_shapes=dict.fromkeys("qkv", AXES),
        max_seq_len=LONGEST,
        validate=True,
    )
    assert result.report.passed
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 13), (1, LONGEST)):
        given = {
            n: drawn(batch, t.shape[1], length, WIDTH, seed=ord(n)).numpy()
            for n, t in example.items()
        }
        (output,) = session.run(None, given)
        np.testing.assert_allclose(output, written_out(*given.values(), change), atol=2e-6)
