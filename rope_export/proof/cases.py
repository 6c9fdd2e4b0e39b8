"""`evidence`: the cases a graph is held to, made the same way for everything that is exported.

What differs between a block and another module is which shapes are worth proving, how inputs are
drawn, and how truth is worked out: `block_cases` and `module_cases` say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from rope_export.errors import BadInputError
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.labels import inverse, names_in
from rope_export.exporting.module import ModuleRequest
from rope_export.exporting.signature import Signature
from rope_export.exporting.stages import Evidence
from rope_export.exporting.subject import Subject
from rope_export.proof.block_cases import BlockCases
from rope_export.proof.limits import STORED_BYTES
from rope_export.proof.module_cases import ModuleCases
from rope_export.runtime.trial import Progress, Trial

# Relative errors of eager PyTorch that no rounding explains; honest ones are over ten times less.
_FOREIGN = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.3}
# Near ties decide what a handful of tokens errs by where inputs are loud or a model is deep: such
# a case is held to what one token may err by, which is far below what those defects do.
_MANY_TOKENS = 16


class Case(Protocol):
    """A case before its numbers."""

    @property
    def name(self) -> str:
        """What it covers."""
        ...

    @property
    def loud(self) -> bool:
        """Whether inputs are much larger, so that a weak mask or a clipped score shows."""
        ...


class Cases(Protocol):
    """Everything a proof of one kind of subject runs.

    Attributes:
        what: is proven, in a word.
        deep: whether it is a model, in which rounding is amplified.
    """

    what: str
    deep: bool

    def planned(self) -> tuple[Sequence[Case], list[str]]:
        """Cases before their numbers, and what they leave out, in plain words."""
        ...

    def at(self, case: Any) -> str:
        """The sizes of a case, in words."""
        ...

    def trial(self, case: Any, rng: np.random.Generator, made: Sequence[Trial]) -> Trial | None:
        """Draw inputs, and evaluate truth and eager PyTorch on them.

        Args:
            case: one of `planned`.
            rng: draws.
            made: the trials of the cases before it.

        Returns:
            the trial, or None where PyTorch cannot run it either.
        """
        ...

    def notes(self, trials: Sequence[Trial]) -> list[str]:
        """What the trials leave out or cannot see, in plain words."""
        ...

    def sensitivity(self) -> dict[str, float]:
        """Relative change of the truth under typical defects: what the proof would have seen."""
        ...


def cases_of(subject: Subject) -> Cases:
    """Everything a proof of ``subject`` runs."""
    request = subject.request
    if isinstance(request, BlockRequest):
        return BlockCases(request, subject.interface)
    assert isinstance(request, ModuleRequest)
    return ModuleCases(request, subject.interface)


def evidence(subject: Subject, progress: Progress) -> Evidence:
    """Choose shapes this machine can run, draw inputs, evaluate truth and eager PyTorch.

    Args:
        subject: what is exported.
        progress: told what is being done.

    Raises:
        BadInputError: the module does not run at a size it is to serve, overflows its own dtype,
            or computes something that rounding does not explain.
    """
    request, cases = subject.request, cases_of(subject)
    planned, notes = cases.planned()
    trials: list[Trial] = []
    loudness: list[bool] = []
    widest: dict[tuple[str, bool], float] = {}
    left = STORED_BYTES
    for index, case in enumerate(planned):
        progress(f"float64 truth and eager PyTorch: {case.name}{cases.at(case)}")
        rng = np.random.default_rng([request.seed, index])
        made = cases.trial(case, rng, trials)
        if made is None:
            continue
        if not case.loud:
            _refuse_foreign(made, request.dtype, cases.what)
        for name, expected in made.expected.items():
            row = expected.bound.tolerance.row
            widest[name, case.loud] = max(widest.get((name, case.loud), 0.0), row)
        if made.stored and all(made.inputs is not earlier.inputs for earlier in trials):
            size = sum(a.nbytes for part in (made.inputs, made.outputs) for a in part.values())
            made = replace(made, outputs={}) if size > left else made
            left -= size if made.stored else 0
        trials.append(made)
        loudness.append(case.loud)
    notes += cases.notes(trials)
    held = [
        _with_widest(trial, widest, loud=loud, deep=cases.deep)
        for trial, loud in zip(trials, loudness, strict=True)
    ]
    return Evidence(held, notes, cases.sensitivity, _proven(subject.interface.signature, held))


def _proven(signature: Signature, trials: Sequence[Trial]) -> dict[str, list[int]]:
    """The smallest and largest size of every label in the inputs of a proof."""
    found: dict[str, set[int]] = {label: set() for label in signature.free}
    for name, axes in signature.inputs.items():
        for axis, text in enumerate(axes):
            label = names_in(text)[0] if isinstance(text, str) else ""
            if isinstance(text, str) and names_in(text) == (label,) and label in found:
                sizes = {trial.inputs[name].shape[axis] for trial in trials}
                found[label] |= {inverse(text, size) for size in sizes}
    return {label: [min(sizes), max(sizes)] for label, sizes in found.items() if sizes}


def _refuse_foreign(trial: Trial, dtype: str, what: str) -> None:
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


def _with_widest(
    trial: Trial, widest: Mapping[tuple[str, bool], float], *, loud: bool, deep: bool
) -> Trial:
    """One token says little about what a token may be off by: all tokens of all cases do.

    The same holds of a handful of loud ones taken together, and of a handful that went through
    a whole model: whether one is near a tie, where rounding is amplified, is a matter of luck.

    Args:
        trial: with bounds of its own.
        widest: the largest of one token, by tensor and loudness.
        loud: whether its inputs are.
        deep: whether it is a model's.
    """
    expected = {}
    for name, part in trial.expected.items():
        held_to = part.bound.tolerance
        row = max(held_to.row, widest.get((name, loud), 0.0))
        few = (loud or deep) and len(part.truth) < _MANY_TOKENS
        held_to = replace(held_to, row=row, rel=max(held_to.rel, row) if few else held_to.rel)
        expected[name] = replace(part, bound=replace(part.bound, tolerance=held_to))
    return replace(trial, expected=expected)
