"""Queries, keys and values through latents of lower rank: multi-head latent attention."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from rope_export.attention.norm import Norm
from rope_export.attention.specs import Latent, QKNorm


class LatentProjection(nn.Module):
    """Projections of multi-head latent attention.

    The rotated part of a key is one for all heads and does not go through the latent. It comes
    *first* in each head, where `RotaryEmbedding` rotates; published weights have it last, and the
    projections out of the latent of keys and values as one.

    Args:
        latent: the ranks.
        hidden_size: width of the residual stream.
        num_heads: heads, as many of queries as of keys and values.
        rotary_dim: rotated width of a head.
        head_dim: width of a query or key head, the rotated part included.
        value_head_dim: width of a value head.
    """

    def __init__(
        self,
        latent: Latent,
        hidden_size: int,
        num_heads: int,
        *,
        rotary_dim: int,
        head_dim: int,
        value_head_dim: int,
    ) -> None:
        super().__init__()
        self.spec = latent
        self.num_heads = num_heads
        self.rotary_dim = rotary_dim
        self.plain_dim = head_dim - rotary_dim
        rms = QKNorm(eps=latent.eps)
        if latent.q_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, latent.q_rank, bias=latent.bias)
            self.q_a_norm = Norm(rms, 1, latent.q_rank)
            self.q_b_proj = nn.Linear(latent.q_rank, num_heads * head_dim, bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, latent.kv_rank + rotary_dim, bias=latent.bias)
        self.kv_a_norm = Norm(rms, 1, latent.kv_rank)
        self.k_b_proj = nn.Linear(latent.kv_rank, num_heads * self.plain_dim, bias=False)
        self.v_b_proj = nn.Linear(latent.kv_rank, num_heads * value_head_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project ``[B, S, hidden_size]``.

        Returns:
            queries, keys ``[B, S, num_heads * head_dim]`` and values
            ``[B, S, num_heads * value_head_dim]``.
        """
        if self.spec.q_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden_states)))
        latent, turning = self.kv_a_proj(hidden_states).split(
            (self.spec.kv_rank, self.rotary_dim), dim=-1
        )
        latent = self.kv_a_norm(latent)
        plain = rearrange(self.k_b_proj(latent), "b s (h d) -> b s h d", h=self.num_heads)
        turning = turning.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        k = torch.cat((turning, plain), dim=-1)
        return q, k.flatten(2), self.v_b_proj(latent)
