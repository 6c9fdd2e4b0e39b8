"""Rows of different lengths for an operator that counts every row from its first slot.

Everything is counted from the mask, where the mask is: what comes of the row's length is known on
the host, and would be a copy to the device in each step, which no CUDA graph may have. Nor is a
maximum taken of integers, which on CUDA needs cuDNN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rope_export.attention.tokens import Tokens
from rope_export.lowering import new_tokens, ops


def pack(tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move the real tokens of each row to its front, wherever the padding is.

    Args:
        tokens: of a call with a mask.

    Returns:
        hidden states and position ids in that order, and the slot that each token went to,
        ``[B, S]``, which `ops.gather_rows` brings the result back with.
    """
    assert tokens.attention_mask is not None
    real = new_tokens.last(tokens, tokens.attention_mask)
    ahead = real.cumsum(-1)
    column = ahead + (real == 0).cumsum(-1) - 1
    # Padding keeps its order behind the real tokens.
    slots = torch.where(real != 0, ahead - 1, real.sum(-1, keepdim=True) + column - ahead)
    source = torch.zeros_like(slots).scatter(1, slots, column)
    position_ids = tokens.position_ids
    if position_ids is not None:
        position_ids = torch.gather(position_ids, -1, source.expand_as(position_ids))
    return ops.gather_rows(tokens.hidden_states, source), position_ids, slots


def lengths(attention_mask: Tensor) -> Tensor:
    """Tokens of each row of ``[B, T]``, int64 ``[B]``; of a row without any, one."""
    return (attention_mask != 0).sum(-1).clamp(min=1)


def refuse_other_padding(hidden_states: Tensor, real: Tensor) -> Tensor:
    """Make rows whose padding is not all at their end NaN, lest they be answered wrongly.

    Args:
        hidden_states: ``[B, S, width]``.
        real: 1 for a token and 0 for padding, ``[B, S]``.
    """
    return _poisoned(hidden_states, ((real == 0).cumsum(-1) * real).sum(-1) != 0)


def refuse_padding(hidden_states: Tensor, real: Tensor) -> Tensor:
    """Make rows with any padding NaN, likewise."""
    return _poisoned(hidden_states, (real == 0).sum(-1) != 0)


def _poisoned(hidden_states: Tensor, rows: Tensor) -> Tensor:
    poison = torch.where(rows, torch.nan, 0.0).to(hidden_states.dtype)
    return hidden_states + poison[:, None, None]
