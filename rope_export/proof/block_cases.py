"""The cases an attention block is proven on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from rope_export import runtime
from rope_export.attention.block import Attention
from rope_export.attention.random_inputs import input_gain
from rope_export.errors import BadInputError
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.subject import Interface
from rope_export.lowering.choice import Choice
from rope_export.proof.arrays import from_numpy
from rope_export.proof.block_call import BlockCall, BlockInterface, expected_of
from rope_export.proof.block_shapes import Shape, plan_shapes, turning_point
from rope_export.proof.limits import FOLLOWS_LENGTH, RANDOM_SCALES
from rope_export.proof.sensitivity import sensitivities
from rope_export.runtime.token_places import calls_of, given_places
from rope_export.runtime.trial import OUTPUT, Judged, Trial

# Inputs so many times larger spread the scores by over a hundred: a weak mask or a clipped score
# shows. Near ties then decide a token, and what eager errs by on it is luck: such a case is held to
# more (`block_call.expected_of`).
_LOUDNESS = 8.0
_LOUD = "loud inputs"
_MEMORY_SHARE = 0.8
_SENSITIVITY_LENGTH = 64
# A switch further out is proven like any other, but what ignoring it would do is not worked out.
_FAR_SWITCH = 2048


class BlockCases:
    """Everything a proof of a block runs.

    Args:
        request: the block and how it is exported.
        interface: of its graph.
    """

    what = "block"
    deep = False

    def __init__(self, request: BlockRequest, interface: Interface) -> None:
        self._request = request
        self._block = request.block
        (self._choice,) = interface.choices
        self._notes = interface.notes
        self._interface = BlockInterface(
            positions=self._block.rope.positions
            if request.position_ids and self._block.rope
            else None,
            cache=bool(request.cache),
            mask=request.attention_mask,
            padding=request.padding,
            packs_rows=self._choice.form.packs_rows,
            window=request.window,
        )

    def planned(self) -> tuple[list[Shape], list[str]]:
        """Shapes, one in several calls after the full pass it repeats.

        Raises:
            BadInputError: a static graph does not fit in memory.
        """
        request, choice = self._request, self._choice
        longest, notes = _longest_that_fits(request, choice)
        notes += self._notes
        if request.calibration == "random":
            notes.append(RANDOM_SCALES)
        if request.cache and turning_point(self._block) is not None:
            notes.append(FOLLOWS_LENGTH)
        planned = plan_shapes(
            self._block,
            longest=longest,
            batch=request.batch,
            static=request.static,
            with_positions=request.position_ids,
            cache=bool(request.cache),
            mask=request.attention_mask,
            by_rows=choice.by_rows or not choice.form.packs_rows,
            window_cache=bool(request.window),
            one_size=request.capacity is not None,
            one_length=choice.one_length,
            longest_whole=choice.longest_whole,
        )
        return planned, notes

    def at(self, case: Shape) -> str:
        """Batch and length."""
        return f" [{case.batch}, {case.sequence}]"

    def trial(self, case: Shape, rng: np.random.Generator, made: Sequence[Trial]) -> Trial | None:
        """Draw inputs, and evaluate truth and eager PyTorch on them.

        Raises:
            BadInputError: the block overflows its own dtype.
        """
        if case.steps:
            whole = next(
                trial
                for trial in made
                if (trial.batch, trial.sequence, trial.past) == (case.batch, case.sequence, 0)
                and len(trial.expected[OUTPUT].truth) == case.batch * case.sequence
                and not trial.steps
                and trial.name != _LOUD
            )
            return _in_calls(self._block, case, whole, self._interface.padding)
        deviation = self._gain * (_LOUDNESS if case.loud else 1.0)
        trial = BlockCall(self._block, case, self._interface, rng, deviation).trial()
        if trial is None and not case.loud:  # those go beyond what the dtype carries
            raise BadInputError(
                f"dtype {self._request.dtype} is too narrow for this block: eager PyTorch itself "
                f"overflows on inputs [{case.batch}, {case.sequence}] of standard deviation "
                f"{deviation:.2g}"
            )
        return trial

    @cached_property
    def _gain(self) -> float:
        return input_gain(self._block, self._request.seed)

    def notes(self, trials: Sequence[Trial]) -> list[str]:
        """Which tokens are not compared, and which trials not stored."""
        notes = []
        for trial in trials:
            compared = len(trial.expected[OUTPUT].truth)
            padded = "attention_mask" in trial.inputs and not trial.inputs["attention_mask"].all()
            if compared < trial.batch * trial.sequence and not padded and not trial.steps:
                notes.append(
                    f"{trial.name} [{trial.batch}, {trial.sequence}] is compared on "
                    f"{compared} of its {trial.batch * trial.sequence} tokens (the first, the last "
                    "and random runs): float64 truth for all of them would take too long"
                )
            if not trial.stored and not padded:
                stored = max((t.sequence for t in trials if t.stored), default=0)
                longest_stored = (
                    f"the longest stored has {stored} tokens" if stored else "none fits"
                )
                notes.append(
                    f"{trial.name} [{trial.batch}, {trial.sequence}] is proven at export but not "
                    f"stored as a test vector (64 MiB in all); {longest_stored}"
                )
        return notes

    def sensitivity(self) -> dict[str, float]:
        """What typical defects would have shown."""
        switch = turning_point(self._block) or 0
        past_switch = switch if switch <= _FAR_SWITCH else 0
        length = min(_SENSITIVITY_LENGTH + past_switch, self._request.longest)
        return sensitivities(self._block, length=length, seed=self._request.seed)


def _in_calls(block: Attention, shape: Shape, whole: Trial, padding: str) -> Trial:
    """A full pass once more, in several calls with a cache between them."""
    hidden, ids = whole.inputs["hidden_states"], whole.inputs.get("position_ids")
    at = given_places(shape.steps)
    answers = torch.zeros(hidden.shape, dtype=block.dtype)
    loss = whole.expected[OUTPUT].bound.loss
    mask = np.zeros((shape.batch, 0), dtype=np.int64)
    past = block.empty_cache(shape.batch)
    for call in calls_of(hidden, ids, shape.steps, padding):
        mask = np.concatenate((mask, call.mask), axis=1)
        new_ids = None if call.position_ids is None else torch.from_numpy(call.position_ids)
        with torch.no_grad():
            y, past = block(
                from_numpy(call.tokens),
                position_ids=new_ids,
                past=past,
                attention_mask=torch.from_numpy(mask),
            )
        answers[call.of_pass] = y[call.at]
    truth = whole.expected[OUTPUT].truth.reshape(hidden.shape)  # of every token, as it was chosen
    eager = answers[at].double().numpy()
    judged = Judged("tokens", at, hidden.shape)
    expected = expected_of(block, truth[at], eager, judged, loud=False)
    assert expected is not None  # the full pass was finite
    expected = replace(expected, bound=replace(expected.bound, loss=loss))
    return replace(whole, name=shape.name, expected={OUTPUT: expected}, steps=shape.steps)


def _longest_that_fits(request: BlockRequest, choice: Choice) -> tuple[int, list[str]]:
    """The longest sequence this machine has memory to prove, and a note when that is not all."""
    copies = max(choice.score_copies.values())
    block = request.block
    heads = block.num_heads + 3 * block.num_kv_heads
    # Inputs, outputs, float64 truth, and projected heads in both precisions.
    per_token = request.batch * (28 * block.hidden_size + 16 * heads * block.head_dim)
    per_pair = request.batch * copies * 4 * block.num_heads
    available = runtime.available_memory()
    usable = _MEMORY_SHARE * available
    if per_token * request.longest + per_pair * request.longest**2 <= usable:
        return request.longest, []
    if per_pair:
        root = (per_token**2 + 4 * per_pair * usable) ** 0.5
        fitting = int((root - per_token) / (2 * per_pair))
    else:
        fitting = int(usable / per_token)
    scores = f"target {request.target} holds the scores of all token pairs; " if per_pair else ""
    needed = (
        f"{scores}{request.batch} x {request.longest} tokens take about "
        f"{_gib(per_token * request.longest + per_pair * request.longest**2)}, and "
        f"{_gib(available)} are free here"
    )
    if request.static or fitting < 1:
        shape = f"batch {request.batch}, max_seq_len {request.longest}"
        raise BadInputError(f"{shape} does not fit in memory: {needed}")
    return fitting, [f"proven only up to length {fitting} of {request.longest}: {needed}"]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
