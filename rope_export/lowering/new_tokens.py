"""What a mask says of the new tokens of a call, in operators that keep lengths dynamic."""

from __future__ import annotations

import torch
from torch import Tensor

from rope_export.attention.tokens import Tokens
from rope_export.attention.visibility import token_order, visible_keys
from rope_export.attention.window_cache import WindowCall
from rope_export.lowering import ops

MOST = 2**24


def last(tokens: Tokens, columns: Tensor) -> Tensor:
    """Columns of the new tokens: ``[B, T]`` to ``[B, S]``."""
    return ops.last_columns(columns, tokens.hidden_states.shape[1])


def count(mask: Tensor) -> Tensor:
    """Ones in each row of ``[B, T]``, int64 ``[B, 1]``.

    Summed in float32, which is exact up to `MOST` tokens: a mask is as wide as the sequence, and of
    integers onnxruntime's sum takes five times as long.
    """
    return mask.float().sum(-1, keepdim=True).to(torch.int64)


def places(tokens: Tokens) -> Tensor:
    """Places of the new tokens in their rows, as `token_order` has them, int64 ``[B, S]``.

    Earlier tokens are counted once for each row: a running sum over all of them would take longer
    than the rest of a decoding step.
    """
    assert tokens.attention_mask is not None
    if tokens.past is None:
        return token_order(tokens.attention_mask)
    new = last(tokens, tokens.attention_mask.to(torch.int64))
    earlier = count(tokens.attention_mask) - new.sum(-1, keepdim=True)
    return (earlier + new.cumsum(-1) - 1).clamp(min=0)


def window_call(tokens: Tokens, window: int) -> WindowCall:
    """What the call does with a cache of the window; there must be a mask and a past."""
    assert tokens.attention_mask is not None
    assert tokens.past is not None
    mask = tokens.attention_mask
    capacity = tokens.past[0].shape[2]
    return WindowCall.of(mask, last(tokens, mask), window=window, capacity=capacity)


def visible(tokens: Tokens, *, causal: bool, window: int | None) -> Tensor:
    """Which keys each new token sees, bool ``[B, S, T]``; there must be a mask."""
    assert tokens.attention_mask is not None
    order = token_order(tokens.attention_mask)
    return visible_keys(
        last(tokens, order), order, causal=causal, window=window, real=tokens.attention_mask != 0
    )
