"""Which execution providers really load here, and what machine this is."""

from __future__ import annotations

import ctypes
import functools
import io
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rope_export.artifacts.targets import ENDPOINTS
from rope_export.errors import BadInputError, ProviderUnavailableError, first_line

if TYPE_CHECKING:
    import onnxruntime

CUDA_LIBRARY = "libonnxruntime_providers_cuda.so"
# Neither as they are nor zeros are they what `tiny_model` makes of them.
_GIVEN = (-2.0, 3.0, -1.0, 5.0)
# fp32 is compared with fp32: onnxruntime would use TF32 tensor cores on CUDA otherwise.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


def onnxruntime_module() -> Any:
    """Onnxruntime, imported when it is first needed."""
    import onnxruntime

    return onnxruntime


def library_folder() -> Path:
    """Where onnxruntime keeps the libraries of its providers."""
    return Path(onnxruntime_module().__file__).parent / "capi"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the runtime's own messages off the user's terminal; our errors say what matters."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        onnxruntime_module().set_default_logger_severity(4)
        yield


def check_name(provider: str) -> None:
    """Check that there is such a provider, here or elsewhere.

    Raises:
        BadInputError: there is not.
    """
    if provider not in ENDPOINTS:
        raise BadInputError(f"provider must be one of {', '.join(ENDPOINTS)}, got {provider!r}")


@functools.cache
def unavailable_reason(provider: str) -> str | None:
    """Why ``provider`` cannot be used on this machine, or None when it can.

    A provider that is listed is not taken at its word: its library is loaded, a session is opened
    on it, and what it computes is looked at.
    """
    check_name(provider)
    if provider == "cpu":
        return None
    ort = onnxruntime_module()
    endpoint = ENDPOINTS[provider]
    if endpoint not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} has no {endpoint}; install onnxruntime-gpu"
    with quiet():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    folder = library_folder()
    if sys.platform == "linux":
        # The runtime only logs a library that does not load, and falls back: ask the loader.
        try:
            for name in ("libonnxruntime_providers_shared.so", CUDA_LIBRARY):
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return f"onnxruntime {ort.__version__} lists {endpoint} but it does not load: {error}"
    try:
        session = open_session(tiny_model(), provider)
    except Exception as error:
        return f"{endpoint} does not start: {first_line(error)}"
    if endpoint not in session.get_providers():
        return f"{endpoint} is listed but a session on it falls back to the CPU (no usable device?)"
    # A driver that does not fit, or libraries that stand in for CUDA's, may start and do nothing.
    return _miscomputation(session, endpoint)


def _miscomputation(session: onnxruntime.InferenceSession, endpoint: str) -> str | None:
    """What is wrong with what `tiny_model` gives, or None."""
    import numpy as np

    given, wanted = np.array(_GIVEN, np.float32), [max(x, 0.0) for x in _GIVEN]
    try:
        (found,) = session.run(None, {"x": given})
    except Exception as error:
        return f"{endpoint} starts but does not run: {first_line(error)}"
    if found.tolist() != wanted:
        return (
            f"{endpoint} starts but does not compute: Relu of {list(_GIVEN)} gives {found.tolist()}"
        )
    return None


def require(provider: str) -> None:
    """Check that ``provider`` really runs here.

    Raises:
        BadInputError: there is no such provider.
        ProviderUnavailableError: it does not; the message says why.
    """
    reason = unavailable_reason(provider)
    if reason is not None:
        raise ProviderUnavailableError(f"provider {provider} cannot be used here: {reason}")


def tiny_model(*, opset: int = 18, ir_version: int = 8) -> bytes:
    """The smallest graph there is, to see whether it opens."""
    from onnx import TensorProto, helper

    shape = [len(_GIVEN)]
    value = functools.partial(
        helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=shape
    )
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x")], [value("y")]
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    content: bytes = model.SerializeToString()
    return content


def open_session(
    model: bytes | str, provider: str, more_options: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """Open a graph on ``provider``, with the CPU for shape arithmetic, recording assignment.

    What fails there fails: by default onnxruntime would run everything again on the CPU, and print
    that it does.
    """
    ort = onnxruntime_module()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[Any] = [
        (ENDPOINTS[provider], {**_PROVIDER_OPTIONS[provider], **(more_options or {})})
    ]
    if provider != "cpu":
        providers.append(ENDPOINTS["cpu"])  # for shape arithmetic; checked afterwards
    return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


def environment() -> dict[str, Any]:
    """Versions and platform, for the report; PyTorch is None where it is not loaded."""
    import onnx

    torch = sys.modules.get("torch")
    return {
        "torch": None if torch is None else str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime_module().__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "tf32": False,
    }


def available_memory() -> int:
    """Bytes that can still be allocated: of the machine, or of its container when that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))
