"""One call of a block: its inputs, float64 truth, and what eager PyTorch achieves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rope_export.artifacts.cache_layout import resident
from rope_export.artifacts.comparison import errors_against
from rope_export.attention.block import Attention
from rope_export.attention.random_inputs import draw
from rope_export.attention.visibility import visible_keys
from rope_export.proof.arrays import from_numpy, to_numpy
from rope_export.proof.block_shapes import Shape
from rope_export.proof.draws import RUN, draw_positions, sample_rows
from rope_export.proof.reference import Semantics, attention_truth, keys_and_values
from rope_export.proof.rounded_cache import Rounding
from rope_export.proof.settled import settle
from rope_export.runtime.token_places import (
    Array,
    Places,
    cache_places,
    step_tokens,
    window_tokens,
)
from rope_export.runtime.trial import OUTPUT, PRESENTS, Expected, Judged, Trial

# What padding in a cache of integers holds, times a number near one.
_JUNK_INTEGER = 16.0


@dataclass(frozen=True)
class BlockInterface:
    """What the graph takes beside the hidden states.

    Attributes:
        positions: how many positions it serves when ``position_ids`` is an input, else None.
        cache: whether past and present are.
        mask: whether ``attention_mask`` is.
        padding: the side on which prompts are padded.
        packs_rows: whether the present has each row's tokens from its first slot on.
        window: the window, where the cache holds no more than that.
    """

    positions: int | None = None
    cache: bool = False
    mask: bool = False
    padding: str = "right"
    packs_rows: bool = False
    window: int = 0


class BlockCall:
    """One call of the block on inputs of one shape.

    Every row is a sequence of its own without padding, ``tokens``; the call gets what lies after
    the row's past, in columns padded to one length.
    """

    def __init__(
        self,
        block: Attention,
        shape: Shape,
        interface: BlockInterface,
        rng: np.random.Generator,
        deviation: float,
    ) -> None:
        self.block, self.shape, self.interface = block, shape, interface
        batch, length = shape.batch, shape.sequence
        pasts = np.array(shape.pasts or (0,) * batch)
        lengths = np.array(shape.lengths or (length,) * batch)
        self.pasts, self.totals = pasts, pasts + lengths
        self.tokens = draw(rng, block, batch, int(self.totals.max()), deviation)
        self.ids = None
        rope = block.rope
        if interface.positions is not None and rope is not None:
            reach = replace(shape, sequence=self.tokens.shape[1])
            served = shape.positions_below or interface.positions
            drawn = [draw_positions(rng, reach, served, rope) for _ in range(rope.axes)]
            self.ids = torch.from_numpy(np.stack(drawn) if rope.axes > 1 else drawn[0])
        self.rows = sample_rows(rng, length) if shape.sampled else None
        self.rounding = Rounding.of(block)
        nothing = np.zeros(batch, dtype=np.int64)
        # Columns of the past and of the call, and the tokens in them.
        self.old = step_tokens(tuple(pasts.tolist()), nothing, interface.padding)
        self.new = step_tokens(tuple(lengths.tolist()), pasts, interface.padding)
        if self.rounding is not None:
            settle(
                block,
                self.rounding,
                self.tokens,
                (self.new[0], self.new[1]),
                self.ids,
                lambda count: draw(rng, block, 1, count, deviation),
            )
        self.mask = np.zeros((batch, shape.total), dtype=np.int64)
        self.mask[self.old[0], self.old[2]] = 1
        self.mask[self.new[0], self.new[2] + shape.past] = 1
        # What stands at padding must not matter.
        self.hidden = draw(rng, block, batch, length, deviation)
        row, token, column = (torch.from_numpy(part) for part in self.new)
        self.hidden[row, column] = self.tokens[row, token]
        self.junk = draw(rng, block, batch, 1, deviation)

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
            past = inputs if interface.window else self._past(exact, packs_rows=False)
            past = {name: past[name] for name in ("past_key", "past_value")}
        if interface.mask:
            inputs["attention_mask"] = self.mask
        truth = self._truth(Semantics.of(self.block))
        eager, present = self._eager(new_ids, past)
        whole = (shape.batch, shape.sequence, self.block.hidden_size)
        judged = Judged("tokens", self._compared(), whole)
        of_output = expected_of(self.block, truth, eager, judged, loud=shape.loud)
        if of_output is not None:
            bound = replace(of_output.bound, loss=self._loss(truth))
            of_output = replace(of_output, bound=bound)
        parts = {OUTPUT: of_output}
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

    @property
    def _capacity(self) -> int:
        """Slots of a cache of the window."""
        return self.interface.window + self.shape.slack

    def _calls(self) -> tuple[int, ...]:
        return (self.shape.past,) if self.shape.past else ()

    def _compared(self) -> Places:
        """Batch row and column of the tokens whose output is compared."""
        row, _, column = self.new
        if self.rows is None:
            return row, column
        picked = np.isin(column, self.rows.numpy())
        return row[picked], column[picked]

    def _loss(self, truth: Array) -> float | None:
        """What the rounding of the cache changes in the output."""
        if self.rounding is None:
            return None
        kept = self._truth(replace(Semantics.of(self.block), rounding=None))
        return errors_against(kept, truth).rel

    def _truth(self, meaning: Semantics) -> Array:
        """Float64 outputs of the tokens compared, ``[tokens, hidden]``."""
        block, tokens, ids, shape = self.block, self.tokens, self.ids, self.shape
        if shape.uniform:
            rows = self.rows
            if rows is None:
                rows = torch.arange(shape.past, tokens.shape[1])
            picked = None if len(rows) == tokens.shape[1] else rows
            truth = attention_truth(
                block,
                tokens,
                position_ids=ids,
                rows=picked,
                calls=self._calls(),
                semantics=meaning,
            )
            return truth.flatten(0, 1).numpy()
        longest = None if ids is not None else int(self.totals.max())
        parts = []
        for index, (past, total) in enumerate(zip(self.pasts, self.totals, strict=True)):
            of_row = None if ids is None else ids[..., index : index + 1, :total]
            row = tokens[index : index + 1, :total]
            rows = torch.arange(int(past), int(total))
            parts.append(
                attention_truth(
                    block, row, position_ids=of_row, rows=rows, longest=longest, semantics=meaning
                )[0]
            )
        return torch.cat(parts).numpy()

    def _exact_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, ``[B, G, tokens, width]``: float64, or as stored."""
        exact = keys_and_values(self.block, self.tokens, position_ids=self.ids, calls=self._calls())
        return exact if self.rounding is None else self.rounding.stored(exact)

    def _past(self, exact: tuple[Tensor, Tensor], *, packs_rows: bool) -> dict[str, Array]:
        """Past keys and values in the block's dtype, with junk at padding."""
        past = {}
        row, token, column = (torch.from_numpy(part) for part in self.old)
        slot = token if packs_rows else column
        slots, window = self.shape.past, self.interface.window
        if window:
            slots = self._capacity
            places = window_tokens(self.pasts, window, slots)
            kept = resident(self.pasts, window, slots)
            row, token = (torch.from_numpy(part) for part in places)
            slot = token - torch.from_numpy(self.pasts - kept)[row]
        for name, tensor in zip(("past_key", "past_value"), exact, strict=True):
            if self.rounding is None:
                of_dtype, junk = tensor.to(self.tokens.dtype), self.junk
            else:
                of_dtype = tensor
                junk = (_JUNK_INTEGER * self.junk).abs().clamp(max=127).to(tensor.dtype)
            width = tensor.shape[-1]
            filled = junk[:, :, :1, None].expand(-1, tensor.shape[1], slots, width)
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
            output = _eager_rows(block, self.hidden, new_ids, self.rows)
            present = None
            if past is not None:
                _, k, v = block.heads(self.hidden, position_ids=new_ids)
                rounding = block.cache_rounding
                present = (k, v) if rounding is None else rounding.encode(k, v)
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
        window, slots = self.interface.window, self.shape.total
        at = cache_places(self.mask, packs_rows=self.interface.packs_rows)
        at_columns = cache_places(self.mask, packs_rows=False)
        row, nth = cache_places(self.mask, packs_rows=True)
        if window:
            slots = self._capacity
            row, nth = window_tokens(self.totals, window, slots)
            at = cache_places(self.mask, packs_rows=True, window=window, capacity=slots)
            # Of a pass without a past there are keys of all tokens.
            at_columns = at if present[0].shape[2] == slots else (row, nth)
        elif self.rows is not None:  # a sample of a long prompt
            picked = np.isin(nth, self.rows.numpy())
            at, at_columns = ((places[0][picked], places[1][picked]) for places in (at, at_columns))
            row, nth = row[picked], nth[picked]
        expected = {}
        for name, tensor, eager in zip(PRESENTS, exact, present, strict=True):
            truth = tensor[row, :, nth].flatten(1).double().numpy()
            got = eager[at_columns[0], :, at_columns[1]].flatten(1).double().numpy()
            whole = (self.shape.batch, tensor.shape[1], slots, tensor.shape[3])
            judged = Judged("cache", at, whole)
            expected[name] = expected_of(
                self.block, truth, got, judged, loud=self.shape.loud, stored=tensor.dtype
            )
        return expected

    def _outputs(self, inputs: dict[str, Array], expected: dict[str, Expected]) -> dict[str, Array]:
        """Whole graph outputs; a packed present has zeros behind the tokens of a shorter row."""
        dtype = inputs["hidden_states"].dtype
        shape = self.shape
        output = np.zeros((shape.batch, shape.sequence, self.block.hidden_size), dtype)
        output[self._compared()] = expected[OUTPUT].truth.astype(dtype)
        outputs: dict[str, Array] = {OUTPUT: output}
        for name in PRESENTS:
            if name not in expected:
                continue
            past = inputs[name.replace("present", "past")]
            _, heads, earlier, width = past.shape
            whole = expected[name]
            present: Array = np.zeros(whole.shape, past.dtype)
            if not self.interface.packs_rows:
                present[:, :, :earlier] = past
            assert whole.at is not None
            row, slot = whole.at
            values = whole.truth.astype(past.dtype).reshape(len(row), heads, width)
            present[row, :, slot] = values
            outputs[name] = present
        return outputs


