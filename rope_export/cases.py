"""The cases an artifact is proven on: shapes never traced, inputs, truth, eager's errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rope_export.comparison import errors_against, tolerance
from rope_export.errors import BadInputError
from rope_export.reference import Semantics, attention_truth, truth_flops
from rope_export.trial import Progress, Trial

if TYPE_CHECKING:
    from rope_export.attention import Attention

Array = npt.NDArray[np.generic]

STORED_BYTES = 64 * 2**20
# Beyond this many operations (about ten seconds of float64 here) truth is sampled.
TRUTH_FLOPS = 1e12
_SAMPLED_ROWS = 16  # at either end, and as many in each of the runs in between
_SAMPLED_RUNS = 14
# Scores of this spread make a proof sharp: flat ones would hide a wrong rotation or scale.
_SCORE_SPREAD = 2.0
# Every example is traced with two rows; no case has two.
TRACED_BATCH = 2
TRACED_LENGTH = 6


@dataclass(frozen=True)
class Shape:
    """One case before its numbers: a name, a batch and a length, and whether it is stored."""

    name: str
    batch: int
    sequence: int
    sampled: bool = False
    stored: bool = True


def plan_shapes(
    block: Attention, *, longest: int, batch: int, static: bool, with_positions: bool
) -> list[Shape]:
    """Choose the shapes to prove, none of them the traced one, and which of them to store.

    Args:
        block: the block exported.
        longest: longest sequence to run.
        batch: rows of a static graph.
        static: whether the graph has one shape only.
        with_positions: whether ``position_ids`` is an input.
    """
    if static:
        shapes = [Shape("fixed", batch, longest), Shape("fixed again", batch, longest)]
    else:
        wanted = [
            Shape("one token", 1, 1),
            Shape("odd length", 1, _odd(min(13, longest))),
            Shape("batch of three", 3, min(33, longest)),
            Shape("middle", 1, _odd(min(longest // 2 + 1, 1537))),
            Shape("longest", 1, longest),
        ]
        switch = None if block.rope is None else block.rope.beyond
        if switch is not None:  # either side of it, as close as can be
            wanted += [
                Shape(name, 1, length)
                for name, length in (
                    ("up to the switch", switch.length),
                    ("past the switch", switch.length + 1),
                )
                if length <= longest
            ]
        shapes = list({(s.batch, s.sequence): s for s in wanted}.values())
    return _within_cap(block, shapes, with_positions=with_positions)


def _within_cap(block: Attention, shapes: list[Shape], *, with_positions: bool) -> list[Shape]:
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


def make_cases(
    block: Attention,
    shapes: list[Shape],
    *,
    seed: int,
    positions: int | None,
    progress: Progress,
) -> list[Trial]:
    """Draw inputs and evaluate truth and eager PyTorch on each shape.

    Args:
        block: the block, in the dtype exported.
        shapes: as planned.
        seed: of the inputs.
        positions: how many positions the graph serves when ``position_ids`` is an input.
        progress: told what is being done.

    Raises:
        BadInputError: the block overflows its own dtype.
    """
    gain = input_gain(block, seed)
    dtype = str(block.q_proj.weight.dtype).removeprefix("torch.")
    cases = []
    for index, shape in enumerate(shapes):
        progress(f"float64 truth and eager PyTorch: {shape.name} [{shape.batch}, {shape.sequence}]")
        rng = np.random.default_rng([seed, index])
        x = _draw(rng, block, shape.batch, shape.sequence, gain)
        ids = None
        if positions is not None:
            switch = None if block.rope is None else block.rope.beyond
            before = switch is not None and index % 2 == 0 and shape.sequence <= switch.length
            limit = min(positions, switch.length) if switch and before else positions
            ids = torch.from_numpy(_draw_positions(rng, shape, limit))
        rows = _sample_rows(rng, shape.sequence) if shape.sampled else None
        truth = attention_truth(block, x, position_ids=ids, rows=rows).numpy()
        eager_output = _eager(block, x, ids, rows).double().numpy()
        eager = errors_against(truth, eager_output)
        if not math.isfinite(eager.rel):
            raise BadInputError(
                f"dtype {dtype} is too narrow for this block: eager PyTorch itself overflows on "
                f"inputs [{shape.batch}, {shape.sequence}] of standard deviation {gain:.2g}"
            )
        inputs: dict[str, Array] = {"hidden_states": to_numpy(x)}
        if ids is not None:
            inputs["position_ids"] = ids.numpy()
        cases.append(
            Trial(
                name=shape.name,
                batch=shape.batch,
                sequence=shape.sequence,
                past=0,
                inputs=inputs,
                truth=truth,
                rows=None if rows is None else rows.numpy(),
                eager=eager,
                tolerance=tolerance(
                    eager,
                    dtype,
                    max(block.hidden_size, block.num_heads * block.head_dim),
                ),
                stored=shape.stored,
            )
        )
    return cases


def input_gain(block: Attention, seed: int) -> float:
    """Standard deviation of the inputs at which the scores spread by about two."""
    x = _draw(np.random.default_rng([seed, 1 << 20]), block, 1, 64, 1.0)
    with torch.no_grad():
        q, k, _ = block.heads(x, position_ids=torch.zeros(64, dtype=torch.int64))
    groups = block.num_heads // block.num_kv_heads
    scores = q.double() @ k.double().repeat_interleave(groups, dim=1).transpose(-1, -2)
    spread = float((scores * block.scale).std())
    if not spread > 0:
        return 1.0
    return float(np.clip((_SCORE_SPREAD / spread) ** 0.5, 1 / 16, 16))


def sensitivities(block: Attention, *, length: int, seed: int) -> dict[str, float]:
    """Relative change of the truth under typical defects: what the proof would have seen."""
    x = _draw(np.random.default_rng([seed, 1 << 21]), block, 1, length, input_gain(block, seed))
    meaning = Semantics.of(block)
    defects: dict[str, Semantics] = {
        "score scale 2 % off": replace(meaning, scale=meaning.scale * 1.02)
    }
    if meaning.inv_freq is not None:
        other = "interleaved" if meaning.layout == "half" else "half"
        if meaning.beyond is not None and length > meaning.beyond.length:
            defects["switch ignored"] = replace(meaning, beyond=None)
        defects["sine negated"] = replace(meaning, inv_freq=-meaning.inv_freq, beyond=None)
        defects["queries one position late"] = replace(meaning, query_shift=1)
        if meaning.attention_factor != 1:
            defects["attention factor dropped"] = replace(meaning, attention_factor=1.0)
        if meaning.inv_freq.shape[0] > 1:
            defects["other pairing"] = replace(meaning, layout=other)
    defects["causal mask flipped"] = replace(meaning, causal=not meaning.causal)
    if meaning.num_kv_heads > 1:
        defects["value heads rolled"] = replace(meaning, value_roll=1)
    truth = attention_truth(block, x).numpy()
    return {
        name: errors_against(truth, attention_truth(block, x, semantics=defect).numpy()).rel
        for name, defect in defects.items()
    }


def to_numpy(x: Tensor) -> Array:
    """Bring a tensor to numpy, bfloat16 included (as ``ml_dtypes.bfloat16``)."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        bits: Array = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: Array = x.numpy()
    return array


