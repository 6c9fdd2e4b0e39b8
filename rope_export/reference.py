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

from rope_export.frequencies import Frequencies

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
        found: what the RoPE type comes down to, or None without RoPE.
        layout: which channels form a pair.
        decay: xPos's decay of each pair over one position, ``[r / 2]`` float64, or None.
        query_shift: added to the positions of queries only (0 in a correct block).
        value_roll: rolls the value heads by so many (0 in a correct block).
    """

    num_heads: int
    num_kv_heads: int
    causal: bool
    scale: float
    found: Frequencies | None
    layout: str
    decay: Tensor | None = None
    query_shift: int = 0
    value_roll: int = 0

    @classmethod
    def of(cls, block: Attention) -> Semantics:
        """Read the semantics of ``block``."""
        rope = block.rope
        decay = None
        if rope is not None and rope.xpos is not None:
            channels = torch.arange(0, rope.dim, 2, dtype=torch.float64)
            decay = (channels / rope.dim + 0.4) / 1.4
            decay **= 1 / (rope.xpos.scale_base * rope.interpolate_factor)
        return cls(
            num_heads=block.num_heads,
            num_kv_heads=block.num_kv_heads,
            causal=block.causal,
            scale=block.scale,
            found=None if rope is None else rope.found,
            layout="half" if rope is None else rope.layout,
            decay=decay,
        )


def exact_angles(positions: Tensor, found: Frequencies, longest: int) -> Tensor:
    """Angles in float64.

    Args:
        positions: ``[..., S]``, or ``[A, B, S]`` where a token has a position on each axis.
        found: what the RoPE type comes down to.
        longest: positions of the longest sequence in the batch.

    Returns:
        ``[..., S, r / 2]``.
    """
    inv_freq = found.inv_freq
    if found.beyond is not None and longest > found.beyond.length:
        inv_freq = found.beyond.inv_freq
    if found.stretch is not None and longest > found.stretch.length:
        growth = found.stretch.factor * (longest / found.stretch.length - 1) + 1
        pairs = len(inv_freq)
        inv_freq = inv_freq / growth ** (torch.arange(pairs, dtype=torch.float64) / (pairs - 1))
    if positions.ndim == 3:
        assert found.axis_of_pair is not None
        of_pair = positions[torch.tensor(found.axis_of_pair)]
        return rearrange(of_pair, "p b s -> b s p").to(torch.float64) * inv_freq
    return positions.to(torch.float64).unsqueeze(-1) * inv_freq


def rotate_exactly(x: Tensor, angles: Tensor, layout: str, length: float | Tensor = 1.0) -> Tensor:
    """Rotate float64 heads by complex multiplication.

    Args:
        x: ``[B, H, S, D]`` float64.
        angles: ``[B, S, r / 2]`` or ``[S, r / 2]``.
        layout: ``"half"`` or ``"interleaved"``.
        length: of a rotated pair over that of the pair, a number or as ``angles``.
    """
    width = 2 * angles.shape[-1]
    pattern = "... (two p) -> ... p two" if layout == "half" else "... (p two) -> ... p two"
    pairs = rearrange(x[..., :width], pattern, two=2).contiguous()
    turn = torch.polar(torch.ones_like(angles) * length, angles)
    turned = torch.view_as_complex(pairs) * (turn.unsqueeze(1) if turn.ndim == 3 else turn)
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
        position_ids: ``[B, S]`` or ``[S]``, implied as ``0 … S - 1``; ``[A, B, S]`` with axes.
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
    if meaning.found is not None:
        longest = int(positions.max()) + 1
        q_positions = positions[..., picked] + meaning.query_shift
        of_q, of_k = (exact_angles(p, meaning.found, longest) for p in (q_positions, positions))
        q_length = k_length = torch.tensor(meaning.found.attention_factor, dtype=torch.float64)
        if meaning.decay is not None:  # one position on all axes: xPos has no other
            q_length = q_length * meaning.decay ** q_positions.unsqueeze(-1)
            k_length = k_length / meaning.decay ** positions.unsqueeze(-1)
        q = rotate_exactly(q, of_q, meaning.layout, q_length)
        k = rotate_exactly(k, of_k, meaning.layout, k_length)
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
