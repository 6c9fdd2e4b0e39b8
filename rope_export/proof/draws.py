"""Random positions, as callers send them, and the rows of long sequences that are looked at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rope_export.proof.block_shapes import Shape
from rope_export.rope.angles import COARSE_ROWS, FINE_ROWS
from rope_export.rope.embedding import RotaryEmbedding

RUN = 16
"""Rows sampled at either end of a long sequence, and in each of the runs in between."""
_RUNS = 14


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
