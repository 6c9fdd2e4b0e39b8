"""``rope-export doctor``: what is installed here, what of it works, and why the rest does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from rope_export.errors import ProviderUnavailableError

from . import show
from .options import json_option, provider_option

if TYPE_CHECKING:
    from rope_export.runtime.diagnosis import Diagnosis

Row = tuple[str, str]
_PROBLEM = 3


@click.command(
    epilog="""\b
Exit codes: 0 all in order, 3 a problem, or a provider asked for by name does not load.
Examples:
  rope-export doctor
  rope-export doctor --provider cuda --json"""
)
@provider_option("This provider must load; repeatable.")
@json_option()
def doctor(providers: tuple[str, ...], as_json: bool) -> None:
    """Say what is installed here, what of it really works, and what to do about the rest.

    Providers are loaded and graphs opened, not looked up. PyTorch need not be installed. An NVIDIA
    GPU that onnxruntime cannot use is a problem, and so is whatever export or validate would fail
    for. A version newer than any this was tested with is a note.
    """
    try:
        from rope_export.lowering.choice import attending_operator
        from rope_export.runtime.diagnosis import diagnose
    except ImportError as error:  # numpy, without which nothing of this package runs
        package = (error.name or "numpy").partition(".")[0]
        raise ProviderUnavailableError(
            f"nothing can run here: {error}; pip install {package}"
        ) from error

    found = diagnose(providers, attends=attending_operator)
    with show.to_stdout():
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        else:
            for label, text in _rows(found):
                click.echo(f"{label:<12} {text}".rstrip())
            for line in _verdict(found):
                click.echo(line)
    sys.exit(0 if found.ok else _PROBLEM)


def _rows(found: Diagnosis) -> Iterator[Row]:
    machine, build = found.machine, found.onnxruntime
    yield "rope-export", f"{found.rope_export}, Python {machine.python} on {machine.platform}"
    yield "machine", _machine(found)
    yield "gpu", _gpus(found)
    yield "torch", _torch(found)
    for name, version in found.packages.items():
        yield name, version or "not installed"
    yield "onnxruntime", _onnxruntime(found)
    there = [f"{name} {version}" for name, version in found.optional.items() if version]
    absent = [name for name, version in found.optional.items() if not version]
    yield "optional", f"{', '.join(there) or 'none'}; not installed: {', '.join(absent) or 'none'}"
    yield "dependencies", _dependencies(found)
    yield "tf32", _tf32(found)
    yield "", ""
    yield "provider", "state"
    for name, provider in found.providers.items():
        without = ", without cuDNN" if provider.cudnn is False else ""
        yield name, f"loads{without}" if provider.loads else f"does not load: {provider.reason}"
        if provider.remedy:
            yield "", f"to load it: {provider.remedy}"
    yield "", ""
    loaded = f"onnxruntime loads up to opset {build.highest_opset}, IR {build.highest_ir_version}"
    limit = loaded if build.highest_opset else "onnxruntime loads nothing"
    yield "target", f"opset, in IR {_formats(found)}; {limit}"
    for name, target in found.targets.items():
        yield name, f"{target.opset}{_runs(target.runs)}"
    for note in found.notes:
        yield "note", note
    yield "", ""


def _machine(found: Diagnosis) -> str:
    machine = found.machine
    cpus = f"{machine.cpus} CPUs"
    if machine.usable_cpus != machine.cpus:
        cpus += f" ({machine.usable_cpus} usable)"
    memory = "memory unknown"
    if machine.memory is not None and machine.available_memory is not None:
        free = machine.available_memory / 2**30
        memory = f"{machine.memory / 2**30:.1f} GiB of memory, {free:.1f} GiB available"
    return f"{machine.cpu}, {cpus}, {memory}"


def _gpus(found: Diagnosis) -> str:
    names = [f"{d.name}, compute capability {d.compute_capability}" for d in found.torch.devices]
    text = "; ".join(names or found.machine.gpus) or "no NVIDIA GPU visible"
    return f"{text}, driver {found.machine.driver}" if found.machine.driver else text


def _torch(found: Diagnosis) -> str:
    torch = found.torch
    if torch.version is None:
        return "not installed: fine for validate and Decoder; needed for export"
    if torch.reason is not None:
        return f"{torch.version}, does not import: {torch.reason}"
    built = f"built for CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    count = len(torch.devices)
    return f"{torch.version}, {built}, {count or 'no'} CUDA device{'' if count == 1 else 's'}"


def _onnxruntime(found: Diagnosis) -> str:
    build = found.onnxruntime
    names = [f"{name} {version}" for name, version in build.distributions.items()]
    source = f"from {' and '.join(names)}" if names else "from no distribution"
    if build.version is None:
        return f"does not import: {build.reason}" if names else "not installed"
    built = f"built for CUDA {build.cuda}" if build.cuda else "built without CUDA"
    return f"{build.version}, {source}, {built}"


def _dependencies(found: Diagnosis) -> str:
    if found.dependencies is None:
        return "not checked"
    wrong = [each for each in found.dependencies if each.state != "ok"]
    text = f"{len(found.dependencies) - len(wrong)} of {len(found.dependencies)} in order"
    named = ", ".join(
        f"{d.name} missing" if d.state == "missing" else f"{d.found} {d.installed} not {d.wanted}"
        for d in wrong
    )
    return f"{text}; {named}" if wrong else text


def _tf32(found: Diagnosis) -> str:
    tf32 = found.tf32
    parts = ["off in sessions of rope-export on CUDA"]
    if found.torch.usable:
        parts.append(
            f"PyTorch: matmul {_on(tf32.matmul)} (precision {tf32.matmul_precision or 'unknown'}), "
            f"cudnn {_on(tf32.cudnn)}"
        )
    if tf32.override is not None:
        parts.append(f"NVIDIA_TF32_OVERRIDE={tf32.override}")
    return "; ".join(parts)


def _on(allowed: bool | None) -> str:
    return {True: "on", False: "off", None: "unknown"}[allowed]


def _formats(found: Diagnosis) -> str:
    """``10 (primitive 8)``: what most targets write, and the others."""
    of_targets = {name: target.ir_version for name, target in found.targets.items()}
    most = max(of_targets.values())
    others = ", ".join(f"{name} {ir}" for name, ir in of_targets.items() if ir != most)
    return f"{most} ({others})" if others else str(most)


def _runs(runs: dict[str, dict[str, str]] | None) -> str:
    """``: cpu float32, float16 by GroupQueryAttention``: what a plain block becomes here."""
    parts = []
    for provider, operators in (runs or {}).items():
        by_operator: dict[str, list[str]] = {}
        for dtype, operator in operators.items():
            name = "arithmetic" if operator == "Softmax" else operator.rpartition("::")[2]
            by_operator.setdefault(name, []).append(dtype)
        forms = (f"{', '.join(dtypes)} by {name}" for name, dtypes in by_operator.items())
        parts.append(f"{provider} {'; '.join(forms)}")
    return f": {' | '.join(parts)}" if parts else ""


def _verdict(found: Diagnosis) -> Iterator[str]:
    for problem in found.problems:
        yield f"PROBLEM: {problem}"
    if found.ok:
        loaded = [name for name, provider in found.providers.items() if provider.loads]
        exports = "export, validate and Decoder" if found.torch.usable else "validate and Decoder"
        yield f"OK: {exports} on {' and '.join(loaded)}"
