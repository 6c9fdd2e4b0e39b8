"""What a step of a block needs at least, by arithmetic."""

from __future__ import annotations

from rope_export.attention.block import Attention


def flops(block: Attention, phase: str, length: int, batch: int) -> int:
    """Floating-point operations: two for each product of weights, queries and keys, and values."""
    new = length if phase == "prefill" else 1
    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1)
    by_pair = block.num_heads * (block.head_dim + block.value_head_dim)
    return 2 * batch * (new * weights + by_pair * pairs(block, phase, length))


def pairs(block: Attention, phase: str, length: int) -> int:
    """Queries and the keys they see."""
    reach = length
    if block.window is not None:  # which counts the query's own place only where order is causal
        reach = min(block.window + (not block.causal), length)
    if phase == "decode":
        return reach
    # The first queries see 1, 2, … keys, the others all within reach.
    before = reach * (reach + 1) // 2 + (length - reach) * reach
    return before if block.causal else 2 * before - length


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
