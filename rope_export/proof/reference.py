"""Float64 truth of an attention block, written apart from the module it judges.

The rotation is a complex product, the angles come straight from positions times float64
frequencies, the softmax is spelled out, and no table, kernel or lowering of the package is used.
Query rows are processed in slices, so memory grows linearly with the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from rope_export.attention.block import Attention
from rope_export.attention.norm import Norm
from rope_export.proof.rounded_cache import Rounding
from rope_export.rope.frequencies import Frequencies

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
        window: how many tokens a causal query sees, or how far another sees, or None.
        softcap: bound of the scores, or None.
        sinks: a score for each query head that adds nothing, ``[H]`` float64, or None.
        norm_eps: added to the mean square of query and key heads, or None without a norm.
        query_shift: added to the positions of queries only (0 in a correct block).
        value_roll: rolls the value heads by so many (0 in a correct block).
        rounding: of keys and values on their way through the cache, or None.
    """

    num_heads: int
    num_kv_heads: int
    causal: bool
    scale: float
    found: Frequencies | None
    layout: str
    decay: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    norm_eps: float | None = None
    query_shift: int = 0
    value_roll: int = 0
    rounding: Rounding | None = None

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
            window=block.window,
            softcap=block.softcap,
            sinks=None if block.sinks is None else block.sinks.detach().double(),
            norm_eps=None if block.q_norm is None else block.q_norm.eps,
            rounding=Rounding.of(block),
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
    turn = torch.polar(torch.ones_like(angles) * length, angles)
    return turn_pairs(x, turn.unsqueeze(1) if turn.ndim == 3 else turn, layout)


