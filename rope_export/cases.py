"""The cases an artifact is proven on: inputs, float64 truth, and what eager PyTorch achieves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rope_export.angles import COARSE_ROWS, FINE_ROWS
from rope_export.comparison import Bound, errors_against, tolerance
from rope_export.errors import BadInputError
from rope_export.reference import Semantics, attention_truth, keys_and_values
from rope_export.scores import visible_keys
from rope_export.shapes import Shape
from rope_export.trial import (
    OUTPUT,
    PRESENTS,
    Expected,
    Places,
    Progress,
    Trial,
    cache_places,
    given_places,
    step_tokens,
)

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
_MANY_TOKENS = 16


@dataclass(frozen=True)
class Interface:
    """What the graph takes beside the hidden states.

    Attributes:
        positions: how many positions it serves when ``position_ids`` is an input, else None.
        cache: whether past and present are.
        mask: whether ``attention_mask`` is.
        padding: the side on which prompts are padded.
        packs_rows: whether the present has each row's tokens from its first slot on.
    """

    positions: int | None = None
    cache: bool = False
    mask: bool = False
    padding: str = "right"
    packs_rows: bool = False


def make_cases(
    block: Attention,
    shapes: list[Shape],
    *,
    seed: int,
    interface: Interface,
    progress: Progress,
) -> list[Trial]:
    """Draw inputs and evaluate truth and eager PyTorch on each shape.

    Args:
        block: the block, in the dtype exported.
        shapes: as planned; one in several calls comes after the full pass it repeats.
        seed: of the inputs.
        interface: of the graph.
        progress: told what is being done.

    Raises:
        BadInputError: the block overflows its own dtype.
    """
    gain = input_gain(block, seed)
    cases: list[Trial] = []
    loudness: list[bool] = []
    widest: dict[tuple[str, bool], float] = {}
    for index, shape in enumerate(shapes):
        progress(f"float64 truth and eager PyTorch: {shape.name} [{shape.batch}, {shape.sequence}]")
        if shape.steps:
            whole = next(
                case
                for case in cases
                if (case.batch, case.sequence, case.past) == (shape.batch, shape.sequence, 0)
                and len(case.expected[OUTPUT].truth) == shape.batch * shape.sequence
                and not case.steps
                and case.name != "loud inputs"
            )
            trial = _in_calls(block, shape, whole, interface)
        else:
            rng = np.random.default_rng([seed, index])
            deviation = gain * (_LOUDNESS if shape.loud else 1.0)
            single = _Single(block, shape, interface, rng, deviation)
            made = single.trial()
            if made is None and shape.loud:
                continue  # beyond what the dtype carries, in PyTorch too
            if made is None:
                dtype = str(block.dtype).removeprefix("torch.")
                raise BadInputError(
                    f"dtype {dtype} is too narrow for this block: eager PyTorch itself overflows "
                    f"on inputs [{shape.batch}, {shape.sequence}] of standard deviation "
                    f"{deviation:.2g}"
                )
            trial = made
        for name, expected in trial.expected.items():
            row = expected.bound.tolerance.row
            widest[name, shape.loud] = max(widest.get((name, shape.loud), 0.0), row)
        cases.append(trial)
        loudness.append(shape.loud)
    return [
        _with_widest(case, widest, loud=loud) for case, loud in zip(cases, loudness, strict=True)
    ]


def _with_widest(case: Trial, widest: dict[tuple[str, bool], float], *, loud: bool) -> Trial:
    """One token says little about what a token may be off by: all tokens of all cases do.

    The same holds of a handful of loud ones taken together: whether one of them is near a tie,
    where rounding is amplified, is a matter of luck.
    """
    expected = {}
    for name, part in case.expected.items():
        held_to = part.bound.tolerance
        row = max(held_to.row, widest.get((name, loud), 0.0))
        few = loud and len(part.truth) < _MANY_TOKENS
        held_to = replace(held_to, row=row, rel=max(held_to.rel, row) if few else held_to.rel)
        expected[name] = replace(part, bound=replace(part.bound, tolerance=held_to))
    return replace(case, expected=expected)


def _expected(
    block: Attention, truth: Array, eager: Array, at: Places, *, loud: bool
) -> Expected | None:
    """How close is close enough, or None when eager PyTorch itself is not finite."""
    dtype = str(block.dtype).removeprefix("torch.")
    products = max(block.hidden_size, block.num_heads * block.value_head_dim)
    exact = np.ascontiguousarray(truth, dtype=np.float64)
    errors = errors_against(exact, eager)
    if not math.isfinite(errors.rel):
        return None
    held_to = tolerance(errors, dtype, products)
    if loud:
        held_to = replace(
            held_to, rel=_LOUD_ALLOWANCE * held_to.rel, row=_LOUD_ALLOWANCE * held_to.row
        )
    return Expected(exact, at, Bound(errors, held_to))


class _Single:
    """One call of the block on inputs of one shape.

    Every row is a sequence of its own without padding, ``tokens``; the call gets what lies after
    the row's past, in columns padded to one length.
    """

    def __init__(
        self,
        block: Attention,
        shape: Shape,
        interface: Interface,
        rng: np.random.Generator,
        deviation: float,
    ) -> None:
        self.block, self.shape, self.interface = block, shape, interface
        batch, length = shape.batch, shape.sequence
        pasts = np.array(shape.pasts or (0,) * batch)
        lengths = np.array(shape.lengths or (length,) * batch)
        self.pasts, self.totals = pasts, pasts + lengths
        self.tokens = _draw(rng, block, batch, int(self.totals.max()), deviation)
        self.ids = None
        rope = block.rope
        if interface.positions is not None and rope is not None:
            reach = replace(shape, sequence=self.tokens.shape[1])
            drawn = [_draw_positions(rng, reach, interface.positions, rope) for _ in _axes_of(rope)]
            self.ids = torch.from_numpy(np.stack(drawn) if rope.axes > 1 else drawn[0])
        self.rows = _sample_rows(rng, length) if shape.sampled else None
        nothing = np.zeros(batch, dtype=np.int64)
        # Columns of the past and of the call, and the tokens in them.
        self.old = step_tokens(tuple(pasts.tolist()), nothing, interface.padding)
        self.new = step_tokens(tuple(lengths.tolist()), pasts, interface.padding)
        self.mask = np.zeros((batch, shape.total), dtype=np.int64)
        self.mask[self.old[0], self.old[2]] = 1
        self.mask[self.new[0], self.new[2] + shape.past] = 1
        # What stands at padding must not matter.
        self.hidden = _draw(rng, block, batch, length, deviation)
        row, token, column = (torch.from_numpy(part) for part in self.new)
        self.hidden[row, column] = self.tokens[row, token]
        self.junk = _draw(rng, block, batch, 1, deviation)

    def trial(self) -> Trial | None:
        """The case, or None when eager PyTorch overflows."""
        shape, interface = self.shape, self.interface
        inputs: dict[str, Array] = {"hidden_states": to_numpy(self.hidden)}
        new_ids = None
        if self.ids is not None:
            new_ids = torch.zeros(*self.ids.shape[:-1], shape.sequence, dtype=torch.int64)
            row, token, column = (torch.from_numpy(part) for part in self.new)
            new_ids[..., row, column] = self.ids[..., row, token]
            inputs["position_ids"] = new_ids.numpy()
        past = None
        exact: tuple[Tensor, Tensor] | None = None
        if interface.cache:
            exact = self._exact_cache()
            inputs |= self._past(exact, packs_rows=interface.packs_rows)
            past = self._past(exact, packs_rows=False)
        if interface.mask:
            inputs["attention_mask"] = self.mask
        truth = self._truth()
        eager, present = self._eager(new_ids, past)
        parts = {OUTPUT: _expected(self.block, truth, eager, self._compared(), loud=shape.loud)}
        if exact is not None:
            parts |= self._presents(exact, present)
        expected = {name: part for name, part in parts.items() if part is not None}
        if len(expected) < len(parts):
            return None
        outputs = self._outputs(inputs, expected) if shape.stored else {}
        return Trial(
            name=shape.name,
            batch=shape.batch,
            sequence=shape.sequence,
            past=shape.past,
            inputs=inputs,
            expected=expected,
            outputs=outputs,
        )

    def _calls(self) -> tuple[int, ...]:
        return (self.shape.past,) if self.shape.past else ()

    def _compared(self) -> Places:
        """Batch row and column of the tokens whose output is compared."""
        row, _, column = self.new
        if self.rows is None:
            return row, column
        picked = np.isin(column, self.rows.numpy())
        return row[picked], column[picked]

    def _truth(self) -> Array:
        """Float64 outputs of the tokens compared, ``[tokens, hidden]``."""
        block, tokens, ids, shape = self.block, self.tokens, self.ids, self.shape
        if shape.uniform:
            rows = self.rows
            if rows is None:
                rows = torch.arange(shape.past, tokens.shape[1])
            picked = None if len(rows) == tokens.shape[1] else rows
            truth = attention_truth(
                block, tokens, position_ids=ids, rows=picked, calls=self._calls()
            )
            return truth.flatten(0, 1).numpy()
        parts = []
        for index, (past, total) in enumerate(zip(self.pasts, self.totals, strict=True)):
            of_row = None if ids is None else ids[..., index : index + 1, :total]
            row = tokens[index : index + 1, :total]
            rows = torch.arange(int(past), int(total))
            parts.append(attention_truth(block, row, position_ids=of_row, rows=rows)[0])
        return torch.cat(parts).numpy()

    def _exact_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens in float64, ``[B, G, tokens, width]``."""
        return keys_and_values(self.block, self.tokens, position_ids=self.ids, calls=self._calls())

    def _past(self, exact: tuple[Tensor, Tensor], *, packs_rows: bool) -> dict[str, Array]:
        """Past keys and values in the block's dtype, with junk at padding."""
        past = {}
        row, token, column = (torch.from_numpy(part) for part in self.old)
        slot = token if packs_rows else column
        for name, tensor in zip(("past_key", "past_value"), exact, strict=True):
            of_dtype = tensor.to(self.tokens.dtype)
            width = tensor.shape[-1]
            filled = self.junk[:, :, :1, None].expand(-1, tensor.shape[1], self.shape.past, width)
            filled = filled.clone()
            filled[row, :, slot] = of_dtype[row, :, token]
            past[name] = to_numpy(filled)
        return past

    @torch.no_grad()
    def _eager(
        self, new_ids: Tensor | None, past: dict[str, Array] | None
    ) -> tuple[Array, tuple[Tensor, Tensor] | None]:
        """Eager PyTorch: outputs compared, and its present with the columns of the mask."""
        block, shape = self.block, self.shape
        if shape.uniform and not shape.past:
            output = _eager(block, self.hidden, new_ids, self.rows)
            present = None
            if past is not None:
                _, k, v = block.heads(self.hidden, position_ids=new_ids)
                present = k, v
            return output.flatten(0, 1).double().numpy(), present
        mask = torch.from_numpy(self.mask)
        present = None
        if past is None:
            output = block(self.hidden, position_ids=new_ids, attention_mask=mask)
        else:
            given = tuple(from_numpy(array) for array in past.values())
            output, present = block(
                self.hidden, position_ids=new_ids, past=given, attention_mask=mask
            )
        row, column = (torch.from_numpy(part) for part in self._compared())
        return output[row, column].double().numpy(), present

    def _presents(
        self, exact: tuple[Tensor, Tensor], present: tuple[Tensor, Tensor] | None
    ) -> dict[str, Expected | None]:
        assert present is not None
        at = cache_places(self.mask, packs_rows=self.interface.packs_rows)
        at_columns = cache_places(self.mask, packs_rows=False)
        row, nth = cache_places(self.mask, packs_rows=True)
        if self.rows is not None:  # a sample of a long prompt
            picked = np.isin(nth, self.rows.numpy())
            at, at_columns = ((places[0][picked], places[1][picked]) for places in (at, at_columns))
            row, nth = row[picked], nth[picked]
        expected = {}
        for name, tensor, eager in zip(PRESENTS, exact, present, strict=True):
            truth = tensor[row, :, nth].flatten(1).numpy()
            got = eager[at_columns[0], :, at_columns[1]].flatten(1).double().numpy()
            expected[name] = _expected(self.block, truth, got, at, loud=self.shape.loud)
        return expected

    def _outputs(self, inputs: dict[str, Array], expected: dict[str, Expected]) -> dict[str, Array]:
        """Whole graph outputs; a packed present has zeros behind the tokens of a shorter row."""
        dtype = inputs["hidden_states"].dtype
        shape = self.shape
        output = np.zeros((shape.batch, shape.sequence, self.block.hidden_size), dtype)
        output[expected[OUTPUT].at] = expected[OUTPUT].truth.astype(dtype)
        outputs: dict[str, Array] = {OUTPUT: output}
        for name in PRESENTS:
            if name not in expected:
                continue
            past = inputs[name.replace("present", "past")]
            batch, heads, earlier, width = past.shape
            present: Array = np.zeros((batch, heads, shape.total, width), dtype)
            if not self.interface.packs_rows:
                present[:, :, :earlier] = past
            row, slot = expected[name].at
            values = expected[name].truth.astype(dtype).reshape(len(row), heads, width)
            present[row, :, slot] = values
            outputs[name] = present
        return outputs


