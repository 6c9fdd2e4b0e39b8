"""Attention as arithmetic: target ``primitive`` (opset 18), and what no fused operator has."""

from __future__ import annotations

import torch
from torch import Tensor

from rope_export.attention.block import Attention, Cache
from rope_export.attention.tokens import Tokens
from rope_export.attention.visibility import visible_keys
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
    kept: Cache | None = None
    if choice.window_cache and tokens.past is not None:
        assert block.window is not None
        call = new_tokens.window_call(tokens, block.window)
        visible = call.visible
        k, v = (
            torch.cat((call.cleared(past), new), dim=-2)
            for past, new in zip(tokens.past, (k, v), strict=True)
        )
        kept = ops.kept_slots(k, call.source), ops.kept_slots(v, call.source)
    elif tokens.attention_mask is not None:
        total = tokens.attention_mask.shape[1]
        visible = new_tokens.visible(tokens, causal=block.causal, window=block.window)
        if tokens.past is not None:
            k = ops.joined(tokens.past[0], k, total)
            v = ops.joined(tokens.past[1], v, total)
    elif block.causal or block.window is not None:
        token = torch.arange(q.shape[2])
        visible = visible_keys(token, token, causal=block.causal, window=block.window)
    context = attend_explicitly(
        q, k, v, scale=block.scale, visible=visible, softcap=block.softcap, sinks=block.sinks
    )
    return context, None if tokens.past is None else kept or (k, v)
