"""Attention blocks with random weights: to export a shape before there is a model."""

from __future__ import annotations

import torch

from rope_export import runtime
from rope_export.attention import Attention
from rope_export.errors import BadInputError
from rope_export.rotary import RotaryEmbedding
from rope_export.rotation import Layout


def random_block(
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    layout: Layout = "half",
    max_seq_len: int,
    causal: bool = True,
    qkv_bias: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Attention:
    """Make a block whose weights depend on ``seed`` alone; the global generator is untouched.

    Every argument is checked, and the size against this machine's memory, before anything is
    allocated. Arguments as of `Attention` and `RotaryEmbedding`; ``rotary_dim`` defaults to
    ``head_dim``.

    Raises:
        BadInputError: an argument is out of range, or the block does not fit in memory.
    """
    width = head_dim or max(1, hidden_size // num_heads)
    if rotary_dim is None and width % 2:
        raise BadInputError(
            f"head_dim must be even unless rotary_dim says how much of it is rotated, got {width}"
        )

    def build() -> Attention:
        rope = RotaryEmbedding(
            rotary_dim or width, theta=theta, layout=layout, max_seq_len=max_seq_len
        )
        return Attention(
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            causal=causal,
            qkv_bias=qkv_bias,
        )

    with torch.device("meta"):
        outline = build()
    tensors = (*outline.parameters(), *outline.buffers())
    # Weights, their float64 copies, the packed copy in the graph, and the file being written.
    needed = 5 * sum(tensor.numel() * 4 for tensor in tensors)
    available = runtime.available_memory()
    if needed > available:
        raise BadInputError(
            f"hidden_size, num_heads and max_seq_len must fit in memory: they need about "
            f"{needed / 2**30:,.1f} GiB, {available / 2**30:,.1f} GiB are free here"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = build()
    return block.to(getattr(torch, dtype)).eval()
