"""The shapes an artifact is proven at, none of them the one it was traced at."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from rope_export.attention.block import Attention
from rope_export.exporting.block import TRACED_LENGTH
from rope_export.lowering.situation import BLOCKS_TO_WIN, SMALLEST_BLOCK
from rope_export.proof.limits import STORED_BYTES, TRUTH_FLOPS
from rope_export.proof.reference import truth_flops
from rope_export.rope.angles import FINE_ROWS

# Of a cache of the window, none that it was traced with.
_SLACKS = (0, 1, 3, 0, 17)


@dataclass(frozen=True)
class Shape:
    """One case before its numbers.

    Attributes:
        name: what it covers.
        batch: rows.
        sequence: new tokens in each.
        pasts: cached tokens of each row before them; empty without a cache.
        lengths: new tokens of each row that are no padding; empty when none is.
        steps: when not empty, one full pass that is run in several calls: how many tokens each row
            is given in each.
        loud: whether inputs are much larger, so that a weak mask or a clipped score shows.
        every_position_below: with ``position_ids``, whether every position below this occurs; 0
            for positions as callers send them.
        positions_below: with ``position_ids``, all are below this; 0: any that is served.
        sampled: whether truth is evaluated for some query rows only.
        stored: whether the artifact keeps it as a test vector.
        slack: slots of a cache of the window beside the window itself.
    """

    name: str
    batch: int
    sequence: int
    pasts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()
    loud: bool = False
    every_position_below: int = 0
    positions_below: int = 0
    sampled: bool = False
    stored: bool = True
    slack: int = 0

    @property
    def past(self) -> int:
        """Cached tokens of the longest row."""
        return max(self.pasts, default=0)

    @property
    def total(self) -> int:
        """Cached and new tokens of the longest row."""
        return self.past + self.sequence

    @property
    def uniform(self) -> bool:
        """Whether all rows have as many tokens, before and now."""
        return len(set(self.pasts)) <= 1 and not self.lengths


def plan_shapes(
    block: Attention,
    *,
    longest: int,
    batch: int,
    static: bool,
    with_positions: bool,
    cache: bool = False,
    mask: bool = False,
    by_rows: bool = True,
    window_cache: bool = False,
    one_size: bool = False,
    one_length: bool = False,
    longest_whole: int = 0,
) -> list[Shape]:
    """Choose what to prove, and which of it to store.

    Args:
        block: the block exported.
        longest: longest sequence to run.
        batch: rows of a static graph.
        static: whether the graph has one shape only.
        with_positions: whether ``position_ids`` is an input.
        cache: whether past and present are.
        mask: whether ``attention_mask`` is.
        by_rows: whether several new tokens of a batch with a past are one call.
        window_cache: whether the cache holds the window only.
        one_size: whether it has no more slots than that.
        one_length: whether all new tokens of a call must be real.
        longest_whole: tokens of the longest call that is not computed by blocks of queries, or 0.
    """
    if static:
        rows = [Shape("fixed", batch, longest), Shape("fixed again", batch, longest)]
        if with_positions:
            rows[0] = replace(rows[0], every_position_below=_table_rows(block, longest))
        if mask:
            lengths = tuple(max(1, longest - row % longest - longest // 3) for row in range(batch))
            rows.append(Shape("fixed, padded", batch, longest, lengths=lengths))
        rows.append(Shape("fixed, loud", batch, longest, loud=True))
        return _within_cap(block, rows, with_positions, cache)
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
    wanted += _by_window(block, longest, cache=cache)
    # Frequencies that follow the length follow that of the call, which other rows and later calls
    # do not share: with positions of any size, such rows stay where frequencies do not move.
    together = longest if switch is None else min(longest, switch)
    apart: list[Shape] = []
    if mask:
        length = min(13, together if with_positions else longest)
        lengths = tuple(min(length, n) for n in (13, 1, 7, 12))
        apart.append(Shape("rows of different lengths", 4, length, lengths=lengths))
        length = longest_whole + 2
        if longest_whole and length <= (together if with_positions else longest):
            lengths = (length, length // 2, length - 1, 1)
            apart.append(Shape("blocks of queries, padded", 4, length, lengths=lengths))
    if cache:
        in_step, rows = _with_past(longest, together, by_rows=by_rows)
        wanted += in_step
        apart += [*rows, *_in_calls(min(32, together), longest, with_rows=by_rows)]
    if window_cache:
        far, rows = _far_beyond(block, longest, together, by_rows=by_rows)
        wanted += far
        apart += rows
    if with_positions and switch is not None:
        apart = [replace(shape, positions_below=together) for shape in apart]
    wanted += apart
    if window_cache and not one_size:
        wanted = [
            replace(shape, slack=_SLACKS[index % len(_SLACKS)])
            for index, shape in enumerate(wanted)
        ]
    if one_length:
        wanted = [s for s in wanted if not s.lengths and all(len(set(n)) == 1 for n in s.steps)]
    distinct = {
        (
            s.batch,
            s.sequence,
            s.pasts,
            s.lengths,
            s.steps,
            s.every_position_below,
            s.positions_below,
        ): s
        for s in wanted
    }
    return _within_cap(block, list(distinct.values()), with_positions, cache)


def _by_window(block: Attention, longest: int, *, cache: bool) -> list[Shape]:
    """Either side of the window, and of the length from which it is computed by blocks."""
    window = block.window
    if window is None:
        return []
    limit = BLOCKS_TO_WIN * max(window, SMALLEST_BLOCK)
    shapes = [
        Shape("blocks of the window", 2, length)
        for length in (limit, limit + 2)
        if length <= longest
    ]
    if window < longest:
        shapes.append(Shape("one more than the window", 1, window + 1))
    if cache:
        shapes += [
            Shape(f"decode, {place} the window", 1, 1, pasts=(past,))
            for place, past in (("below", window - 1), ("at", window), ("above", window + 1))
            if past < longest
        ]
        if window + 3 <= longest:
            shapes.append(Shape("chunk across the window", 1, 4, pasts=(window - 1,)))
        if limit + 2 <= longest:  # blocks into a longer buffer, and a chunk that must not be blocks
            steps = ((limit + 1,) * 2, (1, 1))
            shapes.append(Shape("blocks of the window, then decode", 2, limit + 2, steps=steps))
        if limit + 8 <= longest:
            shapes.append(Shape("long chunk", 1, limit + 1, pasts=(7,)))
    return shapes


def _far_beyond(
    block: Attention, longest: int, together: int, *, by_rows: bool
) -> tuple[list[Shape], list[Shape]]:
    """Many windows on, where a cache holds but the last: rows in step, and rows that are not."""
    window = block.window
    assert window is not None
    far = min(longest - 6, 10 * window + 3)
    shapes = [
        *(Shape("decode, windows on", 1, 1, pasts=(far + extra,)) for extra in range(4)),
        Shape("decode of a batch, windows on", 3, 1, pasts=(far, far, far)),
        Shape("chunk, windows on", 1, 4, pasts=(far,)),
    ]
    before = min(far, longest - window - 9)
    if before > 0:
        shapes.append(Shape("chunk longer than the window", 1, window + 9, pasts=(before,)))
    of_rows = min(far, together - 6)
    rows = [Shape("decode, rows windows apart", 3, 1, pasts=(of_rows, window - 1, of_rows // 2))]
    if by_rows:
        chunk = Shape("padded chunk, windows on", 3, 5, pasts=rows[0].pasts, lengths=(2, 5, 1))
        rows.append(chunk)
    length = min(longest, together, max(10 * min(window, 60) + 7, min(window, 1024) + 40))
    rows += _in_calls_of_windows(window, length, longest, with_rows=by_rows)
    return (
        [s for s in shapes if far > 0 and s.total <= longest],
        [s for s in rows if of_rows > 0 and s.total <= longest],
    )


def _in_calls_of_windows(window: int, length: int, longest: int, *, with_rows: bool) -> list[Shape]:
    """Chunks about as long as the window, with tokens between them, in several calls."""
    count = 3
    tokens: list[tuple[int, ...]] = [(1,) * count] * 3
    sizes = (window + 1, max(1, window // 2), min(2 * window, window + 64))
    ragged: list[tuple[int, ...]] = [
        (window + 1, 1, window // 2 + 1),
        (1, window, 2),
        (3, 2, window + 2),
    ]
    plans = {"chunks and tokens": [(size,) * count for size in sizes]}
    if with_rows:
        plans["chunks and tokens, rows of different lengths"] = ragged
    shapes = [Shape("batch of three", count, length)]
    for name, chunks in plans.items():
        steps: list[tuple[int, ...]] = []
        used = [0] * count
        for step in itertools.cycle([*tokens, *chunks] if with_rows else tokens):
            if not steps:
                step = chunks[0]
            columns = sum(max(each) for each in (*steps, step))
            most = max(n + s for n, s in zip(used, step, strict=True))
            if most > length or columns > longest:
                break
            used = [n + s for n, s in zip(used, step, strict=True)]
            steps.append(step)
        if steps:
            shapes.append(Shape(name, count, length, steps=tuple(steps)))
    return shapes


def _with_past(longest: int, together: int, *, by_rows: bool) -> tuple[list[Shape], list[Shape]]:
    """One call each, its past given: rows in step, and rows that are not."""
    wanted = [
        Shape("decode after one", 2, 1, pasts=(1, 1)),
        Shape("decode", 2, 1, pasts=(16, 16)),
        Shape("decode, loud", 2, 1, pasts=(21, 21), loud=True),
        Shape("decode at capacity", 1, 1, pasts=(longest - 1,)),
        Shape("chunk", 1, 5, pasts=(9,)),
        Shape("chunk up to capacity", 1, 3, pasts=(longest - 3,)),
    ]
    shapes = [s for s in wanted if min(s.pasts) >= 0 and s.total <= longest]
    rows = [Shape("decode, rows of different lengths", 3, 1, pasts=(14, 3, 9))]
    if by_rows:
        rows += [
            Shape("chunk of a batch", 3, 4, pasts=(9, 9, 9)),
            Shape("chunk, rows of different lengths", 3, 6, pasts=(11, 2, 6)),
            Shape("padded chunk", 3, 6, pasts=(11, 2, 6), lengths=(4, 6, 1)),
        ]
    return shapes, [s for s in rows if s.total <= together]


def _in_calls(length: int, longest: int, *, with_rows: bool) -> list[Shape]:
    """A batch of five, and again in several calls: chunks and tokens, rows in and out of step."""
    rows = 5
    if length < 8:
        return []
    third = length // 3
    chunks = [third, third] if with_rows else [third]
    wanted = [
        [*((n,) * rows for n in chunks), *[(1,) * rows] * min(8, length - sum(chunks))],
        [(third, 1, third // 2 + 1, third, 2), *[(1,) * rows] * min(6, length - third)],
    ]
    if with_rows:
        wanted.append([(2, third, 1, 3, third), (third, 1, 4, 2, 3), (1,) * rows, (1,) * rows])
    names = ("prefill and decode", "prefill and decode, rows of different lengths", "padded chunks")
    return [
        Shape("batch of five", rows, length),
        *(
            Shape(name, rows, length, steps=tuple(steps))
            for name, steps in zip(names, wanted, strict=False)
            if sum(max(step) for step in steps) <= longest
        ),
    ]


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


def _within_cap(
    block: Attention, shapes: list[Shape], with_positions: bool, cache: bool
) -> list[Shape]:
    """Say which shapes are stored; one too long to be is followed by the longest that fits."""
    element = block.o_proj.weight.element_size()
    cached_bytes = block.num_kv_heads * (block.head_dim + block.value_head_dim) * element * cache
    token_bytes = 2 * block.hidden_size * element + 8 * with_positions + cached_bytes
    affordable = int((TRUTH_FLOPS / truth_flops(block, 1, 1)) ** 0.5)
    left = STORED_BYTES
    planned = []

    def work(shape: Shape) -> int:
        return shape.batch * (shape.total if shape.past else shape.sequence)

    # The two ends come first, so that what has to give is the middle.
    for shape in sorted(shapes, key=lambda s: (s.name == "middle", work(s))):
        size = shape.batch * (shape.sequence * token_bytes + 2 * shape.past * cached_bytes)
        sampled = not shape.past and truth_flops(block, shape.batch, shape.sequence) > TRUTH_FLOPS
        stored = not sampled and size <= left and not shape.lengths
        if not stored and shape.name == "longest":
            fitting = min(left // token_bytes, affordable, shape.sequence - 1)
            if fitting > 0:
                planned.append(Shape("longest stored", 1, fitting))
                left -= fitting * token_bytes
        planned.append(replace(shape, sampled=sampled, stored=stored))
        left -= size if stored and not shape.steps else 0
    return sorted(planned, key=lambda s: (bool(s.steps), work(s)))


def _odd(length: int) -> int:
    return length if length % 2 else length - 1
