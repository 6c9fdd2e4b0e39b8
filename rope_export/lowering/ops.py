"""Typed wrappers that emit one ONNX operator each while torch.export is tracing.

Operator specifications: https://onnx.ai/onnx/operators/ (opset 23) and onnxruntime's
docs/ContribOperators.md (``com.microsoft``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rope_export.pairs import Layout

Attributes = dict[
    str,
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool],
]


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    layout: Layout,
) -> Tensor:
    """ONNX ``RotaryEmbedding-23``, in float32.

    Its other form, tables and ``position_ids``, is not used: positions beyond the table would be
    an error on one provider and pass through unrotated on another.

    Args:
        x: ``[B, S, num_heads * head_dim]`` or ``[B, num_heads, S, head_dim]``.
        cos: gathered for each token, ``[B, S, r/2]``.
        sin: as ``cos``.
        num_heads: heads in ``x``.
        head_dim: width of one head.
        layout: which channels form a pair.
    """
    attributes: Attributes = {"interleaved": int(layout == "interleaved")}
    if x.ndim == 3:
        attributes["num_heads"] = num_heads
    rotated = 2 * cos.shape[-1]
    if rotated != head_dim:
        attributes["rotary_embedding_dim"] = rotated
    # The operator wants tables of its input's dtype: half-precision heads are turned in float32.
    wide = x.float()
    turned = torch.onnx.ops.symbolic(
        "RotaryEmbedding",
        (wide, cos.float(), sin.float()),
        attrs=attributes,
        dtype=wide.dtype,
        shape=x.shape,
        version=23,
    )
    return turned.to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """ONNX ``Attention-23`` on ``[B, S, heads * head_dim]`` tensors."""
    return torch.onnx.ops.symbolic(
        "Attention",
        (q, k, v),
        attrs={
            "q_num_heads": num_heads,
            "kv_num_heads": num_kv_heads,
            "scale": scale,
            "is_causal": int(causal),
        },
        dtype=q.dtype,
        shape=q.shape,
        version=23,
    )


def group_query_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    layout: Layout,
) -> Tensor:
    """``com.microsoft::GroupQueryAttention`` over a whole prompt.

    Args:
        q: ``[B, S, num_heads * head_dim]``, or queries, keys and values packed in the last axis
            when ``k`` and ``v`` are None.
        k: ``[B, S, num_kv_heads * head_dim]`` or None.
        v: as ``k``.
        table: cos and sin ``[rows, r/2]`` when the operator rotates, else None.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of one head.
        scale: factor on the scores.
        layout: which channels form a pair.
    """
    batch, length = q.shape[0], q.shape[1]
    # Every row is a whole prompt: its last valid index is length - 1.
    last_index = torch.full((batch,), length - 1, dtype=torch.int32)
    total = torch.scalar_tensor(length, dtype=torch.int32)
    inputs: list[Tensor | None] = [q, k, v, None, None, last_index, total]
    attributes: Attributes = {
        "num_heads": num_heads,
        "kv_num_heads": num_kv_heads,
        "scale": scale,
    }
    if table is not None:
        inputs += [table[0].to(q.dtype), table[1].to(q.dtype)]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(layout == "interleaved")}
    present = (batch, num_kv_heads, length, head_dim)
    outputs = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=(q.dtype, q.dtype, q.dtype),
        shapes=((batch, length, num_heads * head_dim), present, present),
        version=1,
    )
    return outputs[0]


def multi_head_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, scale: float, causal: bool
) -> Tensor:
    """``com.microsoft::MultiHeadAttention`` on ``[B, S, num_heads * head_dim]`` tensors."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, k, v),
        attrs={"num_heads": num_heads, "scale": scale, "unidirectional": int(causal)},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )
