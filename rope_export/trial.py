"""Running cases on a provider and comparing: the half of validation that needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export import runtime
from rope_export.artifact import Artifact, Vector, read_vector
from rope_export.comparison import Bound, Errors, errors_against
from rope_export.errors import BadInputError, ProviderUnavailableError
from rope_export.places import Array, Places, cache_places, calls_of, given_places, new_places
from rope_export.report import CaseResult, ProviderStatus, Report

Progress = Callable[[str], None]
OUTPUT = "output"
PRESENTS = ("present_key", "present_value")
_ROOM = 16
_INFINITE = Errors(math.inf, math.inf, math.inf)


def silent(_: str) -> None:
    """Progress that goes nowhere."""


@dataclass(frozen=True)
class Expected:
    """What one tensor should hold at some of its tokens.

    Attributes:
        truth: ``[tokens, width]`` float64; of keys and values, all heads of a token in one row.
        at: batch row and place of each of those tokens; keys and values have their places on the
            third axis.
        bound: how close is close enough.
    """

    truth: npt.NDArray[np.float64]
    at: Places
    bound: Bound

    def take(self, tensor: Array) -> Array:
        """The tokens in question of an output ``[B, S, width]`` or a cache ``[B, G, T, width]``."""
        row, place = self.at
        if tensor.ndim == 3:
            return tensor[row, place]
        return tensor[row, :, place].reshape(len(row), -1)


@dataclass(frozen=True)
class Trial:
    """One case: inputs, what they should give, and how close is close enough.

    Attributes:
        name: what it covers.
        batch: rows.
        sequence: new tokens.
        past: cached tokens before them, of the longest row.
        inputs: by graph input name.
        expected: by graph output name.
        outputs: whole graph outputs, for storing; empty when it is not stored.
        steps: when not empty, the inputs are one full pass that is run in several calls through
            `runtime.Decoder`: how many tokens each row is given in each.
    """

    name: str
    batch: int
    sequence: int
    past: int
    inputs: dict[str, Array]
    expected: dict[str, Expected]
    outputs: dict[str, Array]
    steps: tuple[tuple[int, ...], ...] = ()

    @property
    def stored(self) -> bool:
        """Whether the artifact keeps it as a test vector."""
        return bool(self.outputs)


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
        results += _run(session, trial, artifact.cache)
    return ProviderStatus("ok", None, session.nodes), results


def _run(
    session: runtime.Session, trial: Trial, cache: dict[str, Any] | None
) -> Iterator[CaseResult]:
    if sorted(session.input_names) != sorted(trial.inputs):
        wanted, got = ", ".join(trial.inputs), ", ".join(session.input_names)
        yield _failed(session.provider, trial, f"the graph's inputs are {got}, not {wanted}")
        return
    try:
        outputs = _driven(session, trial, cache) if trial.steps else session.run(trial.inputs)
    except (RuntimeError, BadInputError) as error:
        yield _failed(session.provider, trial, str(error))
        return
    for name, expected in trial.expected.items():
        why = _unlike(outputs, name, trial)
        errors = _INFINITE
        if why is None:
            errors = errors_against(expected.truth, expected.take(outputs[name]))
        yield _result(session.provider, trial, name, errors, why)


def _unlike(outputs: dict[str, Array], name: str, trial: Trial) -> str | None:
    """Why an output cannot be compared, or None."""
    if name not in outputs:
        return f"the graph has no output {name!r}"
    got, hidden = outputs[name], trial.inputs["hidden_states"]
    if name == OUTPUT:
        whole: tuple[int, ...] = (trial.batch, trial.sequence, hidden.shape[-1])
    else:
        past = trial.inputs[name.replace("present", "past")]
        total = trial.inputs["attention_mask"].shape[1]
        whole = (trial.batch, past.shape[1], total, past.shape[3])
    if got.shape != whole:
        return f"{name} is {got.shape}, not {whole}"
    if got.dtype != hidden.dtype:
        return f"{name} is {got.dtype}, not {hidden.dtype}"
    return None


def _driven(
    session: runtime.Session, trial: Trial, cache: dict[str, Any] | None
) -> dict[str, Array]:
    """Run the calls of a trial one after the other; the output as of one full pass."""
    assert cache is not None  # only graphs with one have such trials
    layout = runtime.CacheLayout(**cache)
    columns = sum(max(step) for step in trial.steps)
    # Longer than needed, as an application's is.
    capacity = min(columns + _ROOM, layout.capacity)
    decoder = runtime.Decoder(session, layout, batch=trial.batch, capacity=capacity)
    hidden_states, ids = trial.inputs["hidden_states"], trial.inputs.get("position_ids")
    output = np.zeros_like(hidden_states)
    for call in calls_of(hidden_states, ids, trial.steps, layout.padding):
        if call.mask.shape[1] == 1 and call.mask.all():
            answer = decoder.decode(call.hidden, position_ids=call.position_ids)
        else:
            answer = decoder.prefill(
                call.hidden, attention_mask=call.mask, position_ids=call.position_ids
            )
        output[call.tokens] = answer[call.at]
    return {OUTPUT: output}


def _failed(provider: str, trial: Trial, reason: str) -> CaseResult:
    return _result(provider, trial, OUTPUT, _INFINITE, reason)


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
            expected = _stored_expectations(vector, inputs, outputs, artifact.cache)
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
    vector: Vector,
    inputs: dict[str, Array],
    outputs: dict[str, Array],
    cache: dict[str, Any] | None,
) -> dict[str, Expected]:
    """What the stored outputs say; raises ValueError, KeyError or IndexError if they cannot be."""
    hidden, output = inputs["hidden_states"], outputs[OUTPUT]
    if hidden.shape[:2] != (vector.batch, vector.sequence) or hidden.shape[:2] != output.shape[:2]:
        raise ValueError
    if hidden.dtype != output.dtype:
        raise ValueError
    mask = inputs.get("attention_mask", np.ones(hidden.shape[:2], dtype=np.int64))
    if mask.shape[0] != vector.batch or mask.shape[1] < vector.sequence:
        raise ValueError
    places = {OUTPUT: new_places(mask, vector.sequence)}
    if vector.steps:
        places[OUTPUT] = given_places(vector.steps)
    elif cache is not None:
        of_cache = cache_places(mask, packs_rows=cache["packs_rows"])
        places |= dict.fromkeys(PRESENTS, of_cache)
    expected = {}
    for name, bound in vector.bounds.items():
        empty = Expected(np.zeros((0, 0)), places[name], bound)
        expected[name] = replace(empty, truth=empty.take(outputs[name]).astype(np.float64))
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
            not load.
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
        ProviderUnavailableError: a named provider does not load or lacks an operator, or no
            provider can run the graph.
    """
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
