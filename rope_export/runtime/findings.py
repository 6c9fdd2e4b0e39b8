"""What a diagnosis means: problems, each with what to do about it, and notes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rope_export.runtime import cudnn, packages, required
from rope_export.runtime.machine import gpus_are_hidden
from rope_export.runtime.packages import ONNXRUNTIME, Dependency
from rope_export.runtime.pytorch import OVERRIDE
from rope_export.runtime.state import Diagnosis
from rope_export.runtime.tested import newer_than_tested


def problems(found: Diagnosis, *, asked: Collection[str]) -> Iterator[str]:
    """What keeps this machine from its work, one line each.

    Args:
        found: what there is.
        asked: providers that must load.
    """
    yield from _of_dependencies(found)
    yield from _of_onnxruntime(found)
    if found.torch.reason is not None:
        yield (
            f"torch {found.torch.version} is installed but does not import "
            f"({found.torch.reason}): install it again, as pytorch.org says"
        )
    yield from _of_providers(found, asked)
    yield from _of_targets(found)
    if (found.tf32.override or "0").strip() not in ("", "0"):
        yield (
            f"{OVERRIDE}={found.tf32.override} forces TF32 on every NVIDIA library, so that "
            f"float32 on CUDA is not proven as float32: unset {OVERRIDE}"
        )


def notes(found: Diagnosis) -> Iterator[str]:
    """What is worth knowing and no problem, one line each."""
    if packages.version_of(packages.OURSELVES) is None:
        yield (
            "rope-export runs from a folder that is not installed: what it depends on is not "
            "compared with what is here"
        )
    absent = [d.name for d in found.dependencies or () if _is_of_export_alone(d, found)]
    if absent:
        yield (
            f"export is not possible here: {_listed(absent)} {_are(absent)} not installed; "
            "validate and Decoder need none of it"
        )
    if "onnx-ir" in absent:
        yield "inspect of graphs needs onnx-ir: pip install onnx-ir"
    for each in found.dependencies or ():
        if each.state == "ok" and each.found != each.name:
            yield f"{each.found} {each.installed} stands in for {each.name}"
    if found.dependencies is not None:  # then there is what compares versions
        yield from newer_than_tested(_versions(found))
    if found.onnxruntime.version is not None:
        yield from required.limits(found.onnxruntime.version)
    if any(state.cudnn is False for state in found.providers.values()):
        yield (
            f"{cudnn.LIBRARY} does not load: on CUDA, graphs with MultiHeadAttention (float32 "
            f"blocks), convolutions or ReduceMax do not run: {cudnn.remedy()}"
        )
    if gpus_are_hidden():
        yield "CUDA_VISIBLE_DEVICES hides every GPU from this process"
    elif found.torch.cuda and found.machine.gpus and not found.torch.devices:
        yield f"torch is built for CUDA {found.torch.cuda} and sees no GPU: its driver may be older"
    for remark in found.torch.remarks:
        yield f"torch says: {remark}"


def _versions(found: Diagnosis) -> dict[str, str | None]:
    there = {"torch": found.torch.version, "onnxruntime": found.onnxruntime.version}
    return found.packages | found.optional | there


def _of_dependencies(found: Diagnosis) -> Iterator[str]:
    if found.dependencies is None and packages.version_of(packages.OURSELVES) is not None:
        yield "packaging is not installed, so versions are not compared: pip install packaging"
    for each in found.dependencies or ():
        if each.state == "outside":
            yield (
                f"{each.found} {each.installed} is installed, {each.wanted} is needed: {each.fix}"
            )
        elif each.state == "missing" and not each.name.startswith(ONNXRUNTIME):
            if _is_of_export_alone(each, found):
                continue
            what = "is not installed"
            if each.installed is not None:
                what = f"{each.installed} is installed, but its module is gone"
            yield f"{each.name} {what}: {each.fix}"


def _is_of_export_alone(each: Dependency, found: Diagnosis) -> bool:
    """Whether it is missing and not missed: where PyTorch is not, nobody means to export."""
    absent = each.state == "missing" and each.name in packages.OF_EXPORT_ALONE
    return absent and found.torch.version is None


def _of_onnxruntime(found: Diagnosis) -> Iterator[str]:
    build = found.onnxruntime
    declared = [d for d in found.dependencies or () if d.name.startswith(ONNXRUNTIME)]
    if len(build.distributions) > 1:
        names = list(build.distributions)
        wanted = [d.name for d in declared if d.name in names]
        keep = (wanted or [name for name in names if "gpu" in name] or names)[0]
        yield (
            f"{_listed(names)} are installed together and overwrite each other's files: "
            f"pip uninstall -y {' '.join(names)} && pip install {keep}=={build.distributions[keep]}"
        )
    elif build.version is None and build.distributions:
        ((name, version),) = build.distributions.items()
        yield (
            f"{name} {version} is installed but does not import ({build.reason}): "
            f"pip install --force-reinstall --no-deps {name}=={version}"
        )
    elif build.version is None:
        command = declared[0].fix if declared else "pip install onnxruntime-gpu (or onnxruntime)"
        yield f"onnxruntime is not installed: {command}"


def _of_providers(found: Diagnosis, asked: Collection[str]) -> Iterator[str]:
    needed = set(asked)
    if found.onnxruntime.version is not None and found.packages["onnx"]:  # else that is said
        needed |= {"cpu"}
        needed |= {"cuda"} if found.machine.gpus or found.torch.devices else set()
    for name, state in found.providers.items():
        if name in needed and not state.loads:
            yield f"provider {name} does not load: {state.why}"


def _of_targets(found: Diagnosis) -> Iterator[str]:
    build = found.onnxruntime
    declared = [d.fix for d in found.dependencies or () if d.name.startswith(ONNXRUNTIME)]
    command = declared[0] if declared else "pip install --upgrade onnxruntime"
    for name, target in found.targets.items():
        if target.loads is False:
            limits = build.too_new(target.opset, target.ir_version)
            yield f"target {name} writes {limits}: {command}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
