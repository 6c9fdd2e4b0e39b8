"""Target ``onnx``: the standard's own RotaryEmbedding and Attention (opset 23)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from rope_export.attention.block import Attention, Cache
from rope_export.attention.tokens import Tokens
from rope_export.attention.visibility import visible_keys
from rope_export.lowering import new_tokens, ops, primitive, rules
from rope_export.lowering.choice import Choice
from rope_export.rope.pairs import Layout
from rope_export.rope.rotation import rotate_sequence

# torch 2.11 fixes dynamic axes when it merges several of them; 2.13 does not.
_MERGES_AXES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout, seq_dim: int = -2) -> Tensor:
    """Emit one RotaryEmbedding node with the angles gathered for each token.

    Args:
        x: heads of any rank, as `rotation.rotate_sequence` takes them.
        cos: ``[S, r / 2]`` or ``[B, S, r / 2]``.
        sin: as ``cos``.
        layout: which channels form a pair.
        seq_dim: the axis of the sequence, counted from the end.
    """
    if seq_dim not in (-2, -3) or (x.ndim > 4 and not _MERGES_AXES):
        # Heads on both sides of the sequence, or more axes than the operator has.
        return rotate_sequence(x, cos, sin, layout=layout, seq_dim=seq_dim)
    if seq_dim == -2:  # one or two leading axes are heads of one batch, more are rows of heads
        heads = x.flatten(0, -4) if x.ndim > 3 else x.reshape(1, -1, *x.shape[-2:])
        num_heads = heads.shape[1]
    else:
        num_heads = x.shape[-2]
        heads = x.reshape(-1, x.shape[-3], num_heads * x.shape[-1])
    turned = _rotary_node(heads, (cos, sin), num_heads, x.shape[-1], layout)
    return turned if x.ndim == 4 and seq_dim == -2 else turned.reshape(x.shape)


def _rotary_node(
    x: Tensor, turns: tuple[Tensor, Tensor], num_heads: int, head_dim: int, layout: Layout
) -> Tensor:
    """One node for ``[B, H, S, D]`` or ``[B, S, H * D]``; angles may be shared by the rows."""
    cos, sin = ((t.unsqueeze(0) if t.ndim == 2 else t).expand(x.shape[0], -1, -1) for t in turns)
    return ops.rotary_embedding(x, cos, sin, num_heads=num_heads, head_dim=head_dim, layout=layout)


def rotated_projections(
    block: Attention,
    hidden_states: Tensor,
    position_ids: Tensor | None,
    *,
    widened: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project, normalise and rotate, all ``[B, S, heads * width]``: without transposes in between.

    With ``widened`` the projections continue in float32.
    """
    q, k, v = block.project(hidden_states, widened=widened)
    if block.rope is not None:
        if position_ids is None:
            position_ids = block.rope.implied_positions(hidden_states.shape[1])
        for_q, for_k = block.rope.turns(position_ids)
        shape = (block.head_dim, block.rope.layout)
        q = _rotary_node(q, for_q, block.num_heads, *shape)
        k = _rotary_node(k, for_k, block.num_kv_heads, *shape)
    return q, k, v


def repeated_heads(x: Tensor, heads: int, wanted: int) -> Tensor:
    """``[B, S, heads * width]`` with each head as often as it takes to have ``wanted``."""
    return ops.merged_heads(repeat(x, "b s (h d) -> b s h g d", h=heads, g=wanted // heads))


def attend(block: Attention, tokens: Tokens, choice: Choice) -> tuple[Tensor, Cache | None]:
    """Emit projections, rotation and Attention.

    Returns:
        ``[B, S, num_heads * value_head_dim]``, and the present when there is a past.
    """
    if choice.form.name in (rules.DECOMPOSED.name, rules.PRIMITIVE.name):
        return primitive.attend(block, tokens, choice)
    widened = choice.form is rules.ATTENTION_IN_FLOAT32
    dtype = tokens.hidden_states.dtype
    q, k, v = rotated_projections(block, tokens.hidden_states, tokens.position_ids, widened=widened)
    kv_heads = block.num_kv_heads
    if choice.repeats_heads:
        k, v = (repeated_heads(t, kv_heads, block.num_heads) for t in (k, v))
        kv_heads = block.num_heads
    visible = call = None
    past = tokens.past
    if choice.window_cache and past is not None:
        assert block.window is not None
        call = new_tokens.window_call(tokens, block.window)
        visible = call.visible
        if block.cache_rounding is None:
            past = call.cleared(past[0]), call.cleared(past[1])
    elif tokens.attention_mask is not None:
        visible = new_tokens.visible(tokens, causal=block.causal, window=block.window)
    elif block.window is not None:
        token = torch.arange(q.shape[1])
        visible = visible_keys(token, token, causal=block.causal, window=block.window)
        visible = visible.unsqueeze(0)
    stored: Cache | None = None
    if past is not None and block.cache_rounding is not None:
        # The operator's own past and present are numbers: all tokens come to it as new ones.
        q, k, v = (
            rearrange(x, "b s (h d) -> b h s d", d=width)
            for x, width in ((q, block.head_dim), (k, block.head_dim), (v, block.value_head_dim))
        )
        stored, k, v = primitive.joined_integers(block.cache_rounding, tokens, k, v, call)
        past = None
    elif past is not None and widened:
        past = past[0].float(), past[1].float()
    context, key, value = ops.attention(
        q,
        k,
        v,
        num_heads=block.num_heads,
        num_kv_heads=kv_heads,
        scale=block.scale,
        causal=block.causal and visible is None,
        softcap=block.softcap,
        visible=visible,
        past=past,
    )
    if stored is not None:
        return ops.merged_heads(context.transpose(1, 2)), stored
    if call is not None:
        key, value = ops.kept_slots(key, call.source), ops.kept_slots(value, call.source)
    present = None if past is None else (key.to(dtype), value.to(dtype))
    return context.to(dtype), present
