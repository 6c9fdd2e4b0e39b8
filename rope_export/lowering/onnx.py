"""Target ``onnx``: the standard's own RotaryEmbedding and Attention (opset 23)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rope_export.lowering import ops, rules

if TYPE_CHECKING:
    from rope_export.attention import Attention
    from rope_export.rotary import RotaryEmbedding


def rotate(
    rope: RotaryEmbedding, x: Tensor, position_ids: Tensor, *, num_heads: int | None = None
) -> Tensor:
    """Emit one RotaryEmbedding node.

    Args:
        rope: holds the angles.
        x: ``[B, H, S, D]``, or ``[B, S, H * D]`` with ``num_heads``.
        position_ids: int64 ``[B, S]``.
        num_heads: heads of a 3-D ``x``.
    """
    if num_heads is None:
        num_heads, head_dim = x.shape[1], x.shape[3]
    else:
        head_dim = x.shape[2] // num_heads
    if rope.max_seq_len is not None:
        cos, sin, ids = rope.cos, rope.sin, rope.table_rows(position_ids, rope.max_seq_len)
    else:  # composed angles: gathered here, one row for each token
        (cos, sin), ids = rope.cos_sin(position_ids), None
    return ops.rotary_embedding(
        x, cos, sin, ids, num_heads=num_heads, head_dim=head_dim, layout=rope.layout
    )


def rotated_projections(
    block: Attention,
    hidden_states: Tensor,
    position_ids: Tensor | None,
    *,
    widened: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project and rotate, all ``[B, S, heads * head_dim]``: no transpose is needed in between.

    With ``widened`` the projections continue in float32.
    """
    q, k, v = (p(hidden_states) for p in (block.q_proj, block.k_proj, block.v_proj))
    if widened:
        q, k, v = q.float(), k.float(), v.float()
    if block.rope is not None:
        if position_ids is None:
            batch, length = hidden_states.shape[0], hidden_states.shape[1]
            position_ids = torch.arange(length).unsqueeze(0).expand(batch, length)
        q = rotate(block.rope, q, position_ids, num_heads=block.num_heads)
        k = rotate(block.rope, k, position_ids, num_heads=block.num_kv_heads)
    return q, k, v


def attend(
    block: Attention, hidden_states: Tensor, position_ids: Tensor | None, choice: rules.Choice
) -> Tensor:
    """Emit projections, rotation and Attention: ``[B, S, num_heads * head_dim]``."""
    widened = choice.form is rules.ATTENTION_IN_FLOAT32
    q, k, v = rotated_projections(block, hidden_states, position_ids, widened=widened)
    context = ops.attention(
        q,
        k,
        v,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        scale=block.scale,
        causal=block.causal,
    )
    return context.to(hidden_states.dtype)
