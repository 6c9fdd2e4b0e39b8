"""Target ``ort``: onnxruntime's fused operators (``com.microsoft``), the fastest legal one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from einops import rearrange, repeat
from torch import Tensor

from rope_export.lowering import onnx, ops, rules
from rope_export.pairs import Layout

if TYPE_CHECKING:
    from rope_export.attention import Attention


def _rotating_gqa(block: Attention, hidden_states: Tensor, position_ids: Tensor | None) -> Tensor:
    assert block.rope is not None  # a limit of this form
    assert position_ids is None  # likewise
    cos, sin = block.rope.angles.cos, block.rope.angles.sin
    assert cos is not None  # likewise
    assert sin is not None
    return _gqa(block, block.packed_projection(hidden_states), None, None, (cos, sin))


def _plain_gqa(block: Attention, hidden_states: Tensor, position_ids: Tensor | None) -> Tensor:
    if block.rope is None:
        return _gqa(block, block.packed_projection(hidden_states), None, None, None)
    q, k, v = onnx.rotated_projections(block, hidden_states, position_ids)
    return _gqa(block, q, k, v, None)


def _gqa(
    block: Attention,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: tuple[Tensor, Tensor] | None,
) -> Tensor:
    layout: Layout = "half" if block.rope is None else block.rope.layout
    return ops.group_query_attention(
        q,
        k,
        v,
        table,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        scale=block.scale,
        layout=layout,
    )


def _mha(block: Attention, hidden_states: Tensor, position_ids: Tensor | None) -> Tensor:
    q, k, v = onnx.rotated_projections(block, hidden_states, position_ids)
    groups = block.num_heads // block.num_kv_heads
    if groups > 1:  # the operator has no grouped heads
        k, v = (
            rearrange(
                repeat(t, "b s (h d) -> b s h g d", h=block.num_kv_heads, g=groups),
                "b s h g d -> b s (h g d)",
            )
            for t in (k, v)
        )
    return ops.multi_head_attention(
        q, k, v, num_heads=block.num_heads, scale=block.scale, causal=block.causal
    )


_FORMS: dict[str, Callable[[Attention, Tensor, Tensor | None], Tensor]] = {
    rules.GQA_ROTATING.name: _rotating_gqa,
    rules.GQA.name: _plain_gqa,
    rules.MHA.name: _mha,
}


def attend(
    block: Attention, hidden_states: Tensor, position_ids: Tensor | None, choice: rules.Choice
) -> Tensor:
    """Emit projections, rotation and the chosen attention: ``[B, S, num_heads * head_dim]``."""
    emit = _FORMS.get(choice.form.name)
    if emit is None:
        return onnx.attend(block, hidden_states, position_ids, choice)
    return emit(block, hidden_states, position_ids)
