"""Shared fixtures: the command line, here or in a process of its own, and one exported block."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import mutants
import pytest
import torch
from commands import COMMAND, Run
from fake_cuda import FakeCuda, libraries
from rope_export._cli import run as run_command
from torch.onnx._internal.exporter import _registration

from rope_export import ExportResult, export, runtime


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> Iterator[None]:
    """PyTorch reads the sources of all its ONNX functions at every export: a third of its time."""
    kind = _registration.ONNXRegistry
    read = functools.cache(kind.from_torchlib)

    def from_torchlib(*given: object, **named: object) -> _registration.ONNXRegistry:
        known, registry = read(*given, **named), kind()
        registry._opset_version = known.opset_version
        registry.functions = {target: [*found] for target, found in known.functions.items()}
        return registry

    composite = torch._export.utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "from_torchlib", staticmethod(from_torchlib))
        # Likewise all operators it knows, which it looks up some fifty times for each graph.
        once = functools.cache(composite._materialize_cpp_cia_ops)
        patch.setattr(composite, "_materialize_cpp_cia_ops", once)
        # It registers ten thousand kernels for each graph, and works out an annotation each time.
        patch.setattr(torch._ops, "Callable", Annotation)
        yield


class _Unread(type):
    def __getitem__(cls, _: object) -> type:
        return cls

    def __instancecheck__(cls, value: object) -> bool:
        return callable(value)


class Annotation(metaclass=_Unread):
    """In the place of ``Callable`` in annotations that nobody reads."""


@pytest.fixture(scope="session", autouse=True)
def collector_leaves_libraries_alone() -> None:
    """What PyTorch and transformers made when they were imported stays; it need not be searched."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """Run ``rope-export`` in a process and an empty folder of its own."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300} | options
        return subprocess.run([*COMMAND, *arguments], check=False, **options)

    return run


@pytest.fixture
def cli_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """The same in this process, which has loaded PyTorch: for all that is not about processes."""

    def run(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            with pytest.raises(SystemExit) as stopped:
                run_command(list(arguments))
        out, err = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return subprocess.CompletedProcess(arguments, stopped.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def proven_block(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportResult]:
    """The small block in a target and a dtype, proven; copy it before changing anything."""
    root = tmp_path_factory.mktemp("proven")

    @functools.cache
    def made(target: str = "ort", dtype: str = "float32") -> ExportResult:
        folder = root / f"{target}-{dtype}" / "block"
        return export(mutants.block(dtype), folder, target=target, validate=True)

    return made


@pytest.fixture(scope="session")
def artifact_of_block(proven_block: Callable[..., ExportResult]) -> ExportResult:
    """That block as it is exported by default."""
    return proven_block()


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> mutants.Exports:
    """Blocks with a cache, exported when they are first asked for."""
    return mutants.Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def fake_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries that stand in for CUDA's, where a compiler and onnxruntime-gpu are."""
    provider = runtime.providers.library_folder() / runtime.providers.CUDA_LIBRARY
    reason = libraries.why_not(provider)
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("fake_cuda")
    libraries.build(provider, folder)
    return folder


@pytest.fixture(scope="session")
def cuda(fake_libraries: Path) -> Iterator[dict[bool, FakeCuda]]:
    """Processes with a CUDA device that is none, without cuDNN and with it."""
    devices = {cudnn: FakeCuda(fake_libraries, cudnn=cudnn) for cudnn in (False, True)}
    yield devices
    for device in devices.values():
        device.end()