def _draw(
    rng: np.random.Generator, block: Attention, batch: int, length: int, gain: float
) -> Tensor:
    normal = rng.standard_normal((batch, length, block.hidden_size), dtype=np.float32)
    return torch.from_numpy(normal * np.float32(gain)).to(block.q_proj.weight.dtype)


def _draw_positions(
    rng: np.random.Generator, shape: Shape, positions: int
) -> npt.NDArray[np.int64]:
    """Positions as callers send them: shifted, packed documents, unordered; the last included."""
    ids = np.empty((shape.batch, shape.sequence), dtype=np.int64)
    for row in range(shape.batch):
        if row % 3 == 0 and shape.sequence < 64:
            ids[row] = rng.integers(0, positions, shape.sequence)
        elif row % 3 == 1:
            ids[row] = np.arange(shape.sequence) + rng.integers(0, positions - shape.sequence + 1)
        else:
            cut = int(rng.integers(0, shape.sequence + 1))
            ids[row] = np.concatenate([np.arange(cut), np.arange(shape.sequence - cut)])
    ids[0, -1] = positions - 1
    return ids


def _sample_rows(rng: np.random.Generator, length: int) -> Tensor:
    """First rows, last rows, and random runs in between, ascending."""
    starts = rng.integers(0, length - _SAMPLED_ROWS, _SAMPLED_RUNS)
    starts = np.concatenate([[0, length - _SAMPLED_ROWS], starts])
    rows = np.unique(starts[:, None] + np.arange(_SAMPLED_ROWS))
    return torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def _eager(block: Attention, x: Tensor, ids: Tensor | None, rows: Tensor | None) -> Tensor:
    """Run the block itself, or its attention for the sampled rows only."""
    if rows is None:
        whole: Tensor = block(x, position_ids=ids)
        return whole
    q, k, v = block.heads(x, position_ids=ids)
    length = x.shape[1]
    outputs = []
    for run in rows.split(_SAMPLED_ROWS):
        seen = int(run[-1]) + 1 if block.causal else length
        mask = torch.arange(seen) <= run.unsqueeze(1) if block.causal else None
        context = block.attend(q[:, :, run], k[:, :, :seen], v[:, :, :seen], mask=mask)
        outputs.append(block.merge(context))
    return torch.cat(outputs, dim=1)
