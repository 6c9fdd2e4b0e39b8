"""Target ``ort``: onnxruntime's fused operators (``com.microsoft``), the fastest legal one."""

from __future__ import annotations

import torch
from torch import Tensor

from rope_export.attention.block import Attention, Cache
from rope_export.attention.tokens import Tokens
from rope_export.lowering import new_tokens, onnx, ops, packing, rules
from rope_export.lowering.choice import Choice
from rope_export.rope.pairs import Layout


def attend(block: Attention, tokens: Tokens, choice: Choice) -> tuple[Tensor, Cache | None]:
    """Emit projections, rotation and the chosen attention.

    Returns:
        ``[B, S, num_heads * value_head_dim]``, and the present when there is a past.
    """
    if choice.query_block or choice.cut_rows:
        return _bidirectional(block, tokens, choice), None
    if choice.form.packs_rows:
        return _gqa(block, tokens, choice)
    if choice.form is rules.MHA:
        return _mha(block, tokens), None
    return onnx.attend(block, tokens, choice)


def _gqa(block: Attention, tokens: Tokens, choice: Choice) -> tuple[Tensor, Cache | None]:
    hidden_states, position_ids = tokens.hidden_states, tokens.position_ids
    mask, slots = tokens.attention_mask, None
    counts = total_tokens = None
    if choice.window_cache and mask is not None and tokens.past is not None:
        counts = (new_tokens.last(tokens, mask) != 0).to(torch.int64).sum(-1)
        if not choice.one_length:  # else padding counts as tokens, and is no number
            total_tokens = new_tokens.count(mask).squeeze(-1)
    if choice.one_length and mask is not None:
        hidden_states = packing.refuse_padding(hidden_states, new_tokens.last(tokens, mask))
    elif mask is not None:
        # In no order, a mask may have holes as well.
        if choice.padding == "left" or not block.causal:
            hidden_states, position_ids, slots = packing.pack(tokens)
        else:
            real = new_tokens.last(tokens, mask)
            hidden_states = packing.refuse_other_padding(hidden_states, real)
    table = None
    k: Tensor | None
    v: Tensor | None
    if choice.form is rules.GQA_ROTATING:
        assert block.rope is not None  # a limit of this form
        cos, sin = block.rope.angles.cos, block.rope.angles.sin
        assert cos is not None  # likewise
        assert sin is not None
        table = (cos, sin)
    if block.rope is None or table is not None:
        if block.packs and not choice.window_block:
            q, k, v = block.packed_projection(hidden_states), None, None
        else:
            q, k, v = block.project(hidden_states)
    else:
        q, k, v = onnx.rotated_projections(block, hidden_states, position_ids)
    batch, length = q.shape[0], q.shape[1]
    total = length if tokens.past is None or mask is None else mask.shape[1]
    # Padding of this call counts as tokens here: it comes last, where nothing sees it, and the
    # next call writes over it.
    last_index = torch.full((batch,), length - 1, dtype=torch.int32)
    if total_tokens is not None:
        last_index = (total_tokens - 1).to(torch.int32)
    elif mask is not None and not block.causal:
        last_index = (packing.lengths(mask) - 1).to(torch.int32)
    elif tokens.past is not None and mask is not None:
        new = new_tokens.last(tokens, mask)
        # The length counted where the mask is: from the host it would be a copy to the device.
        counted = new_tokens.count(mask).squeeze(-1)
        last_index = (counted + (new == 0).sum(-1) - 1).to(torch.int32)
    layout: Layout = "half" if block.rope is None else block.rope.layout
    context, key, value = ops.group_query_attention(
        q,
        k,
        v,
        last_index=last_index,
        total=torch.scalar_tensor(total, dtype=torch.int32),
        present_length=total if tokens.past is None or counts is None else tokens.past[0].shape[2],
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        scale=block.scale,
        layout=layout,
        table=table,
        past=tokens.past,
        window=block.window,
        softcap=block.softcap,
        sinks=None if block.sinks is None else block.sinks.to(q.dtype),
        causal=block.causal,
        rounding=None if tokens.past is None else block.cache_rounding,
        by_rows=choice.by_rows,
        block=choice.window_block,
        single=choice.single,
        counts=counts,
    )
    if slots is not None:
        context = ops.gather_rows(context, slots)
    return context, None if tokens.past is None else (key, value)


def _bidirectional(block: Attention, tokens: Tokens, choice: Choice) -> Tensor:
    hidden_states, position_ids = tokens.hidden_states, tokens.position_ids
    lengths = slots = None
    if tokens.attention_mask is not None:
        hidden_states, position_ids, slots = packing.pack(tokens)
        lengths = packing.lengths(tokens.attention_mask)
    q, k, v = onnx.rotated_projections(block, hidden_states, position_ids)
    context = ops.bidirectional_attention(
        q,
        k,
        v,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        value_head_dim=block.value_head_dim,
        scale=block.scale,
        lengths=lengths,
        window=block.window,
        softcap=block.softcap,
        sinks=None if block.sinks is None else block.sinks.to(q.dtype),
        block=choice.query_block,
        longest_whole=choice.longest_whole,
    )
    if slots is not None:
        context = ops.gather_rows(context, slots)
    return context


def _mha(block: Attention, tokens: Tokens) -> Tensor:
    q, k, v = onnx.rotated_projections(block, tokens.hidden_states, tokens.position_ids)
    if block.num_heads > block.num_kv_heads:  # the operator has no grouped heads
        k, v = (onnx.repeated_heads(t, block.num_kv_heads, block.num_heads) for t in (k, v))
    return ops.multi_head_attention(
        q,
        k,
        v,
        num_heads=block.num_heads,
        value_head_dim=block.value_head_dim,
        scale=block.scale,
        causal=block.causal,
    )
