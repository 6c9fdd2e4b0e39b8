"""Running cases on a provider and comparing: the half of validation that needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export import runtime
from rope_export.artifact import Artifact, read_vector
from rope_export.comparison import Errors, errors_against
from rope_export.errors import BadInputError, ProviderUnavailableError
from rope_export.report import CaseResult, ProviderStatus, Report

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
OUTPUT = "output"


def silent(_: str) -> None:
    """Progress that goes nowhere."""


@dataclass(frozen=True)
class Trial:
    """One case: inputs, what they should give, and how close is close enough.

    Attributes:
        name: what it covers.
        batch: rows.
        sequence: new tokens.
        past: cached tokens before them.
        inputs: by graph input name.
        truth: ``[B, R, hidden]`` float64, of the sampled rows or of all.
        rows: the sampled query rows ``[R]``, or None when truth has all of them.
        eager: PyTorch's own errors against the truth, in the block's dtype.
        tolerance: what any provider is held to, derived from ``eager`` and the dtype.
        stored: whether the artifact keeps it as a test vector.
    """

    name: str
    batch: int
    sequence: int
    past: int
    inputs: dict[str, Array]
    truth: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64] | None
    eager: Errors
    tolerance: Errors
    stored: bool


def run_trials(
    model: Path, provider: str, trials: Iterable[Trial], progress: Progress
) -> tuple[ProviderStatus, list[CaseResult]]:
    """Run every trial on ``provider`` and compare.

    A graph that does not load, or whose arithmetic is placed elsewhere, fails every trial.

    Raises:
        ProviderUnavailableError: the provider does not load on this machine.
    """
    runtime.require(provider)
    try:
        session = runtime.Session.open(model, provider)
    except RuntimeError as error:
        reason = f"the graph does not load: {error}"
        return ProviderStatus("unavailable", reason), [_failed(provider, t, reason) for t in trials]
    if session.misplaced:
        reason = (
            f"{', '.join(session.misplaced)} was placed on another provider: "
            f"no kernel for it on {provider}"
        )
        status = ProviderStatus("unavailable", reason, session.nodes)
        return status, [_failed(provider, t, reason) for t in trials]
    results = []
    for trial in trials:
        progress(f"{provider}: {trial.name} [{trial.batch}, {trial.sequence}]")
        results.append(_run(session, trial))
    return ProviderStatus("ok", None, session.nodes), results


def _run(session: runtime.Session, trial: Trial) -> CaseResult:
    if sorted(session.input_names) != sorted(trial.inputs):
        wanted, got = ", ".join(trial.inputs), ", ".join(session.input_names)
        return _failed(session.provider, trial, f"the graph's inputs are {got}, not {wanted}")
    try:
        outputs = session.run(trial.inputs)
    except RuntimeError as error:
        return _failed(session.provider, trial, str(error))
    if OUTPUT not in outputs:
        return _failed(session.provider, trial, f"the graph has no output {OUTPUT!r}")
    output = outputs[OUTPUT]
    whole = (trial.batch, trial.sequence, trial.truth.shape[-1])
    if output.shape != whole:
        return _failed(session.provider, trial, f"output is {output.shape}, not {whole}")
    expected = trial.inputs["hidden_states"].dtype
    if output.dtype != expected:
        return _failed(session.provider, trial, f"output is {output.dtype}, not {expected}")
    if trial.rows is not None:
        output = output[:, trial.rows]
    return _result(session.provider, trial, errors_against(trial.truth, output), None)


def _failed(provider: str, trial: Trial, reason: str) -> CaseResult:
    return _result(provider, trial, Errors(math.inf, math.inf, math.inf), reason)


def _result(provider: str, trial: Trial, errors: Errors, reason: str | None) -> CaseResult:
    return CaseResult(
        provider=provider,
        name=trial.name,
        batch=trial.batch,
        sequence=trial.sequence,
        past=trial.past,
        rows=trial.truth.shape[1],
        errors=errors,
        eager=trial.eager,
        tolerance=trial.tolerance,
        reason=reason,
    )


def stored_trials(artifact: Artifact) -> Iterable[Trial]:
    """Read the artifact's test vectors one after the other.

    Raises:
        BadInputError: a file is damaged; the message names it.
    """
    for vector in artifact.vectors:
        inputs, outputs = read_vector(artifact.path, vector)
        tensors = [t for t in (inputs.get("hidden_states"), outputs.get(OUTPUT)) if t is not None]
        kinds = {(t.shape[:-1], t.dtype) for t in tensors}
        if (
            len(tensors) != 2
            or len(kinds) != 1
            or kinds.pop()[0] != (vector.batch, vector.sequence)
        ):
            raise BadInputError(
                f"{artifact.path / vector.folder}: holds no vector of {vector.batch} x "
                f"{vector.sequence} tokens"
            )
        yield Trial(
            name=vector.name,
            batch=vector.batch,
            sequence=vector.sequence,
            past=vector.past,
            inputs=inputs,
            truth=outputs[OUTPUT].astype(np.float64),
            rows=None,
            eager=vector.eager,
            tolerance=vector.tolerance,
            stored=True,
        )


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
        artifact.model,
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
    model: Path,
    trials: list[Trial],
    *,
    named: tuple[str, ...],
    made_for: tuple[str, ...],
    runs_on: dict[str, str | None],
    progress: Progress,
) -> tuple[dict[str, ProviderStatus], list[CaseResult]]:
    """Run the trials on each provider that is named, or else on each that can run the graph.

    Args:
        model: the ONNX file.
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
        statuses[provider], cases = run_trials(model, provider, trials, progress)
        results += cases
    if not results:
        reasons = "; ".join(f"{name}: {status.reason}" for name, status in statuses.items())
        raise ProviderUnavailableError(f"no provider can run this graph here: {reasons}")
    return statuses, results
