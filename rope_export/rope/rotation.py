"""Applying rotations to heads and sequences: pure tensor functions, any axes, both pairings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.rope.pairs import Layout, join_pairs, rotate_pairs, split_pairs


def rotate_sequence(
    x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout, seq_dim: int = -2
) -> Tensor:
    """Rotate every token of ``x`` by its own angles, the same in all heads.

    Args:
        x: ``[..., S, D]``, or ``[..., S, H, D]`` with ``seq_dim=-3``, and so on.
        cos: ``[S, r / 2]``, or ``[B, S, r / 2]`` for an ``x`` whose first axis is ``B``.
        sin: as ``cos``.
        layout: which channels form a pair.
        seq_dim: the axis of the sequence, counted from the end.

    Returns:
        a tensor shaped and typed like ``x``.
    """
    cos, sin = (over_heads(t, x.ndim, seq_dim) for t in (cos, sin))
    return rotate_pairs(x, cos, sin, layout=layout)


def over_heads(per_token: Tensor, ndim: int, seq_dim: int) -> Tensor:
    """``[S, N]`` or ``[B, S, N]`` values of tokens, broadcastable to ``ndim`` axes."""
    after = (None,) * (-2 - seq_dim)
    if per_token.ndim == 2:
        return per_token[(slice(None), *after)] if after else per_token
    between = (None,) * (ndim - 3 - len(after))
    index = (slice(None), *between, slice(None), *after)
    return per_token[index] if between or after else per_token


def swap_pairs(x: Tensor, *, layout: Layout) -> Tensor:
    """``(a, b)`` to ``(-b, a)`` in every pair of channels: a quarter turn."""
    first, second = split_pairs(x, x.shape[-1] // 2, layout)
    return join_pairs(-second, first, layout)


def repeat_for_pairs(values: Tensor, *, layout: Layout) -> Tensor:
    """One value a pair, ``[..., r / 2]``, to one a channel, ``[..., r]``."""
    if layout == "half":
        return torch.cat((values, values), dim=-1)
    return values.repeat_interleave(2, dim=-1)


def apply_rotary_emb(
    freqs: Tensor,
    t: Tensor,
    start_index: int = 0,
    scale: float | Tensor = 1.0,
    seq_dim: int = -2,
    freqs_seq_dim: int | None = None,
    *,
    layout: Layout = "interleaved",
) -> Tensor:
    """Rotate channels ``start_index … start_index + r - 1`` by given angles.

    The function of rotary-embedding-torch 0.9.1, same arguments and numbers; the arithmetic is
    float32 for narrower inputs.

    Args:
        freqs: angles in radians, one a channel, ``[..., S, r]`` and broadcastable against ``t``;
            of two axes, the last ``S`` are used.
        t: what is rotated, ``[..., S, D]`` with ``D >= start_index + r``.
        start_index: the first channel rotated.
        scale: multiplies the rotated channels.
        seq_dim: the axis of the sequence in ``t``.
        freqs_seq_dim: the axis of the sequence in ``freqs``, to use its last ``S`` angles.
        layout: which channels form a pair.

    Returns:
        a tensor shaped and typed like ``t``.

    Raises:
        BadInputError: ``t`` has too few channels, or ``freqs_seq_dim`` is no axis of ``freqs``.
    """
    # Theirs slices the first axis of batched angles too where t has three axes: not repeated here.
    leads = freqs.ndim == 2 or (t.ndim == 3 and seq_dim % 3 == 0)
    if freqs_seq_dim is None and leads:
        freqs_seq_dim = 0
    if freqs_seq_dim is not None:
        if not -freqs.ndim <= freqs_seq_dim < freqs.ndim:
            raise BadInputError(
                f"freqs_seq_dim must be an axis of freqs {tuple(freqs.shape)}, got {freqs_seq_dim}"
            )
        before = (slice(None),) * (freqs_seq_dim % freqs.ndim)
        freqs = freqs[(*before, slice(-t.shape[seq_dim], None))]
    width = freqs.shape[-1]
    end = start_index + width
    if end > t.shape[-1]:
        raise BadInputError(
            f"t must have at least {end} channels (start_index {start_index} and {width} angles), "
            f"got {tuple(t.shape)}"
        )
    if freqs.dtype in (torch.float16, torch.bfloat16):
        freqs = freqs.float()
    turning = t[..., start_index:end]
    turned = turning * freqs.cos() * scale
    turned = turned + swap_pairs(turning, layout=layout) * freqs.sin() * scale
    parts = (t[..., :start_index], turned.to(t.dtype), t[..., end:])
    return torch.cat([part for part in parts if part.shape[-1]], dim=-1)


def apply_learned_rotations(
    rotations: Tensor, t: Tensor, start_index: int = 0, freq_ranges: Tensor | None = None
) -> Tensor:
    """Rotate by angles that a model produced, one for each pair of channels.

    The function of rotary-embedding-torch 0.9.1.

    Args:
        rotations: angles ``[..., S, r / 2]``, or ``[..., S, n]`` with ``freq_ranges``.
        t: ``[..., S, D]``.
        start_index: the first channel rotated.
        freq_ranges: ``[f]``: every rotation is taken at each of these multiples, so that
            ``r / 2 = n * f``.

    Returns:
        a tensor shaped and typed like ``t``.
    """
    if freq_ranges is not None:
        rotations = (rotations.unsqueeze(-1) * freq_ranges).flatten(-2)
    angles = repeat_for_pairs(rotations, layout="interleaved")
    return apply_rotary_emb(angles, t, start_index=start_index)


def broadcat(tensors: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Broadcast tensors to one shape and concatenate them, as in rotary-embedding-torch."""
    return torch.cat(torch.broadcast_tensors(*tensors), dim=dim)
