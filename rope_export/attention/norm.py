"""Norms of queries and keys, as models have them: RMS or layer norm, of heads or of all at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export import dispatch
from rope_export.attention.specs import QKNorm


class Norm(nn.Module):
    """A `QKNorm` with its weights, in float32 at least.

    Args:
        spec: which norm.
        num_heads: heads side by side in its input.
        head_dim: width of one.
    """

    def __init__(self, spec: QKNorm, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = spec.eps
        shape = {
            "head": (head_dim,),
            "each_head": (num_heads, head_dim),
            "projection": (num_heads * head_dim,),
        }[spec.over]
        neutral = torch.zeros if spec.unit_offset else torch.ones
        self.weight = nn.Parameter(neutral(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if spec.bias else None

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        return f"{self.spec.kind}, over={self.spec.over}, eps={self.eps:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise heads side by side: ``[..., num_heads * head_dim]``, in their dtype."""
        # Half precision is widened; float64 stays what it is.
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(dtype)
        if self.spec.unit_offset:
            weight = weight + 1
        bias = None if self.bias is None else self.bias.to(dtype)
        shared = self.spec.over != "each_head"
        whole = self.spec.over == "projection" or self.num_heads == 1
        wide = x.to(dtype)
        heads = wide if whole else wide.unflatten(-1, (self.num_heads, self.head_dim))
        if self.spec.kind == "layer":
            scale, shift = (weight, bias) if shared else (None, None)
            normal = F.layer_norm(heads, heads.shape[-1:], scale, shift, self.eps)
        else:
            normal = _rms(heads, weight if shared else None, self.eps)
        if not shared:
            normal = normal * weight.reshape(heads.shape[-1] if whole else weight.shape)
            if bias is not None:
                normal = normal + bias.reshape(heads.shape[-1] if whole else bias.shape)
        return (normal if whole else normal.flatten(-2)).to(x.dtype)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    target = dispatch.lowering()
    if target is None:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return target.rms_norm(x, weight, eps)
