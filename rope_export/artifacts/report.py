"""`Report`: the proof as data, as JSON and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rope_export.artifacts.cache_layout import CacheLayout
from rope_export.artifacts.comparison import Bound, Errors
from rope_export.artifacts.files import REPORT, REPORT_TEXT, write_json, write_text

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class CaseResult:
    """One case on one provider.

    Attributes:
        provider: where it ran.
        name: what it covers.
        tensor: the graph output compared.
        batch: rows.
        sequence: new tokens.
        past: cached tokens before them, of the longest row.
        tokens: how many were compared: all that are no padding, or a sample of a long sequence.
        errors: the provider against float64 truth.
        bound: eager PyTorch against float64 truth, and what the provider is held to.
        reason: why it could not run, or None.
    """

    provider: str
    name: str
    tensor: str
    batch: int
    sequence: int
    past: int
    tokens: int
    errors: Errors
    bound: Bound
    reason: str | None = None

    @property
    def eager(self) -> Errors:
        """Eager PyTorch against float64 truth."""
        return self.bound.eager

    @property
    def tolerance(self) -> Errors:
        """What the provider is held to."""
        return self.bound.tolerance

    @property
    def shape(self) -> str:
        """``[batch, sequence]``, and the past where there is one."""
        after = f" after {self.past}" if self.past else ""
        return f"[{self.batch}, {self.sequence}]{after}"

    @property
    def passed(self) -> bool:
        """Whether it ran and lies within the tolerance."""
        return self.reason is None and self.errors.within(self.tolerance)

    def to_json(self) -> dict[str, Any]:
        """The case as ``report.json`` has it; an infinite error is null."""
        return {
            "provider": self.provider,
            "name": self.name,
            "tensor": self.tensor,
            "batch": self.batch,
            "sequence": self.sequence,
            "past": self.past,
            "tokens": self.tokens,
            "max_abs_error": _finite(self.errors.max_abs),
            "rel_error": _finite(self.errors.rel),
            "row_rel_error": _finite(self.errors.row),
            "eager_max_abs_error": _finite(self.eager.max_abs),
            "eager_rel_error": _finite(self.eager.rel),
            "eager_row_rel_error": _finite(self.eager.row),
            "tolerance": _finite(self.tolerance.rel),
            "row_tolerance": _finite(self.tolerance.row),
            "passed": self.passed,
            "reason": self.reason,
            **({} if self.bound.loss is None else {"loss": self.bound.loss}),
        }


@dataclass(frozen=True)
class ProviderStatus:
    """What became of one provider.

    Attributes:
        status: ``"ok"`` if the graph ran on it, else ``"unavailable"``.
        reason: why it is unavailable, or None.
        nodes: how many nodes each execution provider of its session really got.
    """

    status: str
    reason: str | None = None
    nodes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The proof that an exported graph equals its PyTorch block, or the evidence that it does not.

    Attributes:
        providers: by name.
        cases: what was compared.
        graph: what was exported: target, opset, operators, form chosen and why.
        environment: versions and platform.
        sensitivity: what typical defects would have shown on these inputs (relative error).
        notes: limits of the proof, in plain words.
        validated: False when no provider was run.
    """

    providers: dict[str, ProviderStatus]
    cases: tuple[CaseResult, ...]
    graph: dict[str, Any]
    environment: dict[str, Any]
    sensitivity: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    validated: bool = True

    @property
    def passed(self) -> bool:
        """Whether at least one provider ran and every comparison on every one passed."""
        ran = any(status.status == "ok" for status in self.providers.values())
        return self.validated and ran and bool(self.cases) and all(c.passed for c in self.cases)

    def worst(self, provider: str) -> CaseResult | None:
        """The case of ``provider`` closest to its tolerance, or furthest beyond it."""
        cases = [case for case in self.cases if case.provider == provider]
        return max(cases, key=_closeness, default=None)

    @property
    def loss(self) -> tuple[float, CaseResult] | None:
        """The largest loss by a cache of integers, and its case; loud inputs are left aside."""
        found = [
            (case.bound.loss, case)
            for case in self.cases
            if case.bound.loss is not None and "loud" not in case.name
        ]
        return max(found, key=lambda each: each[0], default=None)

    def to_json(self) -> dict[str, Any]:
        """The report as ``report.json`` has it."""
        return {
            "passed": self.passed,
            "validated": self.validated,
            "providers": {name: asdict(status) for name, status in self.providers.items()},
            "cases": [case.to_json() for case in self.cases],
            "sensitivity": self.sensitivity,
            "notes": list(self.notes),
            "graph": self.graph,
            "environment": self.environment,
        }

    def to_markdown(self) -> str:
        """The report for people."""
        return "\n".join(_markdown(self)) + "\n"

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``."""
        write_json(folder / REPORT, self.to_json())
        write_text(folder / REPORT_TEXT, self.to_markdown())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _closeness(case: CaseResult) -> float:
    if case.reason is not None:
        return math.inf
    return max(
        case.errors.rel / case.tolerance.rel,
        case.errors.row / case.tolerance.row,
    )


def cache_in_words(graph: dict[str, Any]) -> str:
    """What a token takes in the cache, from the graph's part of a report."""
    layout = CacheLayout.from_json(graph["cache"])
    element = _BYTES.get(graph["dtype"], 4)
    size = layout.bytes_of_token(element)
    text = f"{layout.dtype or graph['dtype']}, {size:,} bytes a token"
    if layout.dtype is None:
        return text
    whole = replace(layout, dtype=None).bytes_of_token(element)
    return f"{text} (in {graph['dtype']} {whole:,})"


