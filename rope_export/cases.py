"""The cases an artifact is proven on: inputs, float64 truth, and what eager PyTorch achieves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rope_export.angles import COARSE_ROWS, FINE_ROWS
from rope_export.comparison import errors_against, tolerance
from rope_export.errors import BadInputError
from rope_export.reference import Semantics, attention_truth
from rope_export.shapes import Shape
from rope_export.trial import Progress, Trial

if TYPE_CHECKING:
    from rope_export.attention import Attention
    from rope_export.rotary import RotaryEmbedding

Array = npt.NDArray[np.generic]

_SAMPLED_ROWS = 16  # at either end, and as many in each of the runs in between
_SAMPLED_RUNS = 14
# Scores of this spread make a proof sharp: flat ones would hide a wrong rotation or scale.
_SCORE_SPREAD = 2.0
# Inputs so many times larger spread the scores by over a hundred: a weak mask or a clipped score
# shows. Near ties then decide a token, and what eager errs by on it is luck: such a case is held to
# four times as much, still far below what those defects do.
_LOUDNESS = 8.0
_LOUD_ALLOWANCE = 4.0


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
    products = max(block.hidden_size, block.num_heads * block.head_dim)
    axes = 1 if block.rope is None else block.rope.axes
    cases: list[Trial] = []
    widest_row = 0.0
    for index, shape in enumerate(shapes):
        progress(f"float64 truth and eager PyTorch: {shape.name} [{shape.batch}, {shape.sequence}]")
        rng = np.random.default_rng([seed, index])
        deviation = gain * (_LOUDNESS if shape.loud else 1.0)
        x = _draw(rng, block, shape.batch, shape.sequence, deviation)
        ids = None
        if positions is not None and block.rope is not None:
            drawn = [_draw_positions(rng, shape, positions, block.rope) for _ in range(axes)]
            ids = torch.from_numpy(np.stack(drawn) if axes > 1 else drawn[0])
        rows = _sample_rows(rng, shape.sequence) if shape.sampled else None
        truth = attention_truth(block, x, position_ids=ids, rows=rows).numpy()
        eager = errors_against(truth, _eager(block, x, ids, rows).double().numpy())
        if not math.isfinite(eager.rel):
            if shape.loud:
                continue  # beyond what the dtype carries, in PyTorch too
            raise BadInputError(
                f"dtype {dtype} is too narrow for this block: eager PyTorch itself overflows on "
                f"inputs [{shape.batch}, {shape.sequence}] of standard deviation {deviation:.2g}"
            )
        held_to = tolerance(eager, dtype, products)
        if shape.loud:
            held_to = replace(
                held_to, rel=_LOUD_ALLOWANCE * held_to.rel, row=_LOUD_ALLOWANCE * held_to.row
            )
        widest_row = max(widest_row, 0.0 if shape.loud else held_to.row)
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
                tolerance=held_to,
                stored=shape.stored,
            )
        )
    # One token says little about what a token may be off by: all tokens of all cases do.
    return [
        replace(case, tolerance=replace(case.tolerance, row=max(case.tolerance.row, widest_row)))
        for case in cases
    ]


def input_gain(block: Attention, seed: int) -> float:
    """Standard deviation of the inputs at which the scores spread by about two."""
    x = _draw(np.random.default_rng([seed, 1 << 20]), block, 1, 64, 1.0)
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


def sensitivities(block: Attention, *, length: int, seed: int) -> dict[str, float]:
    """Relative change of the truth under typical defects: what the proof would have seen."""
    x = _draw(np.random.default_rng([seed, 1 << 21]), block, 1, length, input_gain(block, seed))
    meaning = Semantics.of(block)
    defects: dict[str, Semantics] = {
        "score scale 2 % off": replace(meaning, scale=meaning.scale * 1.02)
    }
    found = meaning.found
    if found is not None:
        other = "interleaved" if meaning.layout == "half" else "half"
        moving = found.beyond or found.stretch
        if moving is not None and length > moving.length:
            fixed = replace(found, beyond=None, stretch=None)
            defects["length ignored"] = replace(meaning, found=fixed)
        mirrored = replace(found, inv_freq=-found.inv_freq, beyond=None)
        defects["sine negated"] = replace(meaning, found=mirrored)
        defects["queries one position late"] = replace(meaning, query_shift=1)
        if found.attention_factor != 1:
            plain = replace(found, attention_factor=1.0)
            defects["attention factor dropped"] = replace(meaning, found=plain)
        if len(found.inv_freq) > 1:
            defects["other pairing"] = replace(meaning, layout=other)
        if meaning.decay is not None:
            defects["xPos dropped"] = replace(meaning, decay=None)
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


def _axes(block: Attention) -> tuple[int, ...]:
    """Leading axes of position_ids."""
    return (block.rope.axes,) if block.rope is not None and block.rope.axes > 1 else ()


def _draw(
    rng: np.random.Generator, block: Attention, batch: int, length: int, gain: float
) -> Tensor:
    normal = rng.standard_normal((batch, length, block.hidden_size), dtype=np.float32)
    return torch.from_numpy(normal * np.float32(gain)).to(block.q_proj.weight.dtype)


def _draw_positions(
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
