"""Float64 truth of an attention block, written apart from the module it judges.

The rotation is a complex product, the angles come straight from positions times float64
frequencies, the softmax is spelled out, and no table, kernel or lowering of the package is used.
Query rows are processed in slices, so memory grows linearly with the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from rope_export.frequencies import Switch

if TYPE_CHECKING:
    from rope_export.attention import Attention

_SLICE_ELEMENTS = 1 << 22  # scores alive at once: 32 MiB
_PROJECTED_TOKENS = 4096


@dataclass(frozen=True)
class Semantics:
    """What a block means, apart from its weights; replace a field to state a defect.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        causal: whether later tokens are hidden.
        scale: factor on the scores.
        inv_freq: ``[r / 2]`` float64, or None without RoPE.
        layout: which channels form a pair.
        attention_factor: length of a rotated pair over that of the pair.
        beyond: frequencies of longer sequences, or None.
        query_shift: added to the positions of queries only (0 in a correct block).
        value_roll: rolls the value heads by so many (0 in a correct block).
    """

    num_heads: int
    num_kv_heads: int
    causal: bool
    scale: float
    inv_freq: Tensor | None
    layout: str
    attention_factor: float = 1.0
    beyond: Switch | None = None
    query_shift: int = 0
    value_roll: int = 0

    @classmethod
    def of(cls, block: Attention) -> Semantics:
        """Read the semantics of ``block``."""
        return cls(
            num_heads=block.num_heads,
            num_kv_heads=block.num_kv_heads,
            causal=block.causal,
            scale=block.scale,
            inv_freq=None if block.rope is None else block.rope.inv_freq,
            layout="half" if block.rope is None else block.rope.layout,
            attention_factor=1.0 if block.rope is None else block.rope.attention_factor,
            beyond=None if block.rope is None else block.rope.beyond,
        )


def rotate_exactly(
    x: Tensor, positions: Tensor, inv_freq: Tensor, layout: str, length: float = 1.0
) -> Tensor:
    """Rotate float64 heads by complex multiplication.

    Args:
        x: ``[B, H, S, D]`` float64.
        positions: ``[B, S]`` or ``[S]``.
        inv_freq: ``[r / 2]`` float64.
        layout: ``"half"`` or ``"interleaved"``.
        length: of a rotated pair over that of the pair.
    """
    width = 2 * inv_freq.shape[0]
    pattern = "... (two p) -> ... p two" if layout == "half" else "... (p two) -> ... p two"
    pairs = rearrange(x[..., :width], pattern, two=2).contiguous()
    angles = positions.to(torch.float64).unsqueeze(-1) * inv_freq
    if angles.ndim == 3:
        angles = angles.unsqueeze(1)
    turned = torch.view_as_complex(pairs) * torch.polar(torch.full_like(angles, length), angles)
    back = "... p two -> ... (two p)" if layout == "half" else "... p two -> ... (p two)"
    return torch.cat((rearrange(torch.view_as_real(turned), back), x[..., width:]), dim=-1)


def _project(layer: nn.Linear, x: Tensor, heads: int) -> Tensor:
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    parts = [
        torch.nn.functional.linear(part.double(), weight, bias)
        for part in x.split(_PROJECTED_TOKENS, dim=1)
    ]
    return rearrange(torch.cat(parts, dim=1), "b s (h d) -> b h s d", h=heads)


@torch.no_grad()
def attention_truth(
    block: Attention,
    hidden_states: Tensor,
    *,
    position_ids: Tensor | None = None,
    rows: Tensor | None = None,
    semantics: Semantics | None = None,
) -> Tensor:
    """Evaluate the block in float64 on its own (rounded) weights and inputs.

    Args:
        block: gives the weights.
        hidden_states: ``[B, S, hidden_size]``, any floating dtype.
        position_ids: ``[B, S]`` or ``[S]``; implied as ``0 … S - 1``.
        rows: ascending query rows to evaluate, or None for all.
        semantics: what to compute, if not what ``block`` states.

    Returns:
        ``[B, len(rows), hidden_size]`` float64.
    """
    meaning = semantics or Semantics.of(block)
    length = hidden_states.shape[1]
    positions = torch.arange(length) if position_ids is None else position_ids
    picked = torch.arange(length) if rows is None else rows
    q = _project(block.q_proj, hidden_states[:, picked], meaning.num_heads)
    k = _project(block.k_proj, hidden_states, meaning.num_kv_heads)
    v = _project(block.v_proj, hidden_states, meaning.num_kv_heads)
    v = v.roll(meaning.value_roll, dims=1)
    if meaning.inv_freq is not None:
        q_positions = positions[..., picked] + meaning.query_shift
        longer = meaning.beyond is not None and int(positions.max()) >= meaning.beyond.length
        inv_freq = meaning.beyond.inv_freq if meaning.beyond and longer else meaning.inv_freq
        rotation = (inv_freq, meaning.layout, meaning.attention_factor)
        q = rotate_exactly(q, q_positions, *rotation)
        k = rotate_exactly(k, positions, *rotation)
    q = rearrange(q * meaning.scale, "b (h g) s d -> b h g s d", h=meaning.num_kv_heads)
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    out_weight = block.o_proj.weight.detach().double()
    out_bias = None if block.o_proj.bias is None else block.o_proj.bias.detach().double()
    step = max(1, _SLICE_ELEMENTS // (hidden_states.shape[0] * meaning.num_heads * length))
    outputs = []
    for start in range(0, len(picked), step):
        rows_now = picked[start : start + step]
        seen = int(rows_now[-1]) + 1 if meaning.causal else length
        scores = q[..., start : start + step, :] @ k[..., :seen, :].transpose(-1, -2)
        if meaning.causal:
            scores.masked_fill_(torch.arange(seen) > rows_now.unsqueeze(1), -torch.inf)
        scores -= scores.amax(dim=-1, keepdim=True)
        weights = scores.exp_()
        weights /= weights.sum(dim=-1, keepdim=True)
        context = rearrange(weights @ v[..., :seen, :], "b h g s d -> b s (h g d)")
        outputs.append(torch.nn.functional.linear(context, out_weight, out_bias))
    return torch.cat(outputs, dim=1)


def truth_flops(block: Attention, batch: int, length: int) -> float:
    """Floating-point operations of the scores and the mix, all rows."""
    full = 4.0 * batch * block.num_heads * block.head_dim * length * length
    return full / 2 if block.causal else full
