"""`ExportResult`: what was exported, where it is, and its proof."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rope_export.artifacts.files import MODEL
from rope_export.artifacts.report import Report


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: the artifact's folder.
        graph: target, operators, form chosen and why, as the report has it.
        notes: limits of the stored vectors and of the proof, in plain words.
        report: the proof; ``report.validated`` is False if it was not asked for.
    """

    path: Path
    graph: dict[str, Any]
    notes: tuple[str, ...]
    report: Report

    @property
    def ops(self) -> dict[str, int]:
        """Operators of the graph and how often each occurs, as ``domain::name``."""
        return dict(self.graph["ops"])

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL
