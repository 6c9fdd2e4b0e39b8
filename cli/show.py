"""What the user sees: steps on stderr while it runs, the verdict on stdout at the end."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from rope_export.artifacts.report import Report


class Steps:
    """Prints each step with the time since the start on stderr."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        """Print one step."""
        click.echo(f"{time.monotonic() - self._start:7.1f} s  {message}", err=True)


class OutputError(Exception):
    """The result is there but could not be printed."""


class ReaderGoneError(Exception):
    """Whoever read stdout has gone, as ``head`` does."""


@contextmanager
def to_stdout(kept: str = "") -> Iterator[None]:
    """Print inside, and have it written at the end.

    Args:
        kept: said where it cannot be: what there is all the same.

    Raises:
        ReaderGoneError: the reader of stdout has gone.
        OutputError: stdout cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:  # click itself would exit with 1: "a comparison failed"
        raise ReaderGoneError from error
    except OSError as error:
        raise OutputError(f"stdout: {error.strerror}{kept}") from error


def show(report: Report, path: Path, *, as_json: bool, origin: str = "", then: str = "") -> None:
    """Print the report, with where the block came from and what to do next.

    Raises:
        ReaderGoneError: the reader of stdout has gone.
        OutputError: stdout cannot be written.
    """
    with to_stdout(f"; the artifact is at {path}"):
        if as_json:
            print_json(report, path)
        else:
            if origin:
                click.echo(origin)
            print_report(report, path)
            if then and report.passed:
                click.echo(f"next: {then}")


def finish(report: Report, out: Path, *, as_json: bool, origin: str = "") -> NoReturn:
    """Print the report of an export and what to do next, and leave with the exit code."""
    replayable = any(out.glob("test_data_set_*"))
    then = f"rope-export validate {shlex.quote(str(out))}  (on the machine it is deployed to)"
    show(report, out, as_json=as_json, origin=origin, then=then if replayable else "")
    sys.exit(0 if not report.validated or report.passed else 1)


def print_json(report: Report, path: Path) -> None:
    """Print the report as one JSON document."""
    document: dict[str, Any] = {"path": str(path), **report.to_json()}
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def print_report(report: Report, path: Path) -> None:
    """Print graph, providers, limits and verdict as a short table."""
    graph = report.graph
    rows = [
        ("artifact", f"{path}  ({_files(path)})"),
        (
            "graph",
            f"{graph['target']}, opset {graph['opset']}, {graph['dtype']}, "
            f"made for {' and '.join(graph['providers'])}{_oldest(graph)}",
        ),
        ("operators", _operators(graph["ops"])),
        ("rotation", graph["rotation"]),
    ]
    if graph.get("cache"):
        from rope_export.artifacts.report import cache_in_words

        rows.append(("cache", cache_in_words(graph)))
    rows += [("passed over", reason) for reason in graph["passed_over"]]
    rows += [("at run time", branch) for branch in graph["branches"]]
    for label, text in rows:
        click.echo(f"{label:<12} {text}")
    for runner in graph.get("race", []):
        times = ", ".join(f"{phase} {ms:.4g} ms" for phase, ms in runner["milliseconds"].items())
        won = "  <- kept" if runner["won"] else ""
        name = f"{runner['target']}, {runner['form']}"
        click.echo(f"{'race':<12} {name:<28} {runner['out'] or times}{won}")
    if report.validated:
        click.echo()
        _print_providers(report)
        if report.loss is not None:
            loss, case = report.loss
            click.echo(
                f"loss         the integer cache changes the output by {loss:.1e} at most "
                f"({case.name} {case.shape}); not judged"
            )
    for note in report.notes:
        click.echo(f"note         {note}")
    click.echo()
    click.echo(_verdict(report))


def _oldest(graph: Mapping[str, Any]) -> str:
    """The oldest onnxruntime, of which earlier artifacts say nothing."""
    oldest = graph.get("onnxruntime")
    return f", onnxruntime >={oldest}" if oldest else ""


def _print_providers(report: Report) -> None:
    click.echo(
        f"{'provider':<12} {'worst case':<28} {'error':>9} {'eager':>9} {'tolerance':>9}  nodes"
    )
    for name, status in report.providers.items():
        worst = report.worst(name)
        if worst is None or status.status != "ok":
            click.echo(f"{name:<12} {status.status}: {status.reason}")
            continue
        shape = f"{worst.name} {worst.shape}"
        placed = ", ".join(f"{count} on {ep}" for ep, count in status.nodes.items())
        click.echo(
            f"{name:<12} {shape:<28} {worst.errors.rel:>9.1e} {worst.eager.rel:>9.1e} "
            f"{worst.tolerance.rel:>9.1e}  {placed}"
        )
    told: set[tuple[str, str | None]] = set()  # what keeps all cases from running is said once
    for case in report.cases:
        if not case.passed and (case.provider, case.reason) not in told:
            told |= {(case.provider, case.reason)} if case.reason else set()
            why = case.reason or (
                f"error {case.errors.rel:.1e} (tolerance {case.tolerance.rel:.1e}), worst row "
                f"{case.errors.row:.1e} (tolerance {case.tolerance.row:.1e})"
            )
            tensor = "" if case.tensor == "output" else f" ({case.tensor})"
            click.echo(f"FAILED       {case.provider}: {case.name} {case.shape}{tensor}: {why}")


def _verdict(report: Report) -> str:
    if not report.validated:
        return "NOT VALIDATED: exported, but never run"
    ran = [name for name, status in report.providers.items() if status.status == "ok"]
    if report.passed:
        return (
            f"PASSED: {len(report.cases)} comparisons with float64 truth and eager PyTorch "
            f"on {' and '.join(ran)}"
        )
    return "FAILED: the graph does not agree with the PyTorch module it was exported from"


def _operators(ops: dict[str, int]) -> str:
    fused = {name: n for name, n in ops.items() if "::" in name or name in _NOTABLE}
    other = sum(ops.values()) - sum(fused.values())
    listed = [f"{n} {name}" if n > 1 else name for name, n in reversed(fused.items())]
    return " + ".join([*listed, f"{other} shape and elementwise"] if other else listed)


_NOTABLE = {"Attention", "RotaryEmbedding", "MatMul", "Softmax"}


def _files(path: Path) -> str:
    vectors = list(path.glob("test_data_set_*/*.pb"))
    model = list(path.glob("model.onnx*"))
    count = len({file.parent for file in vectors})
    return f"model {_size(model)}, {count} test vectors {_size(vectors)}"


def _size(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"
