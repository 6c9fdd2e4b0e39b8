"""onnxruntime, without PyTorch: which providers load, and running a graph where it was asked to."""

from __future__ import annotations

import ctypes
import functools
import io
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rope_export.errors import ProviderUnavailableError

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]

ENDPOINTS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# fp32 is compared with fp32: onnxruntime would use TF32 tensor cores on CUDA otherwise.
_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
# Operators that carry the block's arithmetic. onnxruntime may keep the shape arithmetic around
# them on the CPU of a CUDA session; one of these there means the session is not what it claims.
_COMPUTE_OPS = frozenset(
    {
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "Softmax",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "Attention",
        "RotaryEmbedding",
    }
)


def _ort() -> Any:
    import onnxruntime

    return onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the runtime's own messages off the user's terminal; our errors say what matters."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        _ort().set_default_logger_severity(4)
        yield


@functools.cache
def unavailable_reason(provider: str) -> str | None:
    """Why ``provider`` cannot be used on this machine, or None when it can.

    A provider that is listed is not taken at its word: its library is loaded and a session is
    opened on it.
    """
    if provider == "cpu":
        return None
    ort = _ort()
    endpoint = ENDPOINTS[provider]
    if endpoint not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} has no {endpoint}; install onnxruntime-gpu"
    with _quiet():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    if sys.platform == "linux":
        # The runtime only logs a library that does not load, and falls back: ask the loader.
        try:
            for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return f"onnxruntime {ort.__version__} lists {endpoint} but it does not load: {error}"
    try:
        session = _open(_tiny_model(), provider)
    except Exception as error:
        return f"{endpoint} does not start: {_first_line(error)}"
    if endpoint not in session.get_providers():
        return f"{endpoint} is listed but a session on it falls back to the CPU (no usable device?)"
    return None


def require(provider: str) -> None:
    """Check that ``provider`` really runs here.

    Raises:
        ProviderUnavailableError: it does not; the message says why.
    """
    reason = unavailable_reason(provider)
    if reason is not None:
        raise ProviderUnavailableError(f"provider {provider} cannot be used here: {reason}")


def _tiny_model() -> bytes:
    from onnx import TensorProto, helper

    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[1])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x")], [value("y")]
    )
    opset = [helper.make_opsetid("", 18)]
    model: bytes = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    return model


def _open(model: bytes | str, provider: str) -> onnxruntime.InferenceSession:
    ort = _ort()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[Any] = [(ENDPOINTS[provider], _PROVIDER_OPTIONS[provider])]
    if provider != "cpu":
        providers.append(ENDPOINTS["cpu"])  # for shape arithmetic; checked afterwards
    return ort.InferenceSession(model, options, providers=providers)


@dataclass(frozen=True)
class Session:
    """A graph opened on one provider.

    Attributes:
        provider: the provider asked for.
        nodes: how many nodes each execution provider really got.
        misplaced: operators that carry arithmetic and ran elsewhere.
    """

    provider: str
    nodes: dict[str, int]
    misplaced: tuple[str, ...]
    _session: Any

    @classmethod
    def open(cls, model: Path, provider: str) -> Session:
        """Open ``model`` on ``provider``.

        Raises:
            ProviderUnavailableError: the provider does not load.
            RuntimeError: the graph does not load; the message is the runtime's first line.
        """
        require(provider)
        try:
            with _quiet():
                session = _open(str(model), provider)
        except Exception as error:
            raise RuntimeError(_first_line(error)) from error
        placed: Counter[str] = Counter()
        misplaced: Counter[str] = Counter()
        for subgraph in session.get_provider_graph_assignment_info():
            for node in subgraph.get_nodes():
                placed[subgraph.ep_name] += 1
                if subgraph.ep_name != ENDPOINTS[provider] and node.op_type in _COMPUTE_OPS:
                    misplaced[node.op_type] += 1
        return cls(provider, dict(placed), tuple(sorted(misplaced)), session)

    @property
    def input_names(self) -> list[str]:
        """Names of the graph inputs, in order."""
        return [value.name for value in self._session.get_inputs()]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph outputs, in order."""
        return [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            RuntimeError: the graph does not run; the message is the runtime's first line.
        """
        ort = _ort()
        binding = self._session.io_binding()
        try:
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, _to_ort(ort, array))
            for name in self.output_names:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            return {
                name: _from_ort(value)
                for name, value in zip(self.output_names, binding.get_outputs(), strict=True)
            }
        except Exception as error:
            raise RuntimeError(_first_line(error)) from error


def _to_ort(ort: Any, array: Array) -> Any:
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        from onnx import TensorProto

        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _from_ort(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    import ml_dtypes

    shape = value.shape()
    memory = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    bits: Array = np.frombuffer(memory, dtype=np.uint16)
    wide: Array = bits.view(ml_dtypes.bfloat16).reshape(shape)
    return wide


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:400] if text else type(error).__name__


def environment() -> dict[str, Any]:
    """Versions and platform, for the report; PyTorch is None where it is not loaded."""
    import onnx

    torch = sys.modules.get("torch")
    return {
        "torch": None if torch is None else str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": _ort().__version__,
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