def expected_of(
    block: Attention,
    truth: Array,
    eager: Array,
    judged: Judged,
    *,
    loud: bool,
    stored: torch.dtype | None = None,
) -> Expected | None:
    """How close is close enough, or None when eager PyTorch itself is not finite.

    What is stored as integers is to be those.
    """
    computed = str(block.dtype).removeprefix("torch.")
    integers = stored is not None and not stored.is_floating_point
    dtype = str(stored).removeprefix("torch.") if integers else computed
    products = max(block.hidden_size, block.num_heads * block.value_head_dim)
    return judged.expected(
        truth, eager, dtype, products, loud=loud and not integers, rounding=computed
    )


@torch.no_grad()
def _eager_rows(block: Attention, x: Tensor, ids: Tensor | None, rows: Tensor | None) -> Tensor:
    """Run the block itself, or its attention for the sampled rows only."""
    rounding = block.cache_rounding
    if rows is None and rounding is None:
        whole: Tensor = block(x, position_ids=ids)
        return whole
    q, k, v = block.heads(x, position_ids=ids)
    if rounding is not None:
        k, v = rounding.decode(*rounding.encode(k, v))
    if rows is None:
        rows = torch.arange(x.shape[1])
    length = x.shape[1]
    outputs = []
    for run in rows.split(RUN):
        seen = int(run[-1]) + 1 if block.causal else length
        visible = visible_keys(run, torch.arange(seen), causal=block.causal, window=block.window)
        context = block.attend(q[:, :, run], k[:, :, :seen], v[:, :, :seen], visible=visible)
        outputs.append(block.merge(context))
    return torch.cat(outputs, dim=1)
