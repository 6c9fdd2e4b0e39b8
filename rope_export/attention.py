"""`Attention`: the block around RoPE, written for one graph in training and for lowering."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rope_export import lowering
from rope_export.errors import BadInputError
from rope_export.rotary import RotaryEmbedding


class Attention(nn.Module):
    """Self-attention with rotary positions: multi-head, grouped-query or multi-query.

    Eager and compiled, it is ``F.scaled_dot_product_attention`` between four linear layers: one
    graph under ``torch.compile(fullgraph=True)``. Inside `rope_export.export` the same module
    lowers to the operators of the chosen target.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``: equal to it for multi-head,
            1 for multi-query attention (default ``num_heads``).
        head_dim: width of one head (default ``hidden_size // num_heads``).
        rope: the rotary embedding applied to queries and keys, or None for no positions.
        causal: whether a token sees only itself and earlier tokens.
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on the output projection.
        scale: factor on the scores (default ``head_dim ** -0.5``).

    Raises:
        BadInputError: an argument is out of range; the message names it and its value.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RotaryEmbedding | None = None,
        causal: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ):
            if value < 1:
                raise BadInputError(f"{name} must be at least 1, got {value}")
        if num_heads % num_kv_heads:
            raise BadInputError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise BadInputError(
                    f"hidden_size must be a multiple of num_heads when head_dim is not given, "
                    f"got {hidden_size} and {num_heads}"
                )
            head_dim = hidden_size // num_heads
        if head_dim < 1:
            raise BadInputError(f"head_dim must be at least 1, got {head_dim}")
        if rope is not None and rope.dim > head_dim:
            raise BadInputError(
                f"rotary_dim must be at most head_dim, got {rope.dim} and {head_dim}"
            )
        scale = head_dim**-0.5 if scale is None else float(scale)
        if not (math.isfinite(scale) and scale > 0):
            raise BadInputError(f"scale must be a finite number above 0, got {scale}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.scale = scale
        self.rope = rope
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias)

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}, scale={self.scale:g}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """Attend within one batch of sequences.

        Args:
            hidden_states: ``[B, S, hidden_size]``.
            position_ids: ``[S]`` or ``[B, S]`` integers for the rotation (``[axes, B, S]`` for a
                RoPE with several); implied as ``offset … offset + S - 1``. The causal order stays
                that of the sequence.
            offset: position of the first token, as an int or a 0-d integer tensor.

        Returns:
            ``[B, S, hidden_size]``.
        """
        target = lowering.active()
        if target is not None:
            context = target.attend(self, hidden_states, position_ids, offset)
            lowered: Tensor = self.o_proj(context)
            return lowered
        q, k, v = self.heads(hidden_states, position_ids=position_ids, offset=offset)
        return self.merge(self.attend(q, k, v, is_causal=self.causal))

    def heads(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project and rotate: ``[B, S, hidden_size]`` to queries, keys and values.

        Returns:
            ``[B, num_heads, S, head_dim]`` and twice ``[B, num_kv_heads, S, head_dim]``; queries
            and keys are rotated.
        """
        q = rearrange(self.q_proj(hidden_states), "b s (h d) -> b h s d", h=self.num_heads)
        k = rearrange(self.k_proj(hidden_states), "b s (h d) -> b h s d", h=self.num_kv_heads)
        v = rearrange(self.v_proj(hidden_states), "b s (h d) -> b h s d", h=self.num_kv_heads)
        if self.rope is not None:
            q, k = self.rope.rotate(q, k, position_ids=position_ids, offset=offset, seq_dim=-2)
        return q, k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Scaled dot-product attention of projected heads, as `heads` returns them."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def merge(self, context: Tensor) -> Tensor:
        """Output projection: ``[B, num_heads, S, head_dim]`` to ``[B, S, hidden_size]``."""
        output: Tensor = self.o_proj(rearrange(context, "b h s d -> b s (h d)"))
        return output

    def packed_projection(self, hidden_states: Tensor) -> Tensor:
        """Queries, keys and values in one product, ``[B, S, (heads + 2 kv_heads) * head_dim]``."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat(tuple(p.weight for p in projections))
        biases = tuple(p.bias for p in projections if p.bias is not None)
        return F.linear(hidden_states, weight, torch.cat(biases) if biases else None)
