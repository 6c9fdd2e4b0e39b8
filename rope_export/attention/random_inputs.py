"""Random hidden states, as loud as it takes for the scores of a block to spread."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rope_export.attention.block import Attention

# Scores of this spread make a proof sharp: flat ones would hide a wrong rotation or scale.
_SCORE_SPREAD = 2.0


def input_gain(block: Attention, seed: int) -> float:
    """Standard deviation of the inputs at which the scores spread by about two."""
    x = draw(np.random.default_rng([seed, 1 << 20]), block, 1, 64, 1.0)
    with torch.no_grad():
        q, k, _ = block.heads(
            x, position_ids=torch.zeros((*_axes(block), 1, 64), dtype=torch.int64)
        )
    groups = block.num_heads // block.num_kv_heads
    scores = q.double() @ k.double().repeat_interleave(groups, dim=1).transpose(-1, -2)
    spread = float((scores * block.scale).std())
    if not spread > 0:
        return 1.0
    return float(np.clip((_SCORE_SPREAD / spread) ** 0.5, 1 / 16, 16))


def _axes(block: Attention) -> tuple[int, ...]:
    """Leading axes of position_ids."""
    return (block.rope.axes,) if block.rope is not None and block.rope.axes > 1 else ()


def draw(
    rng: np.random.Generator, block: Attention, batch: int, length: int, gain: float
) -> Tensor:
    """Draw hidden states ``[batch, length, hidden]`` of standard deviation ``gain``."""
    normal = rng.standard_normal((batch, length, block.hidden_size), dtype=np.float32)
    return torch.from_numpy(normal * np.float32(gain)).to(block.dtype)
