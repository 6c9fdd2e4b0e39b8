"""What an export does that lies above it: proving a graph, and racing lowerings.

`export` is the road to a graph. That the graph is right is for the proof to say, and which lowering
is the fastest for the race; both are made of exports themselves. So that imports run one way, they
are offered here, by the package when it is imported, and loaded when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rope_export.artifacts.report import Report
    from rope_export.exporting.block import BlockRequest
    from rope_export.exporting.subject import Subject
    from rope_export.runtime.trial import Progress, Trial


@dataclass(frozen=True)
class Evidence:
    """What a graph is held to.

    Attributes:
        trials: inputs, float64 truth, and what eager PyTorch achieves.
        notes: what they leave out, in plain words.
        sensitivity: works out what typical defects would have changed.
        proven: the smallest and largest size of every label among the trials.
    """

    trials: list[Trial]
    notes: list[str]
    sensitivity: Callable[[], dict[str, float]]
    proven: Mapping[str, list[int]]


class Prover(Protocol):
    """The room that proves."""

    def evidence(self, subject: Subject, progress: Progress) -> Evidence:
        """Choose inputs, and evaluate truth and eager PyTorch on them."""
        ...

    def prove(
        self,
        subject: Subject,
        folder: Path,
        found: Evidence,
        *,
        named: Sequence[str],
        progress: Progress,
    ) -> Report:
        """Run the graph in ``folder`` and compare."""
        ...


class Runner(Protocol):
    """One lowering in a race."""

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        ...


IsProven = Callable[["BlockRequest", Path], bool]
"""Exports a request into a folder and says whether its graph is proven."""


class Racer(Protocol):
    """The room that measures."""

    def race(
        self, request: BlockRequest, is_proven: IsProven, progress: Progress
    ) -> tuple[BlockRequest, Sequence[Runner]]:
        """Prove and time every legal lowering; the request that won, and all of them."""
        ...


_offers: dict[str, Callable[[], Any]] = {}


def offer(*, prover: Callable[[], Prover], racer: Callable[[], Racer]) -> None:
    """Say where the stages are; they are loaded when they are first used."""
    _offers.update(prover=prover, racer=racer)


def prover() -> Prover:
    """Who proves graphs."""
    found: Prover = _offers["prover"]()
    return found


def racer() -> Racer:
    """Who races lowerings."""
    found: Racer = _offers["racer"]()
    return found
