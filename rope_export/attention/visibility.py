"""Which token sees which: places in a row, causal order, windows and padding."""

from __future__ import annotations

import torch
from torch import Tensor


def token_order(attention_mask: Tensor) -> Tensor:
    """Place of each token among the real ones of its row, int64 as ``attention_mask`` ``[B, T]``.

    A real token's place is the number of ones before it. Padding takes that of the real token
    before it (0 at the start), so that no place exceeds those of real tokens.
    """
    return (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)


def visible_keys(
    q_order: Tensor,
    k_order: Tensor,
    *,
    causal: bool,
    window: int | None,
    real: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees.

    Args:
        q_order: places of the queries in their rows, ``[S]`` or ``[B, S]``.
        k_order: places of the keys, ``[T]`` or ``[B, T]``.
        causal: whether keys after the query are hidden.
        window: a causal query sees the last ``window`` keys, itself included; another sees keys
            up to ``window`` places away on either side (both as in transformers). None: all.
        real: which keys are tokens and not padding, bool ``[B, T]``; None: all.

    Returns:
        bool ``[S, T]`` or ``[B, S, T]``.
    """
    ahead = k_order.unsqueeze(-2) - q_order.unsqueeze(-1)
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        seen = seen & (ahead > -window if causal else ahead.abs() <= window)
    return seen if real is None else seen & real.unsqueeze(-2)
