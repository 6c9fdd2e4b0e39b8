"""The shapes an artifact is proven at, none of them the one it was traced at."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rope_export.angles import FINE_ROWS
from rope_export.reference import truth_flops

if TYPE_CHECKING:
    from rope_export.attention import Attention

STORED_BYTES = 64 * 2**20
# Beyond this many operations (about ten seconds of float64 here) truth is sampled.
TRUTH_FLOPS = 1e12
TRACED_BATCH, TRACED_LENGTH = 2, 6


@dataclass(frozen=True)
class Shape:
    """One case before its numbers.

    Attributes:
        name: what it covers.
        batch: rows.
        sequence: tokens in each.
        loud: whether inputs are much larger, so that a weak mask or a clipped score shows.
        every_position_below: with ``position_ids``, whether every position below this occurs; 0
            for positions as callers send them.
        sampled: whether truth is evaluated for some query rows only.
        stored: whether the artifact keeps it as a test vector.
    """

    name: str
    batch: int
    sequence: int
    loud: bool = False
    every_position_below: int = 0
    sampled: bool = False
    stored: bool = True


def plan_shapes(
    block: Attention, *, longest: int, batch: int, static: bool, with_positions: bool
) -> list[Shape]:
    """Choose what to prove, and which of it to store.

    Args:
        block: the block exported.
        longest: longest sequence to run.
        batch: rows of a static graph.
        static: whether the graph has one shape only.
        with_positions: whether ``position_ids`` is an input.
    """
    if static:
        rows = [Shape("fixed", batch, longest), Shape("fixed again", batch, longest)]
        if with_positions:
            rows[0] = replace(rows[0], every_position_below=_table_rows(block, longest))
        return _within_cap(block, [*rows, Shape("fixed, loud", batch, longest, loud=True)], True)
    wanted = [
        Shape("one token", 1, 1),
        Shape("odd length", 1, _odd(min(13, longest))),
        Shape("batch of five", 5, min(32, longest)),
        Shape("loud inputs", 3, min(33, longest), loud=True),
        Shape("middle", 1, _odd(min(longest // 2 + 1, 1537))),
    ]
    if longest > TRACED_LENGTH:
        wanted.append(Shape("two rows", 2, TRACED_LENGTH + 1))
    switch = turning_point(block)
    rows_wanted = _table_rows(block, longest) if with_positions else 0
    if switch is not None:  # either side of it, as close as can be
        if with_positions:
            wanted.append(_covering("up to the switch", longest, switch))
        elif switch <= longest:
            wanted.append(Shape("up to the switch", 1, switch))
        if switch < longest:
            wanted.append(Shape("past the switch", 1, switch + 1))
    wanted.append(_covering("longest", longest, rows_wanted))
    distinct = {(s.batch, s.sequence, s.every_position_below): s for s in wanted}
    return _within_cap(block, list(distinct.values()), with_positions)


def turning_point(block: Attention) -> int | None:
    """The longest sequence the first frequencies serve, or None where they serve all."""
    if block.rope is None:
        return None
    found = block.rope.found
    moving = found.beyond or found.stretch
    return moving.length if moving else None


def _table_rows(block: Attention, longest: int) -> int:
    """How many positions must occur for every row of the block's tables to be read."""
    if block.rope is None:
        return 0
    return block.rope.max_seq_len or max(longest, FINE_ROWS)


def _covering(name: str, longest: int, positions: int) -> Shape:
    """As many rows of ``longest`` tokens as it takes for every position to occur."""
    length = min(longest, positions) if positions else longest
    batch = max(1, math.ceil(positions / length))
    return Shape(name, batch, length, every_position_below=positions)


def _within_cap(block: Attention, shapes: list[Shape], with_positions: bool) -> list[Shape]:
    """Say which shapes are stored; one too long to be is followed by the longest that fits."""
    token_bytes = 2 * block.hidden_size * block.q_proj.weight.element_size() + 8 * with_positions
    affordable = int((TRUTH_FLOPS / truth_flops(block, 1, 1)) ** 0.5)
    left = STORED_BYTES
    planned = []
    # The two ends come first, so that what has to give is the middle.
    for shape in sorted(shapes, key=lambda s: (s.name == "middle", s.batch * s.sequence)):
        size = shape.batch * shape.sequence * token_bytes
        sampled = truth_flops(block, shape.batch, shape.sequence) > TRUTH_FLOPS
        stored = not sampled and size <= left
        if not stored and shape.name == "longest":
            fitting = min(left // token_bytes, affordable, shape.sequence - 1)
            if fitting > 0:
                planned.append(Shape("longest stored", 1, fitting))
                left -= fitting * token_bytes
        planned.append(replace(shape, sampled=sampled, stored=stored))
        left -= size if stored else 0
    return sorted(planned, key=lambda s: s.batch * s.sequence)


def _odd(length: int) -> int:
    return length if length % 2 else length - 1
