"""Target ``primitive``: opset 18 arithmetic that any runtime has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from rope_export.lowering import rules
from rope_export.rotation import rotate_sequence

if TYPE_CHECKING:
    from rope_export.attention import Attention


def attend(
    block: Attention, hidden_states: Tensor, position_ids: Tensor | None, choice: rules.Choice
) -> Tensor:
    """Emit projections, rotation, scores, softmax and mix: ``[B, S, num_heads * head_dim]``.

    Grouped heads share their keys without being copied: the queries of a group are stacked
    along the sequence of one product. Half-precision scores are computed in float32, as fused
    kernels do.
    """
    del choice  # this target has one form
    length = hidden_states.shape[1]
    groups = block.num_heads // block.num_kv_heads
    q, k, v = (p(hidden_states) for p in (block.q_proj, block.k_proj, block.v_proj))
    q = rearrange(q, "b s (h d) -> b h s d", h=block.num_heads)
    k = rearrange(k, "b s (h d) -> b h s d", h=block.num_kv_heads)
    v = rearrange(v, "b s (h d) -> b h s d", h=block.num_kv_heads)
    if block.rope is not None:
        if position_ids is None:
            position_ids = block.rope.implied_positions(length)
        for_q, for_k = block.rope.turns(position_ids)
        q = rotate_sequence(q, *for_q, layout=block.rope.layout)
        k = rotate_sequence(k, *for_k, layout=block.rope.layout)
    q, k, v = q.float(), k.float(), v.float()
    q = rearrange(q * block.scale, "b (h g) s d -> b h (g s) d", h=block.num_kv_heads)
    scores = q @ rearrange(k, "b h s d -> b h d s")
    if block.causal:
        token = torch.arange(length)
        hidden = token.unsqueeze(0) > token.repeat(groups).unsqueeze(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    context = (torch.softmax(scores, dim=-1) @ v).unflatten(2, (groups, length))
    merged: Tensor = rearrange(context, "b h g s d -> b s (h g d)")
    return merged.to(hidden_states.dtype)
