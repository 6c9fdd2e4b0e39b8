"""Where tokens are: in a call's columns, in the cache, and in the full pass they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.cache_layout import resident

Array = npt.NDArray[Any]
Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Batch rows and columns, one pair a token."""


@dataclass(frozen=True)
class Call:
    """One of several calls that together are a full pass.

    Attributes:
        tokens: ``[B, S, ...]``, zeros at padding.
        position_ids: ``[..., B, S]`` or None.
        mask: ``[B, S]``, 1 for a token.
        at: batch row and column of its tokens.
        of_pass: batch row and place in the full pass of the same.
    """

    tokens: Array
    position_ids: npt.NDArray[np.int64] | None
    mask: npt.NDArray[np.int64]
    at: Places
    of_pass: Places


def calls_of(
    tokens: Array,
    position_ids: Array | None,
    steps: tuple[tuple[int, ...], ...],
    padding: str,
) -> Iterator[Call]:
    """Split a full pass into calls.

    Args:
        tokens: of the full pass, ``[B, T, ...]``.
        position_ids: of the full pass, ``[..., B, T]``, or None.
        steps: how many tokens each row is given in each call.
        padding: the side on which shorter rows are padded.
    """
    batch = tokens.shape[0]
    used = np.zeros(batch, dtype=np.int64)
    for step in steps:
        row, token, column = step_tokens(step, used, padding)
        length = max(step)
        given = np.zeros((batch, length, *tokens.shape[2:]), tokens.dtype)
        given[row, column] = tokens[row, token]
        mask = np.zeros((batch, length), dtype=np.int64)
        mask[row, column] = 1
        ids = None
        if position_ids is not None:
            ids = np.zeros((*position_ids.shape[:-1], length), dtype=np.int64)
            ids[..., row, column] = position_ids[..., row, token]
        yield Call(given, ids, mask, (row, column), (row, token))
        used += np.array(step)


def step_tokens(
    step: tuple[int, ...], used: npt.NDArray[np.int64], padding: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which tokens a call is given: their batch rows, tokens in those, and columns of the call.

    Args:
        step: how many tokens each row is given.
        used: how many it has been given before.
        padding: the side on which shorter rows are padded.
    """
    length = max(step)
    row = np.concatenate([np.full(count, index) for index, count in enumerate(step)])
    nth = np.concatenate([np.arange(count) for count in step])
    pad = length - np.array(step)[row] if padding == "left" else 0
    return row.astype(np.int64), (nth + used[row]).astype(np.int64), (nth + pad).astype(np.int64)


def new_places(mask: npt.NDArray[np.int64], length: int) -> Places:
    """Batch row and column of every new token that is none of padding.

    Args:
        mask: ``[B, T]``.
        length: new columns, the last of the mask.
    """
    row, column = np.nonzero(mask[:, mask.shape[1] - length :])
    return row, column


def cache_places(
    mask: npt.NDArray[np.int64], *, packs_rows: bool, window: int = 0, capacity: int = 0
) -> Places:
    """Batch row and slot in the present of every token that is none of padding, row by row.

    Args:
        mask: ``[B, T]``.
        packs_rows: whether each row's tokens lie from its first slot on.
        window: where a cache holds no more than that, the window: of the tokens that lie in it.
        capacity: slots of such a cache.
    """
    if window:
        totals = mask.astype(bool).sum(axis=1)
        row, token = window_tokens(totals, window, capacity)
        return row, token - (totals - resident(totals, window, capacity))[row]
    row, column = np.nonzero(mask)
    return (row, (np.cumsum(mask, axis=1) - 1)[row, column]) if packs_rows else (row, column)


def window_tokens(totals: npt.NDArray[np.int64], window: int, capacity: int) -> Places:
    """Batch row and number of every token in a cache of the window, row by row.

    Args:
        totals: tokens of each row so far.
        window: of the cache.
        capacity: its slots.
    """
    kept = resident(totals, window, capacity)
    row = np.repeat(np.arange(len(totals)), kept)
    tokens = [np.arange(n - k, n) for n, k in zip(totals, kept, strict=True)]
    return row, np.concatenate([*tokens, np.zeros(0, dtype=np.int64)]).astype(np.int64)


def given_places(steps: tuple[tuple[int, ...], ...]) -> Places:
    """Batch row and place of every token that the steps give."""
    given = [sum(row) for row in zip(*steps, strict=True)]
    row, token, _ = step_tokens(tuple(given), np.zeros(len(given), dtype=np.int64), "right")
    return row, token
