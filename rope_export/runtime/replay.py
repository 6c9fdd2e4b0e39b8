"""Replaying an artifact's own test vectors, and running any trials on a provider: no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rope_export import runtime
from rope_export.artifacts.artifact import Artifact
from rope_export.artifacts.comparison import Errors, errors_between
from rope_export.artifacts.report import CaseResult, ProviderStatus, Report
from rope_export.artifacts.vectors import Vector, read_vector
from rope_export.errors import BadInputError, ProviderUnavailableError
from rope_export.runtime import required
from rope_export.runtime.token_places import (
    Array,
    Places,
    cache_places,
    calls_of,
    given_places,
    new_places,
)
from rope_export.runtime.trial import KINDS, Expected, Progress, Trial, rows_of, silent

# Tokens that a cache has room for beside those of a trial.
_ROOM = 16
_INFINITE = Errors(math.inf, math.inf, math.inf)


def run_trials(
    artifact: Artifact, provider: str, trials: Iterable[Trial], progress: Progress
) -> tuple[ProviderStatus, list[CaseResult]]:
    """Run every trial on ``provider`` and compare.

    A graph that does not load, or whose arithmetic is placed elsewhere, fails every trial.

    Raises:
        ProviderUnavailableError: the provider does not load on this machine.
    """
    runtime.require(provider)
    try:
        session = runtime.Session.open(artifact.model, provider)
    except RuntimeError as error:
        reason = f"the graph does not load: {error}"
        failures = [_failed(provider, t, reason) for t in trials]
        return ProviderStatus("unavailable", reason), failures
    if session.misplaced:
        reason = session.misplacement
        status = ProviderStatus("unavailable", reason, session.nodes)
        return status, [_failed(provider, t, reason) for t in trials]
    results: list[CaseResult] = []
    for trial in trials:
        progress(f"{provider}: {trial.name} [{trial.batch}, {trial.sequence}]")
        results += _run(session, trial, artifact)
    return ProviderStatus("ok", None, session.nodes), results


def _run(session: runtime.Session, trial: Trial, artifact: Artifact) -> Iterator[CaseResult]:
    if sorted(session.input_names) != sorted(trial.inputs):
        wanted, got = ", ".join(trial.inputs), ", ".join(session.input_names)
        yield _failed(session.provider, trial, f"the graph's inputs are {got}, not {wanted}")
        return
    try:
        outputs = _driven(session, trial, artifact) if trial.steps else session.run(trial.inputs)
    except (RuntimeError, BadInputError) as error:
        yield _failed(session.provider, trial, str(error))
        return
    for name, expected in trial.expected.items():
        why = _unlike(outputs, name, trial)
        errors = _INFINITE
        if why is None:
            taken = expected.take(outputs[name])
            errors = errors_between(expected.truth, taken, expected.bound.dtype)
        yield _result(session.provider, trial, name, errors, why)


def _unlike(outputs: dict[str, Array], name: str, trial: Trial) -> str | None:
    """Why an output cannot be compared, or None."""
    if name not in outputs:
        return f"the graph has no output {name!r}"
    got, expected = outputs[name], trial.expected[name]
    if got.shape != expected.shape:
        return f"{name} is {got.shape}, not {expected.shape}"
    if got.dtype.name != expected.bound.dtype:
        return f"{name} is {got.dtype}, not {expected.bound.dtype}"
    return None


def _driven(session: runtime.Session, trial: Trial, artifact: Artifact) -> dict[str, Array]:
    """Run the calls of a trial one after the other; the output as of one full pass."""
    layout = artifact.cache
    assert layout is not None  # only graphs with one have such trials
    columns = sum(max(step) for step in trial.steps)
    # Longer than needed, as an application's is.
    capacity = min(columns + _ROOM, layout.capacity)
    slots = None  # the window itself, or more where rows differ
    if layout.windows and len(set(trial.steps[0])) > 1 and not any(c.slots for c in layout.layers):
        slots = max(layout.windows) + _ROOM
    decoder = runtime.Decoder(
        session, layout, batch=trial.batch, capacity=capacity, window_capacity=slots
    )
    tokens, ids = trial.inputs[layout.tokens], trial.inputs.get("position_ids")
    expected = trial.expected[layout.output]
    output = np.zeros(expected.shape, decoder.output_dtype)
    for call in calls_of(tokens, ids, trial.steps, layout.padding):
        if call.mask.shape[1] == 1 and call.mask.all():
            answer = decoder.decode(call.tokens, position_ids=call.position_ids)
        else:
            mask = None if call.mask.all() else call.mask
            answer = decoder.prefill(
                call.tokens, attention_mask=mask, position_ids=call.position_ids
            )
        output[call.of_pass] = answer[call.at]
    return {layout.output: output}


def _failed(provider: str, trial: Trial, reason: str) -> CaseResult:
    return _result(provider, trial, next(iter(trial.expected)), _INFINITE, reason)


def _result(
    provider: str, trial: Trial, name: str, errors: Errors, reason: str | None
) -> CaseResult:
    expected = trial.expected[name]
    return CaseResult(
        provider=provider,
        name=trial.name,
        tensor=name,
        batch=trial.batch,
        sequence=trial.sequence,
        past=trial.past,
        tokens=len(expected.truth),
        errors=errors,
        bound=expected.bound,
        reason=reason,
    )


def stored_trials(artifact: Artifact) -> Iterable[Trial]:
    """Read the artifact's test vectors one after the other.

    Raises:
        BadInputError: a file is damaged; the message names it.
    """
    for vector in artifact.vectors:
        inputs, outputs = read_vector(artifact.path, vector)
        try:
            expected = _stored_expectations(vector, inputs, outputs, artifact)
        except (KeyError, IndexError, ValueError) as error:
            raise BadInputError(
                f"{artifact.path / vector.folder}: holds no vector of {vector.batch} x "
                f"{vector.sequence} tokens after {vector.past}"
            ) from error
        yield Trial(
            name=vector.name,
            batch=vector.batch,
            sequence=vector.sequence,
            past=vector.past,
            inputs=inputs,
            expected=expected,
            outputs=outputs,
            steps=vector.steps,
        )


def _stored_expectations(
    vector: Vector, inputs: dict[str, Array], outputs: dict[str, Array], artifact: Artifact
) -> dict[str, Expected]:
    """What the stored outputs say; raises ValueError, KeyError or IndexError if they cannot be."""
    graph = artifact.config["graph"]
    first = inputs[graph["tokens"]]
    if first.shape[:2] != (vector.batch, vector.sequence)[: first.ndim]:
        raise ValueError
    places: dict[str, Places | None] = dict.fromkeys(KINDS)
    if graph["padding_mask"] is not None:
        mask = inputs[graph["padding_mask"]]
        if mask.shape[0] != vector.batch or mask.shape[1] < vector.sequence:
            raise ValueError
        places["tokens"] = new_places(mask, vector.sequence)
        places["cache"] = cache_places(mask, packs_rows=graph["packs_rows"])
    windows = graph.get("windows", {})
    if vector.steps:
        places["tokens"] = given_places(vector.steps)
    expected = {}
    for name, bound in vector.bounds.items():
        output, kind = outputs[name], graph["outputs"][name]
        if output.dtype.name != bound.dtype:
            raise ValueError
        # A module's tokens need not be those of its first input; there are as many rows.
        axes = 2 if kind == "tokens" and "block" in artifact.config else int(kind != "whole")
        if output.shape[:axes] != (vector.batch, vector.sequence)[:axes]:
            raise ValueError
        at = places[kind]
        if name in windows:
            capacity = output.shape[2]
            at = cache_places(mask, packs_rows=True, window=windows[name], capacity=capacity)
        rows = rows_of(output, at, kind).astype(np.float64)
        expected[name] = Expected(rows, at, bound, kind, output.shape)
    return expected


def replay(
    path: str | Path, *, providers: Iterable[str] = (), progress: Progress = silent
) -> Report:
    """Replay an artifact's own test vectors on this machine, without PyTorch.

    Args:
        path: the artifact's folder.
        providers: where to run. Those named must load; without any, the ones the graph was made
            for are run, and CUDA too where it loads and has the operators.
        progress: told what is being done.

    Raises:
        BadInputError: the artifact is incomplete, damaged or altered.
        ProviderUnavailableError: a provider named here, or every one the graph was made for, does
            not load, or onnxruntime is too old for the graph.
    """
    artifact = Artifact.read(Path(path), verify=True)
    if not artifact.vectors:
        raise BadInputError(
            f"{artifact.path}: holds no test vectors (its one shape is larger than 64 MiB), so it "
            "can be proven only where it is exported"
        )
    graph = artifact.config["graph"]
    named = tuple(providers)
    for provider in named:
        runtime.require(provider)
    statuses, results = run_providers(
        artifact,
        list(stored_trials(artifact)),
        named=named,
        made_for=tuple(graph["providers"]),
        runs_on=graph["runs_on"],
        progress=progress,
    )
    return Report(
        providers=statuses,
        cases=tuple(results),
        graph=graph,
        environment=runtime.environment(),
        notes=tuple(artifact.config["notes"]),
    )


def run_providers(
    artifact: Artifact,
    trials: list[Trial],
    *,
    named: tuple[str, ...],
    made_for: tuple[str, ...],
    runs_on: dict[str, str | None],
    progress: Progress,
) -> tuple[dict[str, ProviderStatus], list[CaseResult]]:
    """Run the trials on each provider that is named, or else on each that can run the graph.

    Args:
        artifact: holds the graph.
        trials: what to run.
        named: providers asked for; each must load.
        made_for: providers the graph was made for.
        runs_on: for every provider, why it has not all of the graph's operators, or None.
        progress: told what is being done.

    Raises:
        ProviderUnavailableError: a named provider does not load or lacks an operator, no
            provider can run the graph, or onnxruntime is too old for it.
    """
    required.check(artifact)
    statuses: dict[str, ProviderStatus] = {}
    results: list[CaseResult] = []
    for provider in named or tuple(dict.fromkeys((*made_for, *runs_on))):
        reason = runtime.unavailable_reason(provider) or runs_on.get(provider)
        if reason is not None and provider in named:
            raise ProviderUnavailableError(f"provider {provider} cannot be used here: {reason}")
        if reason is not None:
            statuses[provider] = ProviderStatus("unavailable", reason)
            continue
        statuses[provider], cases = run_trials(artifact, provider, trials, progress)
        results += cases
    if not results:
        reasons = "; ".join(f"{name}: {status.reason}" for name, status in statuses.items())
        raise ProviderUnavailableError(f"no provider can run this graph here: {reasons}")
    return statuses, results