def turn_pairs(x: Tensor, turn: Tensor, layout: str) -> Tensor:
    """Multiply the pairs of float64 channels ``[..., D]`` by complex ``[..., r / 2]``."""
    width = 2 * turn.shape[-1]
    pattern = "... (two p) -> ... p two" if layout == "half" else "... (p two) -> ... p two"
    # Copied: what is contiguous already may start where no complex number can.
    pairs = rearrange(x[..., :width], pattern, two=2).clone(memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(pairs) * turn
    back = "... p two -> ... (two p)" if layout == "half" else "... p two -> ... (p two)"
    return torch.cat((rearrange(torch.view_as_real(turned), back), x[..., width:]), dim=-1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    parts = [
        torch.nn.functional.linear(part.double(), weight, bias)
        for part in x.split(_PROJECTED_TOKENS, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _normalise(x: Tensor, norm: Norm | None, eps: float | None) -> Tensor:
    """Normalise heads ``[B, H, S, D]``."""
    if norm is None or eps is None:
        return x
    axes: tuple[int, ...]
    if norm.spec.over == "projection":
        axes, like = (1, 3), "(h d) -> h 1 d"
    else:
        axes, like = (3,), "(h d) -> h 1 d" if norm.weight.ndim == 1 else "h d -> h 1 d"
    if norm.spec.kind == "layer":
        x = x - x.mean(axes, keepdim=True)
    x = x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    heads = x.shape[1] if norm.spec.over == "projection" else 1
    shape = {"h": heads} if norm.weight.ndim == 1 else {}
    weight = rearrange(norm.weight.detach().double(), like, **shape)
    x = x * (weight + (1.0 if norm.spec.unit_offset else 0.0))
    if norm.bias is not None:
        x = x + rearrange(norm.bias.detach().double(), like, **shape)
    return x


def queries(block: Attention, x: Tensor, meaning: Semantics) -> Tensor:
    """Queries of float64 hidden states, normalised and not yet rotated: ``[B, H, S, D]``."""
    if block.latent is None:
        projected = _linear(block.q_proj, x)
    elif block.latent.spec.q_rank is None:
        projected = _linear(block.latent.q_proj, x)
    else:
        low = _single_head(_linear(block.latent.q_a_proj, x), block.latent.q_a_norm)
        projected = _linear(block.latent.q_b_proj, low)
    q = rearrange(projected, "b s (h d) -> b h s d", h=meaning.num_heads)
    return _normalise(q, block.q_norm, meaning.norm_eps)


def plain_keys_and_values(block: Attention, x: Tensor, meaning: Semantics) -> tuple[Tensor, Tensor]:
    """Keys and values likewise: ``[B, G, S, D]`` and ``[B, G, S, E]``."""
    heads = meaning.num_kv_heads
    if block.latent is None:
        k, v = (
            rearrange(_linear(layer, x), "b s (h d) -> b h s d", h=heads)
            for layer in (block.k_proj, block.v_proj)
        )
    else:
        mixed = _linear(block.latent.kv_a_proj, x)
        rank = block.latent.spec.kv_rank
        low = _single_head(mixed[..., :rank], block.latent.kv_a_norm)
        plain, v = (
            rearrange(_linear(layer, low), "b s (h d) -> b h s d", h=heads)
            for layer in (block.latent.k_b_proj, block.latent.v_b_proj)
        )
        shared = mixed[..., rank:].unsqueeze(1).repeat(1, heads, 1, 1)
        k = torch.cat((shared, plain), dim=-1)
    return _normalise(k, block.k_norm, meaning.norm_eps), v


def _single_head(x: Tensor, norm: Norm) -> Tensor:
    return _normalise(x.unsqueeze(1), norm, norm.eps).squeeze(1)


@torch.no_grad()
def keys_and_values(
    block: Attention,
    hidden_states: Tensor,
    *,
    position_ids: Tensor | None = None,
    calls: Sequence[int] = (),
    longest: int | None = None,
    semantics: Semantics | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotated keys and values in float64, as a cache of numbers holds them.

    Arguments as of `attention_truth`.

    Returns:
        ``[B, G, S, head_dim]`` and ``[B, G, S, value_head_dim]`` float64.
    """
    meaning = semantics or Semantics.of(block)
    length = hidden_states.shape[1]
    positions = torch.arange(length) if position_ids is None else position_ids
    k, v = plain_keys_and_values(block, hidden_states, meaning)
    k = _turned(k, positions, meaning, calls, longest, of_queries=False)
    return k, v.roll(meaning.value_roll, 1)


def _turned(
    x: Tensor,
    positions: Tensor,
    meaning: Semantics,
    calls: Sequence[int],
    longest: int | None,
    *,
    of_queries: bool,
) -> Tensor:
    """Rotate all tokens; those of one call share the frequencies of its largest position."""
    if meaning.found is None:
        return x
    ends = [end for end in calls if end < x.shape[-2]] + [x.shape[-2]]
    parts, start = [], 0
    for end in ends:
        now = positions[..., start:end]
        of_call = longest or int(now.max()) + 1
        parts.append(turned_at(x[..., start:end, :], now, meaning, of_call, of_queries=of_queries))
        start = end
    return torch.cat(parts, dim=-2)


@torch.no_grad()
def attention_truth(
    block: Attention,
    hidden_states: Tensor,
    *,
    position_ids: Tensor | None = None,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    calls: Sequence[int] = (),
    longest: int | None = None,
    semantics: Semantics | None = None,
) -> Tensor:
    """Evaluate the block in float64 on its own (rounded) weights and inputs, in one full pass.

    Args:
        block: gives the weights.
        hidden_states: ``[B, S, hidden_size]``, any floating dtype; no padding before a token.
        position_ids: ``[B, S]`` or ``[S]``, implied as ``0 … S - 1``; ``[A, B, S]`` with axes.
        rows: ascending query rows to evaluate, or None for all.
        lengths: tokens in each row ``[B]`` when some are shorter; what is beyond is not seen.
        calls: where the calls of a chunked pass end, ascending; frequencies that follow the
            length follow that of the call in which a token is rotated.
        longest: positions of the longest sequence in the call, where it has other rows than these.
        semantics: what to compute, if not what ``block`` states.

    Returns:
        ``[B, len(rows), hidden_size]`` float64.
    """
    meaning = semantics or Semantics.of(block)
    length = hidden_states.shape[1]
    positions = torch.arange(length) if position_ids is None else position_ids
    picked = torch.arange(length) if rows is None else rows
    k, v = keys_and_values(
        block,
        hidden_states,
        position_ids=position_ids,
        calls=calls,
        longest=longest,
        semantics=meaning,
    )
    if meaning.rounding is not None:
        k, v = meaning.rounding.seen((k, v))
    of_rows = calls or rows is None
    q = queries(block, hidden_states if of_rows else hidden_states[:, picked], meaning)
    if of_rows:
        q = _turned(q, positions, meaning, calls, longest, of_queries=True)[..., picked, :]
    else:
        of_call = longest or int(positions.max()) + 1
        q = turned_at(q, positions[..., picked], meaning, of_call, of_queries=True)
    sliced = slice_rows(hidden_states.shape[0] * meaning.num_heads, length, meaning)
    seen_by_none = None if lengths is None else torch.arange(length) >= lengths.unsqueeze(1)

    def hide(start: int, stop: int) -> tuple[int, int, Tensor]:
        rows_now = picked[start:stop]
        first, last = _seen(rows_now, length, meaning)
        hidden = _hidden(rows_now.unsqueeze(1), torch.arange(first, last), meaning)
        if seen_by_none is not None:
            hidden = hidden | seen_by_none[:, None, None, None, first:last]
        return first, last, hidden

    out_weight = block.o_proj.weight.detach().double()
    out_bias = None if block.o_proj.bias is None else block.o_proj.bias.detach().double()
    context = mix(q, k, v, meaning, hide, step=sliced)
    return torch.nn.functional.linear(context, out_weight, out_bias)


def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meaning: Semantics,
    hide: Callable[[int, int], tuple[int, int, Tensor]],
    *,
    step: int,
) -> Tensor:
    """Scores, softmax and mix of rotated float64 heads, some query rows at a time.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, E]``.
        meaning: scale, soft cap and sinks.
        hide: for the query rows from start to stop: the range of keys that any of them may see,
            and which of those are hidden, broadcastable to ``[B, G, H / G, rows, keys]``.
        step: query rows at a time.

    Returns:
        ``[B, S, H * E]``.
    """
    q = rearrange(q * meaning.scale, "b (h g) s d -> b h g s d", h=k.shape[1])
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    sinks = None
    if meaning.sinks is not None:
        sinks = rearrange(meaning.sinks, "(h g) -> h g 1 1", h=k.shape[1])
    outputs = []
    for start in range(0, q.shape[-2], step):
        first, last, hidden = hide(start, start + step)
        scores = q[..., start : start + step, :] @ k[..., first:last, :].transpose(-1, -2)
        if meaning.softcap is not None:
            scores = meaning.softcap * torch.tanh(scores / meaning.softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        largest = scores.amax(dim=-1, keepdim=True)
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        weights = (scores - largest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks - largest).exp()
        weights /= total
        outputs.append(rearrange(weights @ v[..., first:last, :], "b h g s d -> b s (h g d)"))
    return torch.cat(outputs, dim=1)


def slice_rows(rows_of_scores: int, length: int, meaning: Semantics) -> int:
    """How many query rows at a time keep the scores within memory."""
    width = length if meaning.window is None else min(length, 2 * meaning.window + 1)
    step = max(1, _SLICE_ELEMENTS // (rows_of_scores * width))
    return step if meaning.window is None else min(step, max(16, meaning.window))


def turned_at(
    x: Tensor, positions: Tensor, meaning: Semantics, longest: int, *, of_queries: bool
) -> Tensor:
    """Rotate some tokens of a pass whose largest position is ``longest - 1``."""
    found = meaning.found
    if found is None:
        return x
    now = positions + (meaning.query_shift if of_queries else 0)
    length = torch.tensor(found.attention_factor, dtype=torch.float64)
    if meaning.decay is not None:  # one position on all axes: xPos has no other
        scale = meaning.decay ** now.unsqueeze(-1)
        length = length * scale if of_queries else length / scale
    return rotate_exactly(x, exact_angles(now, found, longest), meaning.layout, length)


def _seen(rows: Tensor, length: int, meaning: Semantics) -> tuple[int, int]:
    """The range of keys that any of the rows can see."""
    first, last = 0, length
    if meaning.causal:
        last = int(rows[-1]) + 1
        if meaning.window is not None:
            first = max(0, int(rows[0]) - meaning.window + 1)
    elif meaning.window is not None:
        first = max(0, int(rows[0]) - meaning.window)
        last = min(length, int(rows[-1]) + meaning.window + 1)
    return first, last


def _hidden(rows: Tensor, keys: Tensor, meaning: Semantics) -> Tensor:
    if meaning.causal:
        hidden = keys > rows
        if meaning.window is not None:
            hidden |= keys <= rows - meaning.window
        return hidden
    if meaning.window is None:
        return torch.zeros(len(rows), len(keys), dtype=torch.bool)
    return (keys - rows).abs() > meaning.window


def truth_flops(block: Attention, batch: int, length: int) -> float:
    """Floating-point operations of the scores and the mix, all rows."""
    per_pair = 2.0 * batch * block.num_heads * (block.head_dim + block.value_head_dim)
    seen = length if block.window is None else min(length, 2 * block.window)
    full = per_pair * length * seen
    return full / 2 if block.causal and block.window is None else full
