"""Scales of a cache of integers: what a block's keys and values come to on some inputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rope_export.artifacts.cache_layout import BITS
from rope_export.attention.block import Attention
from rope_export.attention.cache_rounding import CacheRounding
from rope_export.attention.random_inputs import draw, input_gain
from rope_export.errors import BadInputError
from rope_export.rope.pairs import join_pairs, split_pairs

RANDOM_TOKENS = 4096
_AT_ONCE = 4096


def with_rounded_cache(block: Attention, rounding: CacheRounding | None) -> Attention:
    """The same block, its parameters shared, with a cache of integers, or None: of numbers."""
    rounded = copy.copy(block)
    rounded._modules = dict(block._modules)
    rounded.cache_rounding = rounding
    return rounded


def calibrated(block: Attention, dtype: str, calibration: Any, *, seed: int) -> CacheRounding:
    """Choose scales such that nothing the inputs bring about is clipped, at any position.

    A rotation keeps the norm of a pair of channels, so that both can come to it, and to no more,
    whatever the position: it is the bound of both.

    Args:
        block: gives the weights.
        dtype: ``"int8"`` or ``"int4"``.
        calibration: hidden states ``[tokens, hidden_size]`` or ``[batch, sequence, hidden_size]``
            as the block meets them, a tensor or an array; None: random ones.
        seed: of random ones.

    Raises:
        BadInputError: the block cannot have such a cache, or the inputs do not fit it.
    """
    refuse_unscalable(block, dtype)
    if calibration is None:
        rng = np.random.default_rng([seed, 1 << 22])
        hidden = draw(rng, block, 1, RANDOM_TOKENS, input_gain(block, seed))[0]
    else:
        hidden = _checked(block, calibration)
    keys = torch.zeros(block.num_kv_heads, block.head_dim)
    values = torch.zeros(block.num_kv_heads, block.value_head_dim)
    with torch.no_grad():
        for part in hidden.split(_AT_ONCE):
            k, v = _reach(block, part)
            keys, values = torch.maximum(keys, k), torch.maximum(values, v)
    largest = 2 ** (BITS[dtype] - 1) - 1
    scales = []
    for kind, bounds in (("keys", keys), ("values", values)):
        if not bool(bounds.isfinite().all()):
            raise BadInputError(
                f"calibration must keep the block's {kind} finite, got some that are not"
            )
        # A channel that is always 0 is 0 with any scale.
        unused = bounds.max()
        smallest = torch.finfo(torch.float32).tiny  # of those whose reciprocal is a number
        scales.append((torch.where(bounds > 0, bounds, unused) / largest).clamp(min=smallest))
    return CacheRounding(dtype, *scales)


def refuse_unscalable(block: Attention, dtype: str) -> None:
    """Refuse a block for which no scales can be chosen.

    Raises:
        BadInputError: the message says why.
    """
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadInputError(f"cache_dtype must be one of {', '.join(BITS)}, got {dtype!r}")
    if block.rope is not None and block.rope.xpos is not None:
        raise BadInputError(
            f"cache_dtype {dtype} needs keys whose size does not follow their position, got xPos: "
            "no scale would hold for all of them"
        )
    for name, width in (("head_dim", block.head_dim), ("value_head_dim", block.value_head_dim)):
        if dtype == "int4" and width % 2:
            raise BadInputError(
                f"{name} must be even with cache_dtype int4, two channels to a byte, got {width}"
            )


def _checked(block: Attention, calibration: Any) -> Tensor:
    wanted = (
        f"calibration must be hidden states [tokens, {block.hidden_size}] or "
        f"[batch, sequence, {block.hidden_size}]"
    )
    try:
        given = torch.as_tensor(calibration)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInputError(f"{wanted}, got {type(calibration).__name__}: {error}") from error
    if given.ndim not in (2, 3) or given.shape[-1] != block.hidden_size or not given.numel():
        raise BadInputError(f"{wanted}, got {list(given.shape)}")
    if not given.is_floating_point():
        name = str(given.dtype).removeprefix("torch.")
        raise BadInputError(f"{wanted} of floating point, got {name}")
    if not bool(given.isfinite().all()):
        raise BadInputError(f"{wanted} that are finite, got NaN or infinity among them")
    return given.detach().reshape(-1, block.hidden_size).to(block.device, block.dtype)


def _reach(block: Attention, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The largest that each channel can come to: ``[heads, width]`` of keys and of values."""
    _, k, v = block.project(hidden.unsqueeze(0))
    keys, values = (
        x[0].unflatten(-1, (block.num_kv_heads, -1)).double() for x in (k, v)
    )  # [tokens, heads, width]
    rope = block.rope
    if rope is not None:
        first, second = split_pairs(keys, rope.dim // 2, rope.layout)
        norm = torch.hypot(first, second) * rope.attention_factor
        keys = torch.cat((join_pairs(norm, norm, rope.layout), keys[..., rope.dim :]), dim=-1)
    return keys.abs().amax(0).float(), values.abs().amax(0).float()
