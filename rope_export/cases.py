"""The cases an artifact is proven on: inputs, float64 truth, and what eager PyTorch achieves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rope_export.draws import from_numpy, input_gain
from rope_export.errors import BadInputError
from rope_export.places import calls_of, given_places
from rope_export.shapes import Shape
from rope_export.single import Interface, SingleCall, expected_of
from rope_export.trial import OUTPUT, Judged, Progress, Trial

if TYPE_CHECKING:
    from rope_export.attention import Attention

# Inputs so many times larger spread the scores by over a hundred: a weak mask or a clipped score
# shows. Near ties then decide a token, and what eager errs by on it is luck: such a case is held to
# more (`single.expected_of`), and to what one token may err by where it has no more than a handful;
# both are far below what those defects do.
_LOUDNESS = 8.0
_MANY_TOKENS = 16
# Relative errors of eager PyTorch that no rounding explains; honest ones are over ten times less.
_FOREIGN = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.3}


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
            single = SingleCall(block, shape, interface, rng, deviation)
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
        if not shape.loud:
            refuse_foreign(trial, str(block.dtype).removeprefix("torch."), "block")
        for name, expected in trial.expected.items():
            row = expected.bound.tolerance.row
            widest[name, shape.loud] = max(widest.get((name, shape.loud), 0.0), row)
        cases.append(trial)
        loudness.append(shape.loud)
    return [
        with_widest(case, widest, loud=loud) for case, loud in zip(cases, loudness, strict=True)
    ]


def refuse_foreign(trial: Trial, dtype: str, what: str) -> None:
    """Refuse a module that is not what its attributes state.

    Tolerances follow from what eager PyTorch errs by; were it to compute something else, they would
    admit anything.

    Args:
        trial: a case.
        dtype: of the module's weights.
        what: the module, in a word.

    Raises:
        BadInputError: eager PyTorch is further from truth than rounding explains.
    """
    for name, expected in trial.expected.items():
        off = expected.bound.eager.rel
        if off > _FOREIGN[dtype]:
            raise BadInputError(
                f"{what} must compute what its attributes and weights state: eager PyTorch is off "
                f"its float64 truth by {off:.2g} in {name} of '{trial.name}', over the "
                f"{_FOREIGN[dtype]:g} that {dtype} could explain"
            )


def with_widest(
    case: Trial, widest: dict[tuple[str, bool], float], *, loud: bool, deep: bool = False
) -> Trial:
    """One token says little about what a token may be off by: all tokens of all cases do.

    The same holds of a handful of loud ones taken together, and of a handful that went through
    a whole model: whether one is near a tie, where rounding is amplified, is a matter of luck.

    Args:
        case: with bounds of its own.
        widest: the largest of one token, by tensor and loudness.
        loud: whether the case's inputs are.
        deep: whether it is a model's.
    """
    expected = {}
    for name, part in case.expected.items():
        held_to = part.bound.tolerance
        row = max(held_to.row, widest.get((name, loud), 0.0))
        few = (loud or deep) and len(part.truth) < _MANY_TOKENS
        held_to = replace(held_to, row=row, rel=max(held_to.rel, row) if few else held_to.rel)
        expected[name] = replace(part, bound=replace(part.bound, tolerance=held_to))
    return replace(case, expected=expected)


def _in_calls(block: Attention, shape: Shape, whole: Trial, interface: Interface) -> Trial:
    """A full pass once more, in several calls with a cache between them."""
    hidden, ids = whole.inputs["hidden_states"], whole.inputs.get("position_ids")
    at = given_places(shape.steps)
    answers = torch.zeros(hidden.shape, dtype=block.dtype)
    mask = np.zeros((shape.batch, 0), dtype=np.int64)
    past = block.empty_cache(shape.batch)
    for call in calls_of(hidden, ids, shape.steps, interface.padding):
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
    return replace(whole, name=shape.name, expected={OUTPUT: expected}, steps=shape.steps)
