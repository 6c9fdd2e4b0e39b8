"""`Diagnosis`: what was found on a machine, and what was made of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rope_export.runtime.machine import Machine
from rope_export.runtime.onnxruntime_build import Onnxruntime, Provider
from rope_export.runtime.packages import Dependency
from rope_export.runtime.pytorch import PyTorch, Tf32


@dataclass(frozen=True)
class Target:
    """An export target on this machine.

    Attributes:
        opset: what its graphs are written in.
        ir_version: of the format, likewise.
        loads: whether the onnxruntime here loads that; None where nothing could be opened.
        runs: for every provider that loads and every dtype, the operator that attends in a plain
            block (causal, grouped heads); None where that was not asked, or without PyTorch.
    """

    opset: int
    ir_version: int
    loads: bool | None
    runs: dict[str, dict[str, str]] | None


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        rope_export: version of this package.
        machine: processor, memory, GPUs.
        torch: PyTorch, absent included.
        onnxruntime: which build, and what it loads.
        packages: onnx and the exporter's packages by version, None where absent.
        optional: packages that something here can work with, likewise.
        dependencies: what this package declares to need, each checked; None when it runs from a
            folder that is not installed, or without ``packaging``.
        providers: every execution provider, tried.
        targets: every export target.
        tf32: whether float32 may be rounded to TF32 on CUDA.
        problems: one line each, with what to do.
        notes: what is worth knowing and no problem.
    """

    rope_export: str
    machine: Machine
    torch: PyTorch
    onnxruntime: Onnxruntime
    packages: dict[str, str | None]
    optional: dict[str, str | None]
    dependencies: tuple[Dependency, ...] | None
    providers: dict[str, Provider]
    targets: dict[str, Target]
    tf32: Tf32
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As plain data, the verdict first."""
        return {"ok": self.ok, **asdict(self)}
