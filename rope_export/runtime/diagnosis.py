"""`diagnose`: what is installed here, what of it really works, and why the rest does not.

Everything is tried rather than looked up: providers are loaded, graphs opened, PyTorch imported.
Nothing here needs PyTorch or the packages of the exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rope_export.artifacts.targets import DTYPES, ENDPOINTS, IR_VERSIONS, OPSETS
from rope_export.artifacts.version import __version__
from rope_export.runtime import findings, packages, pytorch
from rope_export.runtime.machine import Machine
from rope_export.runtime.onnxruntime_build import Onnxruntime, Provider
from rope_export.runtime.providers import check_name
from rope_export.runtime.pytorch import PyTorch
from rope_export.runtime.state import Diagnosis as Diagnosis
from rope_export.runtime.state import Target as Target

GRAPHS = ("onnx", "onnx-ir", "onnxscript")
OPTIONAL = (
    "transformers", "rotary-embedding-torch", "matplotlib", "onnxruntime-genai", "flash-attn",
    "liger-kernel", "torchtune",
)  # fmt: skip


Attends = Callable[[str, str, str], str | None]
"""From a target, a provider and a dtype to the operator that attends in a plain block, or None."""


def diagnose(providers: Sequence[str] = (), *, attends: Attends | None = None) -> Diagnosis:
    """Look at everything that exporting, proving and serving depend on.

    Args:
        providers: execution providers that must load; one that does not is a problem. Without
            them the CPU must, and CUDA where there is an NVIDIA GPU.
        attends: knows the rules of the export targets (`lowering.choice.attending_operator`);
            without it, or without PyTorch, nothing is said of them.

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
        rope_export=__version__,
        machine=Machine.this(),
        torch=torch,
        onnxruntime=build,
        packages={name: packages.version_here(name) for name in GRAPHS},
        optional={name: packages.version_here(name) for name in OPTIONAL},
        dependencies=dependencies,
        providers=tried,
        targets={
            name: Target(
                opset,
                IR_VERSIONS[name],
                _loads(name, opset, build),
                _runs(name, tried, attends) if torch.usable and attends is not None else None,
            )
            for name, opset in OPSETS.items()
        },
        tf32=pytorch.tf32(torch.usable),
    )
    return replace(
        found,
        problems=tuple(findings.problems(found, asked=providers)),
        notes=tuple(findings.notes(found)),
    )


def _loads(target: str, opset: int, build: Onnxruntime) -> bool | None:
    if build.highest_opset is None or build.highest_ir_version is None:
        return None
    return build.too_new(opset, IR_VERSIONS[target]) is None


def _runs(
    target: str, tried: Mapping[str, Provider], attends: Attends
) -> dict[str, dict[str, str]]:
    runs: dict[str, dict[str, str]] = {}
    for provider in (name for name, state in tried.items() if state.loads):
        operators = {dtype: attends(target, provider, dtype) for dtype in DTYPES}
        runs[provider] = {dtype: found for dtype, found in operators.items() if found is not None}
    return runs
