"""`validate`: prove an exported graph against eager PyTorch and float64 truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rope_export import runtime
from rope_export.artifacts.artifact import Artifact
from rope_export.artifacts.files import sha256
from rope_export.artifacts.report import Report
from rope_export.artifacts.result import ExportResult
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.eager import evaluating
from rope_export.exporting.module import DrawInputs, ModuleRequest
from rope_export.exporting.request import Request
from rope_export.exporting.stages import Evidence
from rope_export.exporting.subject import Subject
from rope_export.proof.cases import evidence as evidence
from rope_export.runtime.replay import run_providers
from rope_export.runtime.trial import Progress, silent


def validate(
    exported: ExportResult | str | Path,
    module: nn.Module,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    inputs: DrawInputs | None = None,
    providers: Sequence[str] = (),
    progress: Progress = silent,
) -> Report:
    """Prove the graph of an artifact against the module it came from.

    The module and float64 truth are evaluated anew; the stored vectors are not consulted. The
    report takes the place of the artifact's earlier one.

    Args:
        exported: what `export` returned, or the artifact's folder.
        module: what was exported, with the same weights.
        args: example inputs, as given to `export`; none for a block.
        kwargs: example inputs by name, likewise.
        inputs: draws inputs for the proof, as of `export`.
        providers: where to run; those named must load. Without any, the providers the graph was
            made for, and CUDA too where it loads and has the operators.
        progress: told what is being done.

    Returns:
        the report; ``report.passed`` is the verdict.

    Raises:
        BadInputError: the artifact is incomplete, or is not one of ``module``.
        ProviderUnavailableError: a provider does not load.
    """
    folder = Path(exported) if isinstance(exported, str | Path) else exported.path
    artifact = Artifact.read(folder, verify=False)
    subject = Subject(_request(artifact, module, args, kwargs, inputs))
    with evaluating(module):
        found = evidence(subject, progress)
        report = prove(subject, folder, found, named=providers, progress=progress)
    report.write(folder)
    return report


def _request(
    artifact: Artifact,
    module: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    inputs: DrawInputs | None,
) -> Request:
    exported = artifact.config["export"]
    if "block" in artifact.config:
        if not isinstance(module, Attention):
            raise BadInputError(
                f"the artifact at {artifact.path} is of an Attention, got {type(module).__name__}"
            )
        dtype = str(module.dtype).removeprefix("torch.")
        if dtype != exported["dtype"]:
            raise BadInputError(
                f"the artifact at {artifact.path} is {exported['dtype']}, the block given is "
                f"{dtype}"
            )
        scales = {"cache_rounding": artifact.config.get("cache_rounding")}
        return BlockRequest.from_json(exported | scales, module)
    if args is None and kwargs is None:
        raise BadInputError(
            f"args must be example inputs of {type(module).__name__}, as given to export, got None"
        )
    return ModuleRequest.from_json(
        exported, module, () if args is None else args, {} if kwargs is None else kwargs, inputs
    )


def prove(
    subject: Subject,
    folder: Path,
    found: Evidence,
    *,
    named: Sequence[str],
    progress: Progress,
) -> Report:
    """Run the graph in ``folder`` on every provider and put the report together.

    Raises:
        ProviderUnavailableError: a named provider does not load, or none can run the graph.
    """
    artifact = Artifact.read(folder, verify=False)
    graph = artifact.config["graph"]
    statuses, results = run_providers(
        artifact,
        found.trials,
        named=tuple(named),
        made_for=subject.request.providers,
        runs_on=graph["runs_on"],
        progress=progress,
    )
    return Report(
        providers=statuses,
        cases=tuple(results),
        graph={**graph, "sha256": sha256(artifact.model)},
        environment=runtime.environment(),
        sensitivity=found.sensitivity(),
        notes=tuple(artifact.config["notes"]),
    )
