"""`validate`: prove an exported graph against eager PyTorch and float64 truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rope_export import runtime, shapes
from rope_export.artifact import Artifact, sha256
from rope_export.cases import make_cases
from rope_export.errors import BadInputError
from rope_export.plan import Plan
from rope_export.report import Report
from rope_export.sensitivity import sensitivities
from rope_export.single import Interface
from rope_export.trial import OUTPUT, Progress, Trial, run_providers, silent

if TYPE_CHECKING:
    from rope_export.attention import Attention
    from rope_export.exporter import ExportResult

_MEMORY_SHARE = 0.8
_SENSITIVITY_LENGTH = 64
# A switch further out is proven like any other, but what ignoring it would do is not worked out.
_FAR_SWITCH = 2048


def validate(
    exported: ExportResult | str | Path,
    block: Attention,
    *,
    providers: Sequence[str] = (),
    progress: Progress = silent,
) -> Report:
    """Prove the graph of an artifact against the block it came from.

    The block and float64 truth are evaluated anew; the stored vectors are not consulted. The
    report takes the place of the artifact's earlier one.

    Args:
        exported: what `export` returned, or the artifact's folder.
        block: the block that was exported, with the same weights.
        providers: where to run; those named must load. Without any, the providers the graph was
            made for, and CUDA too where it loads and has the operators.
        progress: told what is being done.

    Returns:
        the report; ``report.passed`` is the verdict.

    Raises:
        BadInputError: the artifact is incomplete, or is not one of ``block``.
        ProviderUnavailableError: a provider does not load.
    """
    folder = Path(exported) if isinstance(exported, str | Path) else exported.path
    artifact = Artifact.read(folder, verify=False)
    plan = Plan.from_json(artifact.config["export"])
    dtype = str(block.dtype).removeprefix("torch.")
    if dtype != plan.dtype:
        raise BadInputError(f"the artifact at {folder} is {plan.dtype}, the block given is {dtype}")
    trials, _ = make_trials(block, plan, progress)
    report = prove(block, folder, plan, trials, named=providers, progress=progress)
    report.write(folder)
    return report


def make_trials(block: Attention, plan: Plan, progress: Progress) -> tuple[list[Trial], list[str]]:
    """Choose shapes this machine can run, draw inputs, evaluate truth and eager.

    Returns:
        the trials, and what they leave out, in plain words.

    Raises:
        BadInputError: a static graph does not fit in memory.
    """
    choice = plan.choose(block)
    longest, notes = _longest_that_fits(block, plan)
    notes += choice.limits
    if plan.cache and shapes.turning_point(block) is not None:
        notes.append(
            "frequencies follow the length: a cached key keeps those of the call it was rotated "
            "in, so decoding across the switch differs from one full pass, in PyTorch as here"
        )
    planned = shapes.plan_shapes(
        block,
        longest=longest,
        batch=plan.batch,
        static=plan.static,
        with_positions=plan.position_ids,
        cache=plan.cache,
        mask=plan.attention_mask,
        by_rows=choice.by_rows or not choice.form.packs_rows,
    )
    interface = Interface(
        positions=block.rope.positions if plan.position_ids and block.rope else None,
        cache=plan.cache,
        mask=plan.attention_mask,
        padding=plan.padding,
        packs_rows=choice.form.packs_rows,
    )
    was_training = block.training
    block.eval()
    try:
        trials = make_cases(block, planned, seed=plan.seed, interface=interface, progress=progress)
    finally:
        block.train(was_training)
    for trial in trials:
        compared = len(trial.expected[OUTPUT].truth)
        padded = "attention_mask" in trial.inputs and not trial.inputs["attention_mask"].all()
        if compared < trial.batch * trial.sequence and not padded and not trial.steps:
            notes.append(
                f"{trial.name} [{trial.batch}, {trial.sequence}] is compared on "
                f"{compared} of its {trial.batch * trial.sequence} tokens (the first, the last and "
                "random runs): float64 truth for all of them would take too long"
            )
        if not trial.stored and not padded:
            stored = max((t.sequence for t in trials if t.stored), default=0)
            longest_stored = f"the longest stored has {stored} tokens" if stored else "none fits"
            notes.append(
                f"{trial.name} [{trial.batch}, {trial.sequence}] is proven at export but not "
                f"stored as a test vector (64 MiB in all); {longest_stored}"
            )
    return trials, notes


def prove(
    block: Attention,
    folder: Path,
    plan: Plan,
    trials: list[Trial],
    *,
    named: Sequence[str],
    progress: Progress,
) -> Report:
    """Run the graph in ``folder`` on every provider and put the report together.

    Raises:
        ProviderUnavailableError: a named provider does not load, or none can run the graph.
    """
    artifact = Artifact.read(folder, verify=False)
    statuses, results = run_providers(
        artifact,
        trials,
        named=tuple(named),
        made_for=plan.providers,
        runs_on=plan.runs_on(block),
        progress=progress,
    )
    switch = shapes.turning_point(block) or 0
    past_switch = switch if switch <= _FAR_SWITCH else 0
    length = min(_SENSITIVITY_LENGTH + past_switch, plan.longest)
    return Report(
        providers=statuses,
        cases=tuple(results),
        graph={**artifact.config["graph"], "sha256": sha256(artifact.model)},
        environment=runtime.environment(),
        sensitivity=sensitivities(block, length=length, seed=plan.seed),
        notes=tuple(artifact.config["notes"]),
    )


def _longest_that_fits(block: Attention, plan: Plan) -> tuple[int, list[str]]:
    """The longest sequence this machine has memory to prove, and a note when that is not all."""
    copies = max(plan.choose(block).score_copies.values())
    heads = block.num_heads + 3 * block.num_kv_heads
    # Inputs, outputs, float64 truth, and projected heads in both precisions.
    per_token = plan.batch * (28 * block.hidden_size + 16 * heads * block.head_dim)
    per_pair = plan.batch * copies * 4 * block.num_heads
    available = runtime.available_memory()
    usable = _MEMORY_SHARE * available
    if per_token * plan.longest + per_pair * plan.longest**2 <= usable:
        return plan.longest, []
    if per_pair:
        root = (per_token**2 + 4 * per_pair * usable) ** 0.5
        fitting = int((root - per_token) / (2 * per_pair))
    else:
        fitting = int(usable / per_token)
    scores = f"target {plan.target} holds the scores of all token pairs; " if per_pair else ""
    needed = (
        f"{scores}{plan.batch} x {plan.longest} tokens take about "
        f"{_gib(per_token * plan.longest + per_pair * plan.longest**2)}, and "
        f"{_gib(available)} are free here"
    )
    if plan.static or fitting < 1:
        shape = f"batch {plan.batch}, max_seq_len {plan.longest}"
        raise BadInputError(f"{shape} does not fit in memory: {needed}")
    return fitting, [f"proven only up to length {fitting} of {plan.longest}: {needed}"]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
