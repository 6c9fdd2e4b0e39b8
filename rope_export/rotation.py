"""Applying a rotation: pure tensor functions, both pairings, any rotated width."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout) -> Tensor:
    """Rotate the first ``r`` channels of every head and pass the rest through.

    The arithmetic is float32 for narrower inputs; the result returns in the input's dtype.
    ``layout="half"`` pairs channel ``i`` with ``i + r/2`` (Llama, GPT-NeoX),
    ``"interleaved"`` pairs ``2i`` with ``2i + 1`` (RoFormer, GPT-J).

    Args:
        x: ``[..., D]`` with ``D >= r``.
        cos: ``[..., r / 2]``, broadcastable against ``x`` without its last axis.
        sin: as ``cos``.
        layout: which channels form a pair.

    Returns:
        a tensor shaped and typed like ``x``.
    """
    half = cos.shape[-1]
    width = 2 * half
    turning = x[..., :width]
    if turning.dtype in (torch.float16, torch.bfloat16):
        turning = turning.float()
    if layout == "half":
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned = turned.flatten(-2)
    turned = turned.to(x.dtype)
    if width == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., width:]), dim=-1)
