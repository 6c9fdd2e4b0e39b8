"""`race`: all legal lowerings of a block, proven and timed on this machine to keep the fastest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rope_export import runtime
from rope_export.artifacts.targets import TARGETS
from rope_export.attention.calibration import with_rounded_cache
from rope_export.bench.block import measure
from rope_export.bench.results import Measurement
from rope_export.errors import BadInputError, ExportError
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.stages import IsProven
from rope_export.lowering import rules
from rope_export.lowering.choice import choose, legal_forms
from rope_export.runtime.trial import Progress

ROUNDS = 7
_MEMORY_SHARE = 0.8
_SHORTEST = 2


@dataclass(frozen=True)
class Runner:
    """One lowering in the race.

    Attributes:
        target: one of `targets.TARGETS`.
        form: name of its form in `rules.FORMS`.
        attention: the operator that attends.
        rotation: the operator that rotates, or None when the attention operator does it.
        milliseconds: median of a step, by phase; empty when it did not run.
        peak_extra_mib: memory of its first step, by phase.
        out: why it was not timed, else None.
        won: whether it was kept.
    """

    target: str
    form: str
    attention: str
    rotation: str | None
    milliseconds: dict[str, float]
    peak_extra_mib: dict[str, float]
    out: str | None = None
    won: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def candidates(request: BlockRequest) -> list[Runner]:
    """Legal lowerings: all forms of ``ort``, which has those of ``onnx``, and ``primitive``."""
    situations = request.situations(request.providers)
    return [
        Runner(
            target,
            form.name,
            form.attention.removeprefix("::"),
            form.rotation and form.rotation.removeprefix("::"),
            {},
            {},
        )
        for target in ("ort", "primitive")
        for form in rules.FORMS[target]
        if form.name in legal_forms(target, situations)
    ]


def race(
    request: BlockRequest, is_proven: IsProven, progress: Progress
) -> tuple[BlockRequest, list[Runner]]:
    """Export, prove and time every candidate at the longest sequence.

    A graph with a cache is timed at a prompt and at a token after it, and the geometric mean of
    the two decides.

    Args:
        request: what is exported and how, but for its target and form.
        is_proven: exports a request into a folder and says whether its graph is proven.
        progress: told what is being done.

    Returns:
        the request that won, and all candidates.

    Raises:
        BadInputError: no lowering is legal.
        ExportError: none is proven and runs.
        ProviderUnavailableError: the provider does not load.
    """
    provider = request.providers[0]
    runtime.require(provider)
    block = request.block
    axes = block.rope.axes if block.rope is not None and request.position_ids else 1
    if axes > 1 or request.longest < _SHORTEST:
        raise BadInputError(
            f"target auto times sequences of {_SHORTEST} tokens and more with one axis of "
            f"positions, got {request.longest} and {axes}: name one of {', '.join(TARGETS)}"
        )
    found = candidates(request)
    if not found:
        choose("ort", request.situations(request.providers))  # says why
        raise BadInputError("target auto has no lowering that is legal")
    with TemporaryDirectory() as root:
        given: dict[str, Path] = {}
        for index, runner in enumerate(found):
            mine = replace(request, target=runner.target, form=runner.form)
            folder = Path(root) / runner.form
            out = _too_large(mine)
            if out is None:
                progress(f"race: proving {runner.form}")
                out = None if _proven(is_proven, mine, folder) else "its graph was not proven"
            if out is None:
                given[f"{runner.form}-cache" if request.cache else runner.form] = folder
            found[index] = replace(runner, out=out)
        timed = _timed(request, found, given, provider, progress)
    running = [runner for runner in timed if runner.out is None]
    if not running:
        reasons = "; ".join(f"{runner.form}: {runner.out}" for runner in timed)
        raise ExportError(f"target auto found no lowering that is proven and runs: {reasons}")
    fastest = min(running, key=lambda r: math.prod(r.milliseconds.values()))
    finished = [replace(runner, won=runner is fastest) for runner in timed]
    return replace(request, target=fastest.target, form=fastest.form), finished


def _proven(is_proven: IsProven, request: BlockRequest, folder: Path) -> bool:
    try:
        return is_proven(request, folder)
    except ExportError:
        return False


def _too_large(request: BlockRequest) -> str | None:
    """Why the scores of all pairs of tokens do not fit in memory, or None."""
    copies = max(request.choose().score_copies.values())
    needed = copies * 4 * request.batch * request.block.num_heads * request.longest**2
    free = runtime.available_memory()
    if needed <= _MEMORY_SHARE * free:
        return None
    return (
        f"its scores take about {needed / 2**30:.0f} GiB at {request.longest} tokens, and "
        f"{free / 2**30:.0f} GiB are free"
    )


def _timed(
    request: BlockRequest,
    found: list[Runner],
    given: dict[str, Path],
    provider: str,
    progress: Progress,
) -> list[Runner]:
    names = [runner.form for runner in found if runner.out is None]
    if not names:
        return found
    results = measure(
        # Its graphs are proven; of integers in their caches the answers beside them know nothing.
        with_rounded_cache(request.block, None),
        [request.longest],
        phases=("prefill", "decode") if request.cache else ("prefill",),
        contenders=names,
        provider=provider,
        batch=request.batch,
        rounds=ROUNDS,
        seed=request.seed,
        given=given,
        limits=False,
        progress=lambda message: progress(f"race: {message}"),
    )
    timed = []
    for runner in found:
        mine = [m for m in results.measurements if m.contender == runner.form]
        timed.append(runner if runner.out is not None else _with(runner, mine))
    return timed


def _with(runner: Runner, measured: list[Measurement]) -> Runner:
    wrong = next((m for m in measured if m.failed is not None or m.wrong), None)
    if wrong is not None:
        return replace(runner, out=wrong.failed or "its numbers were wrong where it was timed")
    return replace(
        runner,
        milliseconds={m.phase: 1e3 * m.median for m in measured},
        peak_extra_mib={m.phase: m.peak_extra_bytes / 2**20 for m in measured},
    )
