"""What a step of a block needs at least, by arithmetic."""

from __future__ import annotations

from rope_export.attention import Attention


def flops(block: Attention, phase: str, length: int, batch: int) -> int:
    """Floating-point operations: two for each product of weights, queries and keys, and values."""
    new = length if phase == "prefill" else 1
    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1)
    by_pair = block.num_heads * (block.head_dim + block.value_head_dim)
    return 2 * batch * (new * weights + by_pair * pairs(block, phase, length))


def pairs(block: Attention, phase: str, length: int) -> int:
    """Queries and the keys they see."""
    window = length if block.window is None else min(block.window, length)
    if phase == "decode":
        return window
    if not block.causal:
        before = min(window, length)
        return length * length if block.window is None else length * min(2 * before - 1, length)
    # The first ``window`` queries see 1, 2, … keys, the others ``window``.
    return window * (window + 1) // 2 + (length - window) * window


def least_bytes(block: Attention, phase: str, length: int, batch: int) -> int:
    """Bytes to be read and written: weights, tokens in and out, and the cache a token sees."""
    size = block.dtype.itemsize
    weights = sum(p.numel() for p in block.parameters())
    new = length if phase == "prefill" else 1
    states = 2 * batch * new * block.hidden_size
    cache = 0
    if phase == "decode":
        widths = block.head_dim + block.value_head_dim
        cache = batch * block.num_kv_heads * widths * pairs(block, phase, length)
    return size * (weights + states + cache)