def _verdict(report: Report) -> str:
    if not report.validated:
        return "NOT VALIDATED: exported without running it"
    if report.passed:
        return "PASSED: every comparison is within its tolerance"
    failed = sum(not case.passed for case in report.cases)
    if failed:
        return f"FAILED: {failed} of {len(report.cases)} comparisons"
    return "FAILED: nothing was compared"


def _race(runners: list[dict[str, Any]]) -> list[str]:
    """All lowerings that were timed, and why others were not."""
    if not runners:
        return []
    lines = ["## Race", "", "| lowering | attention | rotation | median of a step | peak memory |"]
    lines += ["|---|---|---|---|---|"]
    for runner in runners:
        times, peaks = (
            ", ".join(f"{phase} {value:.4g} {unit}" for phase, value in runner[key].items())
            for key, unit in (("milliseconds", "ms"), ("peak_extra_mib", "MiB"))
        )
        name = f"{runner['target']}, {runner['form']}"
        lines.append(
            f"| {f'**{name}**' if runner['won'] else name} | {runner['attention']} "
            f"| {runner['rotation'] or 'within'} | {runner['out'] or times} | {peaks} |"
        )
    return [*lines, ""]


def _losses(report: Report) -> list[str]:
    """What the rounding of a cache changes, apart from whether the graph computes it right."""
    known = {
        (case.name, case.shape): case.bound.loss
        for case in report.cases
        if case.bound.loss is not None
    }
    if not known:
        return []
    lines = ["", "## Loss of the integer cache", ""]
    lines += [
        "Relative L2 of the output in float64 with this cache against float64 with a cache of "
        "numbers: what the integers cost, not judged. Loud inputs are so large that most keys are "
        "clipped.",
        "",
        "| case | shape | loss |",
        "|---|---|--:|",
    ]
    return lines + [f"| {name} | {shape} | {loss:.2e} |" for (name, shape), loss in known.items()]


def _sizes(ranges: dict[str, list[int | None]], proven: dict[str, list[int]]) -> str:
    """What every label may be, and what of it was compared."""
    parts = []
    for label, (low, high) in ranges.items():
        text = f"{label} {low} and more" if high is None else f"{label} {low} … {high}"
        if label in proven:
            text += f" (proven {proven[label][0]} … {proven[label][1]})"
        parts.append(text)
    return ", ".join(parts)


def _markdown(report: Report) -> list[str]:
    graph = report.graph
    lines = [f"# {graph.get('name', 'attention block')}", "", f"**{_verdict(report)}**", ""]
    lines += ["## Graph", ""]
    lines += [
        f"- target `{graph['target']}`, opset {graph['opset']}, IR {graph['ir_version']}, "
        f"dtype {graph['dtype']}, made for {', '.join(graph['providers'])}",
        f"- attention `{graph['attention']}`, rotation `{graph['rotation']}`",
    ]
    if graph.get("onnxruntime"):
        lines.append(f"- runs in onnxruntime {graph['onnxruntime']} and later")
    if graph.get("cache"):
        lines.append(f"- cache: {cache_in_words(graph)}")
    if graph.get("ranges"):
        lines.append(f"- sizes: {_sizes(graph['ranges'], graph.get('proven', {}))}")
    lines += [f"- passed over: {reason}" for reason in graph["passed_over"]]
    lines += [f"- at run time: {branch}" for branch in graph["branches"]]
    operators = ", ".join(f"{count} `{name}`" for name, count in graph["ops"].items())
    lines += [f"- operators: {operators}", f"- `model.onnx` SHA-256 `{graph['sha256']}`", ""]
    lines += _race(graph.get("race", []))
    lines += ["## Providers", "", "| provider | status | nodes really placed |", "|---|---|---|"]
    for name, status in report.providers.items():
        placed = ", ".join(f"{n} on {ep}" for ep, n in status.nodes.items()) or "none"
        why = f": {status.reason}" if status.reason else ""
        lines.append(f"| {name} | {status.status}{why} | {placed} |")
    if report.cases:
        lines += ["", "## Comparisons", ""]
        lines += ["Relative L2 errors against float64 truth on the same rounded weights.", ""]
        lines += [
            "| provider | case | tensor | batch | length | past | tokens | error | eager's "
            "| tolerance | worst token | its tolerance | max abs | verdict |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
    for case in report.cases:
        verdict = "ok" if case.passed else f"**FAILED** {case.reason or ''}".strip()
        lines.append(
            f"| {case.provider} | {case.name} | {case.tensor} | {case.batch} | {case.sequence} "
            f"| {case.past} | {case.tokens} | {case.errors.rel:.2e} | {case.eager.rel:.2e} "
            f"| {case.tolerance.rel:.2e} | {case.errors.row:.2e} | {case.tolerance.row:.2e} "
            f"| {case.errors.max_abs:.2e} | {verdict} |"
        )
    lines += _losses(report)
    if report.sensitivity:
        lines += ["", "## What these inputs would have shown", "", "| defect | relative error |"]
        lines += ["|---|--:|"]
        lines += [f"| {name} | {value:.1e} |" for name, value in report.sensitivity.items()]
    if report.notes:
        lines += ["", "## Limits of this proof", ""]
        lines += [f"- {note}" for note in report.notes]
    lines += ["", "## Environment", ""]
    lines += [f"- {name}: {value}" for name, value in report.environment.items()]
    return lines
