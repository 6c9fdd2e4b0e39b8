"""Attention as arithmetic: target ``primitive`` (opset 18), and what no fused operator has."""

from __future__ import annotations

import torch
from torch import Tensor

from rope_export.attention.block import Attention, Cache
from rope_export.attention.cache_rounding import CacheRounding
from rope_export.attention.tokens import Tokens
from rope_export.attention.visibility import visible_keys
from rope_export.attention.window_cache import WindowCall
from rope_export.attention.written_out import attend_explicitly
from rope_export.lowering import new_tokens, ops
from rope_export.lowering.choice import Choice


def attend(block: Attention, tokens: Tokens, choice: Choice) -> tuple[Tensor, Cache | None]:
    """Emit projections, rotation, scores, softmax and mix.

    Returns:
        ``[B, S, num_heads * value_head_dim]``, and the present when there is a past.
    """
    q, k, v = block.heads(tokens.hidden_states, position_ids=tokens.position_ids)
    visible = None
    present: Cache | None = None
    rounding = block.cache_rounding
    if choice.window_cache and tokens.past is not None:
        assert block.window is not None
        call = new_tokens.window_call(tokens, block.window)
        visible = call.visible
        if rounding is not None:
            present, k, v = joined_integers(rounding, tokens, k, v, call)
        else:
            k, v = (
                torch.cat((call.cleared(past), new), dim=-2)
                for past, new in zip(tokens.past, (k, v), strict=True)
            )
            present = ops.kept_slots(k, call.source), ops.kept_slots(v, call.source)
    elif tokens.attention_mask is not None:
        total = tokens.attention_mask.shape[1]
        visible = new_tokens.visible(tokens, causal=block.causal, window=block.window)
        if tokens.past is not None:
            if rounding is not None:
                present, k, v = joined_integers(rounding, tokens, k, v)
            else:
                k = ops.joined(tokens.past[0], k, total)
                v = ops.joined(tokens.past[1], v, total)
                present = k, v
    elif block.causal or block.window is not None:
        token = torch.arange(q.shape[2])
        visible = visible_keys(token, token, causal=block.causal, window=block.window)
    context = attend_explicitly(
        q, k, v, scale=block.scale, visible=visible, softcap=block.softcap, sinks=block.sinks
    )
    return context, present


def joined_integers(
    rounding: CacheRounding, tokens: Tokens, k: Tensor, v: Tensor, call: WindowCall | None = None
) -> tuple[Cache, Tensor, Tensor]:
    """Past and new keys and values in a cache of integers.

    Args:
        rounding: how it stores them.
        tokens: of a call with a past and a mask.
        k: new keys ``[B, G, S, D]``.
        v: new values ``[B, G, S, E]``.
        call: what is done with a cache of the window, or None: it holds all tokens.

    Returns:
        what is kept, as it is stored; and all keys ``[B, G, T, D]`` and values ``[B, G, T, E]`` as
        attention sees them.
    """
    assert tokens.past is not None
    assert tokens.attention_mask is not None
    new = rounding.encode(k, v)
    if call is not None:
        # What lies where no token is needs no clearing: there is no integer that is not finite.
        keys, values = (
            torch.cat((past, fresh), dim=-2) for past, fresh in zip(tokens.past, new, strict=True)
        )
        kept = ops.kept_slots(keys, call.source), ops.kept_slots(values, call.source)
        return kept, *rounding.decode(keys, values)
    total = tokens.attention_mask.shape[1]
    keys, values = (
        ops.joined(past, fresh, total) for past, fresh in zip(tokens.past, new, strict=True)
    )
    return (keys, values), *rounding.decode(keys, values)
