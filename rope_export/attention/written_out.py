"""Attention written out, where no fused kernel of PyTorch has the variant."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as arithmetic, in float32 for half-precision heads as fused kernels do.

    Grouped heads share their keys without being copied: the queries of a group are stacked along
    the sequence of one product.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``, ``G`` a divisor of ``H``.
        v: ``[B, G, T, E]``.
        scale: factor on the products.
        visible: which keys each query sees, bool ``[S, T]`` or ``[B, S, T]``; or numbers that are
            added to the (capped) scores; None: all.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` before masking (Gemma 2).
        sinks: a score of each head that takes part in the softmax and adds nothing, ``[H]``
            (gpt-oss); it is not capped.

    Returns:
        ``[B, S, H * E]`` in the dtype of ``q``.
    """
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # it would narrow the products again
            return attend_explicitly(
                q, k, v, scale=scale, visible=visible, softcap=softcap, sinks=sinks
            )
    kv_heads, length = k.shape[1], q.shape[2]
    groups = q.shape[1] // kv_heads
    dtype = q.dtype
    q, k, v = q.float(), k.float(), v.float()
    q = rearrange(q * scale, "b (h g) s d -> b h (g s) d", h=kv_heads)
    scores = q @ rearrange(k, "b h t d -> b h d t")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is not None:
        visible = visible.unsqueeze(0) if visible.ndim == 2 else visible
        # Not repeated: onnxruntime has no Tile of booleans on CUDA.
        visible = torch.cat([visible] * groups, dim=1).unsqueeze(1)
        if visible.dtype == torch.bool:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        else:
            scores = scores + visible
    if sinks is not None:
        of_head = sinks.float().reshape(1, kv_heads, groups, 1, 1)
        of_row = of_head.expand(q.shape[0], kv_heads, groups, length, 1).flatten(2, 3)
        weights = torch.softmax(torch.cat((scores, of_row), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    context = (weights @ v).unflatten(2, (groups, length))
    # Merged in one step: torch 2.11 would fix dynamic axes on the way by heads.
    merged: Tensor = rearrange(context, "b h g s e -> b s (h g e)")
    return merged.to(dtype)
