"""`rope-export doctor`: what is broken is found, and what is not is left alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnxruntime
import pytest
from commands import COMMAND
from rope_export._cli import run as run_command

import rope_export
from rope_export import BadInputError, runtime
from rope_export.artifacts.targets import IR_VERSION, OPSETS
from rope_export.runtime import (
    diagnosis,
    findings,
    machine,
    onnxruntime_build,
    packages,
    providers,
    pytorch,
)
from rope_export.runtime.diagnosis import diagnose
from rope_export.runtime.tested import TESTED, newer_than_tested

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
GPU_BUILD = {"onnxruntime-gpu": "1.31.1"}
ASK_TORCH = pytorch._devices
NOT_FOUND = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch, tmp_path):
    """No GPU, no settings, all of it in order; each test breaks one thing."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(machine, "_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setattr(pytorch, "_devices", lambda _: ((), ()))
    runtime.unavailable_reason.cache_clear()
    yield
    runtime.unavailable_reason.cache_clear()


def run(capfd, *arguments: str) -> tuple[int, str]:
    """Exit code and stdout of ``rope-export doctor``, in this process."""
    with pytest.raises(SystemExit) as stopped:
        run_command(["doctor", *arguments])
    out, err = capfd.readouterr()
    assert err == ""
    return stopped.value.code, out


