"""Latency and memory over length, as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rope_export.bench.results import Measurement, Results
from rope_export.errors import BadInputError

_LEAST_BYTES = 2**16  # drawn for less, nothing included: the axis is logarithmic
_FORMATS = (".png", ".svg", ".pdf")


def check(file: Path) -> None:
    """Check that a plot can be written to ``file``, before anything is measured.

    Raises:
        BadInputError: matplotlib is missing, or the name or folder is of no use.
    """
    if file.suffix.lower() not in _FORMATS:
        raise BadInputError(f"plot must be a {', '.join(_FORMATS)} file, got {str(file)!r}")
    if not file.resolve().parent.is_dir():
        raise BadInputError(f"plot must be in a folder that exists, got {str(file)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInputError("plot needs matplotlib, which is not installed: pip install matplotlib")


def draw(results: Results, file: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the picture: a row of latency and memory for each phase.

    Args:
        results: what is drawn.
        file: a .png, .svg or .pdf.
        metadata: written into the file, under keys that its format has.

    Raises:
        BadInputError: as of `check`.
    """
    check(file)
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(phase for phase, _ in results.cases()))
    figure = Figure(figsize=(13, 4.2 * len(phases)), layout="constrained")
    axes = figure.subplots(len(phases), 2, squeeze=False)
    names = list(dict.fromkeys(m.contender for m in results.measurements if m.seconds))
    colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for row, phase in zip(axes, phases, strict=True):
        for name in names:
            measured = [
                m
                for m in results.measurements
                if (m.phase, m.contender) == (phase, name) and m.seconds
            ]
            if measured:
                _lines(row, measured, name, colors[name])
        _label(row, phase, sorted({length for _, length in results.cases()}))
    handles = {line.get_label(): line for axis in axes[:, 0] for line in axis.containers}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)
    machine = results.environment
    figure.suptitle(
        f"{results.title}, {results.dtype}, batch {results.batch}, {results.provider}\n"
        f"{machine.get('cpu')}, {machine.get('cpus')} cores, torch {machine.get('torch')}, "
        f"onnxruntime {machine.get('onnxruntime')}, {results.date}",
        fontsize=10,
    )
    figure.savefig(file, dpi=120, metadata=dict(metadata or {}))


def _lines(row: Any, measured: list[Measurement], name: str, color: str) -> None:
    lengths = [m.length for m in measured]
    medians = [1e3 * m.median for m in measured]
    spread = [
        [1e3 * (m.median - min(m.seconds)) for m in measured],
        [1e3 * (max(m.seconds) - m.median) for m in measured],
    ]
    row[0].errorbar(lengths, medians, spread, marker="o", color=color, label=name, capsize=2)
    peaks = [max(m.peak_extra_bytes, _LEAST_BYTES) / 2**20 for m in measured]
    row[1].plot(lengths, peaks, marker="o", color=color, label=name)


def _label(row: Any, phase: str, lengths: list[int]) -> None:
    for axis, title, unit in (
        (row[0], f"{phase}: latency", "ms, median and spread"),
        (row[1], f"{phase}: peak extra memory", "MiB"),
    ):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_title(title)
        axis.set_xlabel("tokens")
        axis.set_ylabel(unit)
        axis.grid(visible=True, which="major", alpha=0.3)
