"""Random inputs: loud enough to make a proof sharp, and positions as callers send them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rope_export.attention.block import Attention
from rope_export.proof.block_shapes import Shape
from rope_export.rope.angles import COARSE_ROWS, FINE_ROWS
from rope_export.rope.embedding import RotaryEmbedding

RUN = 16
"""Rows sampled at either end of a long sequence, and in each of the runs in between."""
_RUNS = 14
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


def draw_positions(
    rng: np.random.Generator, shape: Shape, positions: int, rope: RotaryEmbedding
) -> npt.NDArray[np.int64]:
    """Every position in some order where the shape asks for it, else positions as callers send."""
    if shape.every_position_below:
        return _every_position(rng, shape, positions, rope)
    ids = np.empty((shape.batch, shape.sequence), dtype=np.int64)
    for row in range(shape.batch):
        if row % 3 == 0:
            ids[row] = rng.integers(0, positions, shape.sequence)
        elif row % 3 == 1:  # the continuation of an earlier part
            ids[row] = np.arange(shape.sequence) + rng.integers(0, positions - shape.sequence + 1)
        else:  # two documents in one row
            cut = int(rng.integers(0, shape.sequence + 1))
            ids[row] = np.concatenate([np.arange(cut), np.arange(shape.sequence - cut)])
    ids[0, -1] = positions - 1
    return ids


def _every_position(
    rng: np.random.Generator, shape: Shape, positions: int, rope: RotaryEmbedding
) -> npt.NDArray[np.int64]:
    """Positions that read every row of every table, in random order."""
    count = shape.batch * shape.sequence
    drawn = rng.permutation(shape.every_position_below)
    if rope.angles.coarse_cos is not None:  # two tables, composed: run through both
        drawn = drawn % FINE_ROWS + FINE_ROWS * (drawn % COARSE_ROWS)
    more = rng.choice(drawn, max(0, count - len(drawn)))
    ids = np.concatenate([drawn, more])[:count].astype(np.int64)
    if shape.name == "longest" and positions - 1 not in ids:
        ids[-1] = positions - 1
    return ids.reshape(shape.batch, shape.sequence)


def sample_rows(rng: np.random.Generator, length: int) -> Tensor:
    """First rows, last rows, and random runs in between, ascending."""
    starts = rng.integers(0, length - RUN, _RUNS)
    starts = np.concatenate([[0, length - RUN], starts])
    rows = np.unique(starts[:, None] + np.arange(RUN))
    return torch.from_numpy(rows.astype(np.int64))