def _in_calls(block: Attention, shape: Shape, whole: Trial, interface: Interface) -> Trial:
    """A full pass once more, in several calls with a cache between them."""
    hidden = from_numpy(whole.inputs["hidden_states"])
    ids = whole.inputs.get("position_ids")
    at = given_places(shape.steps)
    answers = torch.zeros_like(hidden)
    mask = np.zeros((shape.batch, 0), dtype=np.int64)
    past = block.empty_cache(shape.batch)
    used = np.zeros(shape.batch, dtype=np.int64)
    for step in shape.steps:
        row, token, column = step_tokens(step, used, interface.padding)
        length = max(step)
        x = torch.zeros(shape.batch, length, hidden.shape[-1], dtype=hidden.dtype)
        x[row, column] = hidden[row, token]
        new = np.zeros((shape.batch, length), dtype=np.int64)
        new[row, column] = 1
        mask = np.concatenate((mask, new), axis=1)
        new_ids = None
        if ids is not None:
            placed = np.zeros((*ids.shape[:-1], length), dtype=np.int64)
            placed[..., row, column] = ids[..., row, token]
            new_ids = torch.from_numpy(placed)
        with torch.no_grad():
            y, past = block(
                x, position_ids=new_ids, past=past, attention_mask=torch.from_numpy(mask)
            )
        answers[row, token] = y[row, column]
        used += np.array(step)
    of_whole = whole.expected[OUTPUT]
    truth = np.zeros((shape.batch, shape.sequence, hidden.shape[-1]))
    truth[of_whole.at] = of_whole.truth
    eager = answers[at].double().numpy()
    expected = _expected(block, truth[at], eager, at, loud=False)
    assert expected is not None  # the full pass was finite
    return replace(whole, name=shape.name, expected={OUTPUT: expected}, steps=shape.steps)


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
    if meaning.window is not None:
        defects["window one token wider"] = replace(meaning, window=meaning.window + 1)
    if meaning.softcap is not None:
        defects["soft cap dropped"] = replace(meaning, softcap=None)
    if meaning.sinks is not None:
        defects["sinks dropped"] = replace(meaning, sinks=None)
    if meaning.norm_eps is not None:
        defects["query and key norms dropped"] = replace(meaning, norm_eps=None)
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


def from_numpy(array: Array) -> Tensor:
    """The other way round."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _axes_of(rope: RotaryEmbedding) -> range:
    return range(rope.axes)


def _axes(block: Attention) -> tuple[int, ...]:
    """Leading axes of position_ids."""
    return (block.rope.axes,) if block.rope is not None and block.rope.axes > 1 else ()


def _draw(
    rng: np.random.Generator, block: Attention, batch: int, length: int, gain: float
) -> Tensor:
    normal = rng.standard_normal((batch, length, block.hidden_size), dtype=np.float32)
    return torch.from_numpy(normal * np.float32(gain)).to(block.dtype)


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
        visible = visible_keys(run, torch.arange(seen), causal=block.causal, window=block.window)
        context = block.attend(q[:, :, run], k[:, :, :seen], v[:, :, :seen], visible=visible)
        outputs.append(block.merge(context))
    return torch.cat(outputs, dim=1)
