"""Rows of different lengths for an operator that counts every row from its first slot."""

from __future__ import annotations

import torch
from torch import Tensor

from rope_export.attention.tokens import Tokens
from rope_export.lowering import new_tokens, ops


def pack(tokens: Tokens, *, captures: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move the real tokens of each row to its front, wherever the padding is.

    Args:
        tokens: of a call with a mask.
        captures: whether nothing may be made from the row's length, which is known on the host.

    Returns:
        hidden states and position ids in that order, and the slot that each token went to,
        ``[B, S]``, which `take_rows` brings the result back with.
    """
    assert tokens.attention_mask is not None
    real = new_tokens.last(tokens, tokens.attention_mask)
    ahead = real.cumsum(-1)
    column = ahead + (real == 0).cumsum(-1) - 1 if captures else torch.arange(real.shape[1])
    # Padding keeps its order behind the real tokens.
    slots = torch.where(real != 0, ahead - 1, real.sum(-1, keepdim=True) + column - ahead)
    source = torch.zeros_like(slots).scatter(1, slots, column.expand_as(slots))
    position_ids = tokens.position_ids
    if position_ids is not None:
        position_ids = torch.gather(position_ids, -1, source.expand_as(position_ids))
    return take_rows(tokens.hidden_states, source, captures=captures), position_ids, slots


def take_rows(x: Tensor, source: Tensor, *, captures: bool) -> Tensor:
    """``x[b, source[b, s]]`` for ``[B, S, width]``: one Gather of whole tokens."""
    if captures:
        return ops.gather_rows(x, source)
    batch, length, width = x.shape
    flat = source + torch.arange(batch).unsqueeze(1) * length
    return x.reshape(-1, width).index_select(0, flat.reshape(-1)).reshape(batch, length, width)


def refuse_padding(hidden_states: Tensor, real: Tensor) -> Tensor:
    """Make rows with any padding NaN, likewise.

    Args:
        hidden_states: ``[B, S, width]``.
        real: 1 for a token and 0 for padding, ``[B, S]``.
    """
    padded = (real == 0).to(torch.int64).sum(-1) != 0
    poison = torch.where(padded, torch.nan, 0.0).to(hidden_states.dtype)
    return hidden_states + poison[:, None, None]


def refuse_other_padding(hidden_states: Tensor, real: Tensor, *, captures: bool) -> Tensor:
    """Make rows whose padding is not all at their end NaN, lest they be answered wrongly.

    Args:
        hidden_states: ``[B, S, width]``.
        real: 1 for a token and 0 for padding, ``[B, S]``.
        captures: as of `pack`.
    """
    if captures:
        misplaced = ((real == 0).cumsum(-1) * real).sum(-1) != 0
    else:
        column = torch.arange(1, real.shape[1] + 1)
        misplaced = (real * column).amax(-1) != real.sum(-1)
    poison = torch.where(misplaced, torch.nan, 0.0).to(hidden_states.dtype)
    return hidden_states + poison[:, None, None]
