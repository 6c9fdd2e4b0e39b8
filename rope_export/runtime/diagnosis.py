"""`diagnose`: what is installed here, what of it really works, and why the rest does not.

Everything is tried rather than looked up: providers are loaded, graphs opened, PyTorch imported.
Nothing here needs PyTorch or the packages of the exporter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import rope_export
from rope_export.errors import BadInputError
from rope_export.runtime import findings, packages, pytorch
from rope_export.runtime.machine import Machine
from rope_export.runtime.onnxruntime_build import Onnxruntime, Provider
from rope_export.runtime.packages import Dependency
from rope_export.runtime.providers import ENDPOINTS, check_name
from rope_export.runtime.pytorch import PyTorch, Tf32
from rope_export.targets import IR_VERSION, OPSETS

GRAPHS = ("onnx", "onnx-ir", "onnxscript")
OPTIONAL = (
    "transformers", "rotary-embedding-torch", "matplotlib", "onnxruntime-genai", "flash-attn",
    "liger-kernel", "torchtune",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """An export target on this machine.

    Attributes:
        opset: what its graphs are written in.
        loads: whether the onnxruntime here loads that; None where nothing could be opened.
        runs: for every provider that loads and every dtype, the operator that attends in a plain
            block (causal, grouped heads); None without PyTorch, on which the rules depend.
    """

    opset: int
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
        ir_version: of the format, in which every target writes.
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
    ir_version: int
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


def diagnose(providers: Sequence[str] = ()) -> Diagnosis:
    """Look at everything that exporting, proving and serving depend on.

    Args:
        providers: execution providers that must load; one that does not is a problem. Without
            them the CPU must, and CUDA where there is an NVIDIA GPU.

    Raises:
        BadInputError: there is no such provider.
    """
    for name in providers:
        check_name(name)
    try:
        dependencies = packages.dependencies()
    except ModuleNotFoundError:
        dependencies = None
    build = Onnxruntime.here()
    # Before PyTorch brings CUDA libraries of its own: where a graph is served there are none.
    tried = {name: Provider.tried(name, build) for name in ENDPOINTS}
    torch = PyTorch.here()
    found = Diagnosis(
        rope_export=rope_export.__version__,
        machine=Machine.this(),
        torch=torch,
        onnxruntime=build,
        packages={name: packages.version_here(name) for name in GRAPHS},
        optional={name: packages.version_here(name) for name in OPTIONAL},
        dependencies=dependencies,
        providers=tried,
        targets={
            name: Target(opset, _loads(opset, build), _runs(name, tried) if torch.usable else None)
            for name, opset in OPSETS.items()
        },
        ir_version=IR_VERSION,
        tf32=pytorch.tf32(torch.usable),
    )
    return replace(
        found,
        problems=tuple(findings.problems(found, asked=providers)),
        notes=tuple(findings.notes(found)),
    )


def _loads(opset: int, build: Onnxruntime) -> bool | None:
    if build.highest_opset is None or build.highest_ir_version is None:
        return None
    return opset <= build.highest_opset and build.highest_ir_version >= IR_VERSION


def _runs(target: str, tried: Mapping[str, Provider]) -> dict[str, dict[str, str]] | None:
    try:
        from rope_export.lowering import rules
    except ImportError:  # PyTorch is there, what the exporter needs beside it is not
        return None
    runs: dict[str, dict[str, str]] = {}
    for provider in (name for name, state in tried.items() if state.loads):
        operators = runs.setdefault(provider, {})
        for dtype in rules.DTYPES:
            try:
                choice = rules.choose(
                    target, [replace(rules.PLAIN, provider=provider, dtype=dtype)]
                )
            except BadInputError:
                continue
            operators[dtype] = choice.form.attention.removeprefix("::")
    return runs