def in_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND[0], "-c", code],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def installed(monkeypatch, **versions: str | None) -> None:
    """Other versions than those here, by distribution; None: not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        given = versions.get(name.replace("-", "_"), real)
        if given is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if given is real else given

    monkeypatch.setattr(packages.metadata, "version", version)


def provided_by(monkeypatch, *names: str) -> None:
    modules = {"onnxruntime": list(names)}
    monkeypatch.setattr(packages.metadata, "packages_distributions", lambda: modules)


def declared(monkeypatch, *requirements: str) -> None:
    monkeypatch.setattr(packages.metadata, "requires", lambda _: list(requirements))


def cuda_does_not_load(monkeypatch, *missing: str) -> None:
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(providers, "unavailable_reason", lambda _: f"does not load: {NOT_FOUND}")
    monkeypatch.setattr(onnxruntime_build, "missing_libraries", lambda _: missing)


def with_gpu(tmp_path) -> None:
    folder = tmp_path / "driver" / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\n")
    (tmp_path / "driver" / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc version 12.3.0\n"
    )


# --- this machine ---------------------------------------------------------------------------


def test_what_works_here_is_said_to_work(capfd):
    code, out = run(capfd, "--json")
    document = json.loads(out)
    assert document["problems"] == []
    assert (code, document["ok"]) == (0, True)
    assert document["rope_export"] == rope_export.__version__
    assert document["onnxruntime"]["version"] == onnxruntime.__version__
    assert list(document["onnxruntime"]["distributions"].values()) == [onnxruntime.__version__]
    assert document["packages"]["onnx"] == importlib.metadata.version("onnx")
    assert document["torch"]["version"] == sys.modules["torch"].__version__
    assert document["providers"]["cpu"] == {
        "loads": True, "reason": None, "missing": [], "remedy": None, "cudnn": None,
    }  # fmt: skip
    assert {name: target["opset"] for name, target in document["targets"].items()} == OPSETS
    assert document["targets"]["ort"]["runs"]["cpu"] == {
        "float32": "com.microsoft::GroupQueryAttention",
        "float16": "com.microsoft::GroupQueryAttention",
    }
    assert document["tf32"]["sessions"] is False
    assert document["machine"]["available_memory"] > 0
    states = {each["name"]: each["state"] for each in document["dependencies"]}
    assert {"torch", "onnx", "click"} <= states.keys()
    assert "pytest" not in states, "an extra is not needed"


def test_rows_are_short_and_end_in_the_verdict(capfd, monkeypatch):
    cuda_does_not_load(monkeypatch, "libcublasLt.so.13", "libcuda.so.1")
    monkeypatch.setattr(packages, "extras_of", lambda _: ("cuda", "cudnn"))
    code, out = run(capfd)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith(f"rope-export  {rope_export.__version__}, Python 3")
    assert "gpu          no NVIDIA GPU visible" in lines
    assert "cpu          loads" in lines
    assert "cuda         does not load: libcublasLt.so.13, libcuda.so.1 are missing" in lines
    ((name, version),) = packages.providing("onnxruntime").items()
    assert (
        f"to load it: pip install '{name}[cuda,cudnn]=={version}'; libcuda.so.1 comes with" in out
    )
    assert "ort          23: cpu float32, float16 by GroupQueryAttention" in lines
    assert lines[-1] == "OK: export, validate and Decoder on cpu"


def test_limits_are_those_where_onnxruntime_stops():
    build = onnxruntime_build.Onnxruntime.here()
    for limit, option in (
        (build.highest_opset, "opset"),
        (build.highest_ir_version, "ir_version"),
    ):
        providers.open_session(providers.tiny_model(**{option: limit}), "cpu")
        with pytest.raises(Exception, match=str(limit + 1)):
            providers.open_session(providers.tiny_model(**{option: limit + 1}), "cpu")


def test_graphs_are_written_in_the_ir_version_that_is_compared(artifact_of_block):
    graph = json.loads((artifact_of_block.path / "report.json").read_text())["graph"]
    assert graph["ir_version"] == IR_VERSION


# --- what is broken -------------------------------------------------------------------------


def test_two_onnxruntimes_are_a_problem(monkeypatch):
    provided_by(monkeypatch, "onnxruntime_gpu", "onnxruntime", "onnxruntime-gpu")
    declared(monkeypatch, "onnxruntime-gpu>=1.24")
    installed(monkeypatch, onnxruntime="1.30.0", onnxruntime_gpu="1.31.1")
    found = diagnose()
    assert found.onnxruntime.distributions == {"onnxruntime": "1.30.0"} | GPU_BUILD
    assert found.problems == (
        "onnxruntime and onnxruntime-gpu are installed together and overwrite each other's files: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu==1.31.1",
    )


def test_another_build_of_onnxruntime_will_do(monkeypatch):
    provided_by(monkeypatch, "onnxruntime")
    declared(monkeypatch, "onnxruntime-gpu>=1.24")
    installed(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu=None)
    found = diagnose()
    assert found.problems == ()
    assert "onnxruntime 1.31.1 stands in for onnxruntime-gpu" in found.notes


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (
            ["onnxruntime-gpu"],
            ImportError("numpy.core.multiarray failed to import"),
            "onnxruntime-gpu 1.31.1 is installed but does not import (numpy.core.multiarray failed "
            "to import): pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1",
        ),
        (
            [],
            ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
            "onnxruntime is not installed: pip install 'onnxruntime-gpu>=1.24'",
        ),
    ],
)
def test_an_onnxruntime_that_does_not_import(monkeypatch, names, error, says):
    def refuse():
        raise error

    monkeypatch.setattr(providers, "onnxruntime_module", refuse)
    provided_by(monkeypatch, *names)
    declared(monkeypatch, "onnxruntime-gpu>=1.24")
    installed(monkeypatch, onnxruntime_gpu="1.31.1" if names else None)
    found = diagnose()
    assert found.problems == (says,)
    assert not any(state.loads for state in found.providers.values())
    assert {target.loads for target in found.targets.values()} == {None}
    asked = diagnose(["cpu"])
    assert len(asked.problems) == 2
    what = "does not import" if names else "is not installed"
    assert asked.problems[1] == f"provider cpu does not load: onnxruntime {what}: {error}"


def test_what_an_uninstall_left_of_onnxruntime_does_not_import(monkeypatch):
    """A folder without ``__init__.py``, which Python imports as an empty module."""
    monkeypatch.setattr(providers, "onnxruntime_module", lambda: ModuleType("onnxruntime"))
    (problem,) = diagnose().problems
    assert "does not import (module 'onnxruntime' has no attribute '__version__')" in problem


def test_every_dependency_is_held_to_its_range(monkeypatch):
    declared(
        monkeypatch,
        "click>=8.1",
        "numpy>=99,<100",
        "no-such-thing>=1.2",
        "einops",
        "psutil>=5 ; sys_platform == 'nowhere'",
        "no-such-test>=1 ; extra == 'test'",
    )
    installed(monkeypatch, numpy="2.4.6", einops="0.8", psutil=None)
    found = diagnose()
    states = {each.name: each.state for each in found.dependencies}
    assert states == {
        "click": "ok", "numpy": "outside", "no-such-thing": "missing", "einops": "ok",
    }  # fmt: skip
    assert found.problems == (
        "numpy 2.4.6 is installed, <100,>=99 is needed: pip install 'numpy<100,>=99'",
        "no-such-thing is not installed: pip install 'no-such-thing>=1.2'",
    )


def test_tested_versions_are_those_of_the_constraints():
    pinned = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    versions = dict(line.split("==") for line in pinned if line)
    assert {name: versions[name] for name in TESTED} == TESTED
    assert versions["onnxruntime-gpu"] == versions["onnxruntime"]


@pytest.mark.parametrize(
    ("installed", "newer"),
    [
        ({"torch": "2.13.0+cu130"}, []),
        ({"torch": "2.13.1+cu130", "transformers": "4.57.6"}, ["torch"]),
        ({"torch": "2.15.0.dev20261101", "onnx": "1.24.0rc1"}, ["torch", "onnx"]),
        ({"transformers": "5.24.1", "onnxscript": "0.10.0"}, ["onnxscript", "transformers"]),
        ({"onnxruntime": "1.100", "onnx-ir": "1.1"}, ["onnxruntime"]),
        ({"onnxruntime": "my own build", "torch": None}, []),
    ],
)
def test_versions_newer_than_tested_are_notes_and_no_problem(installed, newer):
    assert [line.split()[0] for line in newer_than_tested(installed)] == newer
    found = diagnose(["cpu"])
    there = {name: version for name, version in installed.items() if name in found.packages}
    optional = {name: version for name, version in installed.items() if name in found.optional}
    changed = replace(
        found,
        torch=replace(found.torch, version=installed.get("torch", "2.13.0")),
        onnxruntime=replace(
            found.onnxruntime, version=installed.get("onnxruntime", found.onnxruntime.version)
        ),
        packages=found.packages | there,
        optional=found.optional | optional,
    )
    said = [line for line in findings.notes(changed) if "is newer than" in line]
    assert {line.split()[0] for line in said} >= set(newer)
    for line in said:
        name, version = line.split()[:2]
        assert line.endswith(f"try {name}=={TESTED[name]}")
        if name in installed:
            assert version == installed[name]


def test_a_distribution_whose_module_is_gone(monkeypatch):
    declared(monkeypatch, "einops>=0.8")
    installed(monkeypatch, einops="0.8.2")
    monkeypatch.setitem(sys.modules, "einops", None)
    assert diagnose().problems == (
        "einops 0.8.2 is installed, but its module is gone: "
        "pip install --force-reinstall --no-deps einops==0.8.2",
    )


def test_without_onnx_that_alone_is_the_problem(monkeypatch):
    """Providers are tried with a graph, which cannot be made then."""
    declared(monkeypatch, "onnx>=1.19")
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = diagnose()
    (problem,) = found.problems
    assert problem.startswith(f"onnx {importlib.metadata.version('onnx')} is installed, but its")
    assert found.packages["onnx"] is None
    assert "onnx" in found.providers["cpu"].reason
    assert (found.onnxruntime.highest_opset, found.targets["ort"].loads) == (None, None)


def test_without_packaging_ranges_are_not_checked(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    found = diagnose()
    assert found.dependencies is None
    assert found.problems == (
        "packaging is not installed, so versions are not compared: pip install packaging",
    )


def test_a_folder_that_is_not_installed_says_so(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", unknown)
    installed(monkeypatch, rope_export=None)
    found = diagnose()
    assert found.ok
    assert "runs from a folder that is not installed" in found.notes[0]


def test_a_pytorch_that_does_not_import(monkeypatch):
    def refuse():
        raise OSError("libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent")

    monkeypatch.setattr(pytorch, "torch_module", refuse)
    found = diagnose()
    (problem,) = found.problems
    assert (
        f"torch {importlib.metadata.version('torch')} is installed but does not import" in problem
    )
    assert "(libtorch_cpu.so: undefined symbol" in problem
    assert found.targets["ort"].runs is None


def test_an_opset_beyond_onnxruntime_is_a_problem(monkeypatch):
    declared(monkeypatch, "onnxruntime-gpu>=1.24")
    provided_by(monkeypatch, "onnxruntime-gpu")
    installed(monkeypatch, onnxruntime_gpu="1.31.1")
    monkeypatch.setattr(diagnosis, "OPSETS", {"ort": 60, "primitive": 18})
    found = diagnose()
    assert (found.targets["ort"].loads, found.targets["primitive"].loads) == (False, True)
    (problem,) = found.problems
    assert problem.startswith("target ort writes opset 60 in IR version 10, and onnxruntime")
    assert problem.endswith(": pip install 'onnxruntime-gpu>=1.24'")


# --- providers ------------------------------------------------------------------------------


def test_a_gpu_that_is_not_used_is_a_problem(monkeypatch, tmp_path):
    cuda_does_not_load(monkeypatch, "libcublas.so.13")
    assert diagnose().ok, "without a GPU nobody misses CUDA"
    with_gpu(tmp_path)
    found = diagnose()
    assert (found.machine.gpus, found.machine.driver) == (("NVIDIA H200",), "580.65.06")
    (problem,) = found.problems
    assert problem.startswith("provider cuda does not load: libcublas.so.13 is missing; ")
    assert "nvidia driver" not in problem.lower()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = diagnose()
    assert hidden.problems == ()
    assert "CUDA_VISIBLE_DEVICES hides every GPU from this process" in hidden.notes


def test_a_provider_asked_for_must_load(monkeypatch, capfd):
    cuda_does_not_load(monkeypatch)
    assert run(capfd, "--provider", "cpu")[0] == 0
    code, out = run(capfd, "--provider", "cuda", "--provider", "cpu")
    assert code == 3
    (problem,) = (line for line in out.splitlines() if line.startswith("PROBLEM: "))
    assert problem.startswith(f"PROBLEM: provider cuda does not load: does not load: {NOT_FOUND}; ")
    assert "OK:" not in out
    code, out = run(capfd, "--provider", "cuda", "--json")
    assert code == 3
    assert json.loads(out)["ok"] is False
    assert [f"PROBLEM: {line}" for line in json.loads(out)["problems"]] == [problem]


def test_a_build_without_cuda_is_exchanged(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    provided_by(monkeypatch, "onnxruntime")
    installed(monkeypatch, onnxruntime="1.31.1")
    remedy = diagnose().providers["cuda"].remedy
    assert remedy == "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


def test_a_provider_nobody_knows_is_bad_input(capfd):
    with pytest.raises(BadInputError, match="must be one of cpu, cuda, got 'tpu'"):
        diagnose(["tpu"])
    with pytest.raises(SystemExit) as stopped:
        run_command(["doctor", "--provider", "tpu"])
    assert stopped.value.code == 2
    assert capfd.readouterr().out == ""


def test_devices_and_complaints_of_pytorch(monkeypatch):
    def capability(index):
        if index:
            raise RuntimeError("CUDA error: device busy\nmore of it")
        return 9, 0

    def is_available():
        warnings.warn("The NVIDIA driver on your system\nis too old", stacklevel=1)
        return True

    cuda = SimpleNamespace(
        is_available=is_available,
        device_count=lambda: 2,
        get_device_capability=capability,
        get_device_name=lambda _: "NVIDIA H200",
    )
    devices, remarks = ASK_TORCH(SimpleNamespace(cuda=cuda))
    assert devices == (pytorch.Device("NVIDIA H200", "9.0"),)
    assert remarks == (
        "CUDA error: device busy",
        "The NVIDIA driver on your system is too old",
    )
    monkeypatch.setattr(pytorch, "_devices", lambda _: (devices, remarks))
    cuda_does_not_load(monkeypatch, "libcublas.so.13")
    found = diagnose()
    assert found.problems[0].startswith("provider cuda does not load"), "torch sees a GPU"
    assert "torch says: CUDA error: device busy" in found.notes


# --- TF32 -----------------------------------------------------------------------------------


def test_forced_tf32_is_a_problem(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert diagnose().ok
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    (problem,) = diagnose().problems
    assert problem.startswith("NVIDIA_TF32_OVERRIDE=1 forces TF32")
    assert problem.endswith(": unset NVIDIA_TF32_OVERRIDE")


def test_getters_that_raise_once_the_newer_names_were_used(monkeypatch):
    class Mixed:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self):
            raise RuntimeError("you have used mix of the legacy and new APIs")

    def mixed():
        raise RuntimeError("you have used mix of the legacy and new APIs")

    conv = SimpleNamespace(fp32_precision="ieee")
    backends = SimpleNamespace(
        cuda=SimpleNamespace(matmul=Mixed()), cudnn=SimpleNamespace(allow_tf32=True, conv=conv)
    )
    torch = SimpleNamespace(backends=backends, get_float32_matmul_precision=mixed)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert pytorch.tf32(True) == pytorch.Tf32(False, True, True, None, None)
    del backends.cudnn.allow_tf32
    assert pytorch.tf32(True).cudnn is False
    del conv.fp32_precision
    assert pytorch.tf32(True).cudnn is None


# --- processes of their own -----------------------------------------------------------------

DEPLOYED = """
import sys
for name in ("torch", "onnxscript", "onnx_ir", "einops", "safetensors"): sys.modules[name] = None
from rope_export._cli import run
run(["doctor", *sys.argv[1:]])
"""


def test_a_deployment_machine_is_in_order_without_the_exporter(tmp_path):
    result = in_python(DEPLOYED.replace("*sys.argv[1:]", "'--json'"), tmp_path)
    document = json.loads(result.stdout)
    assert document["problems"] == []
    assert result.returncode == 0
    assert result.stderr == ""
    assert document["torch"]["version"] is None
    assert {target["loads"] for target in document["targets"].values()} == {True}
    assert {target["runs"] for target in document["targets"].values()} == {None}
    notes = " ".join(document["notes"])
    assert "torch, onnxscript, onnx-ir, einops and safetensors are not installed" in notes


def test_a_second_distribution_and_forced_tf32_are_two_lines(tmp_path):
    folder = tmp_path / "site" / "onnxruntime_other-1.2.3.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-other\nVersion: 1.2.3\n"
    )
    (folder / "top_level.txt").write_text("onnxruntime\n")
    result = in_python(DEPLOYED, tmp_path, PYTHONPATH=str(folder.parent), NVIDIA_TF32_OVERRIDE="1")
    assert result.returncode == 3, result.stderr
    lines = result.stdout.splitlines()
    assert "torch        not installed: fine for validate and Decoder; needed for export" in lines
    ((name, version),) = packages.providing("onnxruntime").items()
    both = " ".join(sorted((name, "onnxruntime-other")))
    first, second = lines[-2:]
    assert first.startswith("PROBLEM: ")
    assert f": pip uninstall -y {both} && pip install {name}=={version}" in first
    assert second.startswith("PROBLEM: NVIDIA_TF32_OVERRIDE=1 forces TF32")


def test_help_imports_nothing_and_a_machine_without_numpy_is_one_line(tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'numpy'): sys.modules[name] = None\n"
        "from rope_export._cli import run\n"
        "try: run(['doctor', '--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "run(['doctor'])"
    )
    result = in_python(code, tmp_path)
    assert result.returncode == 3
    assert "Usage: rope-export doctor" in result.stdout
    assert "Exit codes: 0 all in order" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("rope-export: error: nothing can run here: import of numpy")
    assert line.endswith("; pip install numpy")
