"""Typed wrappers that emit one ONNX operator each while torch.export is tracing.

Operator specifications: https://onnx.ai/onnx/operators/ (opset 23) and onnxruntime's
docs/ContribOperators.md (``com.microsoft``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rope_export.attention.cache_rounding import CacheRounding
from rope_export.rope.pairs import Layout

Attributes = dict[
    str,
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool],
]


# Of operators that stand for several; none is left in a finished graph.
OWN_DOMAIN = "rope_export"
GROUP_QUERY = "GroupQueryAttention"
BIDIRECTIONAL = "BidirectionalAttention"
SINKS = 11  # index of GroupQueryAttention's input head_sink
COUNTS = 16  # behind all of them, of the package's own
_END = 2**62


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


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """ONNX ``RMSNormalization-23`` over the last axis, in float32; keeps the dtype of ``x``."""
    normal = torch.onnx.ops.symbolic(
        "RMSNormalization",
        (x.float(), weight.float()),
        attrs={"axis": -1, "epsilon": eps or 0.0},
        dtype=torch.float32,
        shape=x.shape,
        version=23,
    )
    return normal.to(x.dtype)


def last_columns(columns: Tensor, count: int) -> Tensor:
    """Last ``count`` columns of ``[B, T]``.

    As an operator of its own: sliced by PyTorch, the tracer would want to know that ``T`` is at
    least ``count``.
    """
    start = torch.full((1,), -count, dtype=torch.int64)
    end = torch.full((1,), _END, dtype=torch.int64)
    axis = torch.full((1,), 1, dtype=torch.int64)
    return torch.onnx.ops.symbolic(
        "Slice",
        (columns, start, end, axis),
        dtype=columns.dtype,
        shape=(columns.shape[0], count),
        version=13,
    )


def merged_heads(x: Tensor) -> Tensor:
    """``[B, S, ..., width]`` to ``[B, S, heads * width]``, for an Attention.

    As an operator of its own: the shape inference of an Attention takes a last axis that it does
    not know for one of no width, and as PyTorch writes it, onnxruntime does not infer it.
    """
    width = math.prod(x.shape[2:])
    like = torch.full((2,), 0, dtype=torch.int64)
    last = torch.full((1,), width, dtype=torch.int64)
    return torch.onnx.ops.symbolic(
        "Reshape",
        (x, torch.cat((like, last))),
        dtype=x.dtype,
        shape=(*x.shape[:2], width),
        version=14,
    )


def gather_rows(x: Tensor, source: Tensor) -> Tensor:
    """``x[b, source[b, s]]`` for ``[B, S, width]``: one GatherND of whole tokens."""
    return torch.onnx.ops.symbolic(
        "GatherND",
        (x, source.unsqueeze(-1)),
        attrs={"batch_dims": 1},
        dtype=x.dtype,
        shape=x.shape,
        version=13,
    )


def kept_slots(keys: Tensor, source: Tensor) -> Tensor:
    """``keys[b, g, source[b, c]]`` for ``[B, G, T, D]``: one GatherND of whole keys.

    Args:
        keys: keys or values.
        source: for each slot of a cache, which of them it takes, ``[B, C]``.
    """
    batch, heads, _, width = keys.shape
    index = source[:, None, :, None].expand(-1, heads, -1, -1)
    return torch.onnx.ops.symbolic(
        "GatherND",
        (keys, index),
        attrs={"batch_dims": 2},
        dtype=keys.dtype,
        shape=(batch, heads, source.shape[1], width),
        version=13,
    )


def joined(past: Tensor, new: Tensor, total: int) -> Tensor:
    """Past and new keys or values, ``[B, G, total, D]``.

    As an operator of its own: the tracer cannot know that ``total`` is the sum of the two.
    """
    return torch.onnx.ops.symbolic(
        "Concat",
        (past, new),
        attrs={"axis": 2},
        dtype=new.dtype,
        shape=(new.shape[0], new.shape[1], total, new.shape[3]),
        version=13,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    visible: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX ``Attention-23`` on ``[B, S, heads * width]`` tensors, or ``[B, heads, S, width]``.

    Args:
        q: queries.
        k: keys; there may be more than queries where all is seen that ``visible`` says.
        v: values.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        scale: factor on the scores.
        causal: whether key ``j`` is hidden from query ``i < j``.
        softcap: bound of the scores, before masking.
        visible: which keys each query sees, bool ``[B, S, T]``.
        past: earlier keys and values ``[B, num_kv_heads, P, width]``; ``T`` is then that of
            ``visible``.

    Returns:
        ``[B, S, num_heads * value width]`` or ``[B, num_heads, S, value width]``, and present keys
        and values.
    """
    attributes: Attributes = {"scale": scale, "is_causal": int(causal)}
    if q.ndim == 3:
        attributes = {"q_num_heads": num_heads, "kv_num_heads": num_kv_heads, **attributes}
    if softcap is not None:
        attributes["softcap"] = softcap
    inputs: list[Tensor | None] = [q, k, v]
    if visible is not None:
        inputs.append(visible.unsqueeze(1))
    if past is not None:
        inputs += past
    batch, length = q.shape[0], q.shape[-2]
    total = length if visible is None else visible.shape[-1]
    beside = 1 if q.ndim == 4 else num_kv_heads
    widths = (k.shape[-1] // beside, v.shape[-1] // beside)
    presents = [(batch, num_kv_heads, total, width) for width in widths]
    of_output: tuple[int, ...] = (batch, length, num_heads * widths[1])
    if q.ndim == 4:
        of_output = (batch, num_heads, length, widths[1])
    shapes = (of_output, *presents)
    output, key, value = torch.onnx.ops.symbolic_multi_out(
        "Attention",
        inputs,
        attrs=attributes,
        dtypes=(q.dtype, k.dtype, v.dtype),
        shapes=shapes,
        version=23,
    )
    return output, key, value


def group_query_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    last_index: Tensor,
    total: Tensor,
    present_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    layout: Layout,
    table: tuple[Tensor, Tensor] | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    rounding: CacheRounding | None = None,
    by_rows: bool = False,
    block: int = 0,
    single: bool = False,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``com.microsoft::GroupQueryAttention``, or a plan for several calls of it.

    Args:
        q: ``[B, S, num_heads * head_dim]``, or queries, keys and values packed in the last axis
            when ``k`` and ``v`` are None.
        k: ``[B, S, num_kv_heads * head_dim]`` or None.
        v: as ``k``.
        last_index: slot of each row's last new token, int32 ``[B]``.
        total: past and new tokens of the longest row, int32 scalar.
        present_length: the same as a size, or the slots of a cache of the window.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of one head.
        scale: factor on the scores.
        layout: which channels form a pair.
        table: cos and sin ``[rows, r/2]`` when the operator rotates, else None.
        past: earlier keys and values ``[B, num_kv_heads, P, head_dim]``, each row's from slot 0.
        window: each query sees so many keys, itself included.
        softcap: bound of the scores.
        sinks: a score for each head that adds nothing, ``[num_heads]``.
        causal: whether later tokens are hidden; else there is no past and no window.
        rounding: how the cache stores integers, or None: it does not; needs ``past``.
        by_rows: whether several new tokens of a batch with a past need one call a row.
        block: tokens in a block when long prompts are computed by blocks, or 0.
        single: whether one token after a past is a call of its own. One of the three makes this
            an operator of the package's own, which `own_operators.expand` replaces.
        counts: new tokens of each row that are no padding, int64 ``[B]``, where the cache holds the
            window only; ``last_index`` is then that of the last of these.

    Returns:
        ``[B, S, num_heads * head_dim]``, and present keys and values.
    """
    inputs: list[Tensor | None] = [q, k, v, *(past or (None, None)), last_index, total]
    attributes: Attributes = {
        "num_heads": num_heads,
        "kv_num_heads": num_kv_heads,
        "scale": scale,
    }
    if not causal:
        attributes["causal"] = 0
    if window is not None:
        attributes["local_window_size"] = window
    if counts is not None:
        attributes["sliding_window_cache"] = 1
    if softcap is not None:
        attributes["softcap"] = softcap
    if table is not None:
        inputs += [table[0].to(q.dtype), table[1].to(q.dtype)]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(layout == "interleaved")}
    if sinks is not None:
        inputs += [None] * (SINKS - len(inputs)) + [sinks]
    if rounding is not None:
        inputs += [None] * (SINKS + 1 - len(inputs))
        inputs += [rounding.key_scale, rounding.value_scale]
        attributes |= {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": rounding.bits,
        }
    domain = "com.microsoft"
    if by_rows or block or single:
        domain = OWN_DOMAIN
        attributes |= {"by_rows": int(by_rows), "block": block, "single": int(single)}
        if counts is not None:
            inputs += [None] * (COUNTS - len(inputs)) + [counts]
    batch, length = q.shape[0], q.shape[1]
    kept = q.dtype if rounding is None else rounding.storage
    width = head_dim if rounding is None else rounding.stored_width(head_dim)
    present = (batch, num_kv_heads, present_length, width)
    output, key, value = torch.onnx.ops.symbolic_multi_out(
        f"{domain}::{GROUP_QUERY}",
        inputs,
        attrs=attributes,
        dtypes=(q.dtype, kept, kept),
        shapes=((batch, length, num_heads * head_dim), present, present),
        version=1,
    )
    return output, key, value


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    value_head_dim: int,
    scale: float,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block: int = 0,
    longest_whole: int = 0,
) -> Tensor:
    """A plan for several calls of an attention without causal order; see `own_operators.expand`.

    Args:
        q: ``[B, S, num_heads * head_dim]``.
        k: ``[B, S, num_kv_heads * head_dim]``.
        v: ``[B, S, num_kv_heads * value_head_dim]``.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        value_head_dim: width of one value head; that of the others with ``block``.
        scale: factor on the scores.
        lengths: tokens of each row, at least 1, int64 ``[B]``; None: all. They come first.
        window: each query sees keys up to so many places away; only with ``block``.
        softcap: bound of the scores, likewise.
        sinks: a score for each head that adds nothing, ``[num_heads]``, likewise.
        block: queries in a call of GroupQueryAttention; 0: MultiHeadAttention, a call a row.
        longest_whole: tokens of the longest call that is not computed by those blocks.

    Returns:
        ``[B, S, num_heads * value_head_dim]``.
    """
    attributes: Attributes = {
        "num_heads": num_heads,
        "kv_num_heads": num_kv_heads,
        "scale": scale,
        "block": block,
        "longest_whole": longest_whole,
        "window": window or 0,
    }
    if softcap is not None:
        attributes["softcap"] = softcap
    inputs: list[Tensor | None] = [q, k, v, lengths, sinks]
    (output,) = torch.onnx.ops.symbolic_multi_out(
        f"{OWN_DOMAIN}::{BIDIRECTIONAL}",
        inputs,
        attrs=attributes,
        dtypes=(q.dtype,),
        shapes=((*q.shape[:2], num_heads * value_head_dim),),
        version=1,
    )
    return output


def multi_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    value_head_dim: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """``com.microsoft::MultiHeadAttention`` on ``[B, S, num_heads * width]`` tensors."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, k, v),
        attrs={"num_heads": num_heads, "scale": scale, "unidirectional": int(causal)},
        dtype=q.dtype,
        shape=(*q.shape[:2], num_heads * value_head_dim),
        version=1,
    )
