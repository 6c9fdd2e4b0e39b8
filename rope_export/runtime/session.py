"""`Session`: a graph opened on one provider, and where its nodes really went."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.targets import ENDPOINTS
from rope_export.errors import ProviderUnavailableError, first_line
from rope_export.runtime import cudnn, required
from rope_export.runtime.providers import (
    onnxruntime_module,
    open_session,
    quiet,
    require,
)

Array = npt.NDArray[Any]

_EXTENSION = "V"  # kind of dtypes that are not NumPy's own; asking for their names is slow
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


@dataclass(frozen=True)
class Session:
    """A graph opened on one provider.

    Attributes:
        provider: the provider asked for.
        nodes: how many nodes each execution provider really got.
        misplaced: operators that carry arithmetic and ran elsewhere.
        raw: onnxruntime's own session.
    """

    provider: str
    nodes: dict[str, int]
    misplaced: tuple[str, ...]
    raw: Any

    @classmethod
    def open(
        cls, model: Path, provider: str, *, provider_options: Mapping[str, str] | None = None
    ) -> Session:
        """Open ``model`` on ``provider``.

        Raises:
            ProviderUnavailableError: the provider does not load, onnxruntime is too old for the
                graph, or it needs cuDNN and that is not here.
            RuntimeError: the graph does not load; the message is the runtime's first line.
        """
        require(provider)
        try:
            with quiet():
                session = open_session(str(model), provider, provider_options)
        except Exception as error:
            reason = required.why_not(Path(model), error)
            if reason is not None:
                raise ProviderUnavailableError(
                    f"provider {provider} cannot be used here: {reason}"
                ) from error
            raise RuntimeError(first_line(error)) from error
        placed: Counter[str] = Counter()
        misplaced: Counter[str] = Counter()
        kept = set()
        for endpoint, domain, operator in _assigned(session, provider, model):
            placed[endpoint] += 1
            if endpoint == ENDPOINTS[provider]:
                kept.add(f"{domain}::{operator}")
            elif operator in _COMPUTE_OPS:
                misplaced[operator] += 1
        if provider == "cuda":
            cudnn.require(kept)
        return cls(provider, dict(placed), tuple(sorted(misplaced)), session)

    @property
    def input_names(self) -> list[str]:
        """Names of the graph inputs, in order."""
        return [value.name for value in self.raw.get_inputs()]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph outputs, in order."""
        return [value.name for value in self.raw.get_outputs()]

    def require_placed(self) -> None:
        """Check that the graph's arithmetic runs where it was asked to.

        Raises:
            ProviderUnavailableError: some of it was placed on another provider.
        """
        if self.misplaced:
            raise ProviderUnavailableError(self.misplacement)

    @property
    def misplacement(self) -> str:
        """What runs elsewhere, in plain words."""
        return (
            f"{', '.join(self.misplaced)} was placed on another provider: "
            f"no kernel for it on {self.provider}"
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            RuntimeError: the graph does not run; the message is the runtime's first line.
        """
        binding = self.raw.io_binding()
        try:
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, to_ort(array))
            for name in self.output_names:
                binding.bind_output(name, "cpu")
            self.raw.run_with_iobinding(binding)
            return {
                name: from_ort(value)
                for name, value in zip(self.output_names, binding.get_outputs(), strict=True)
            }
        except Exception as error:
            raise RuntimeError(first_line(error)) from error


def _assigned(session: Any, provider: str, model: Path) -> Iterator[tuple[str, str, str]]:
    """Execution provider, domain and operator of every node.

    Raises:
        ProviderUnavailableError: the runtime does not say, and there is more than one.
    """
    if hasattr(session, "get_provider_graph_assignment_info"):
        for subgraph in session.get_provider_graph_assignment_info():
            for node in subgraph.get_nodes():
                yield subgraph.ep_name, node.domain, node.op_type
    elif provider == "cpu":  # where they all are, such as the file has them
        import onnx

        for node in onnx.load(model, load_external_data=False).graph.node:
            yield ENDPOINTS[provider], node.domain, node.op_type
    else:
        raise ProviderUnavailableError(
            f"provider {provider} cannot be used here: {ENDPOINTS[provider]} may leave nodes to "
            f"the CPU, and of onnxruntime {onnxruntime_module().__version__} nobody learns which"
        )


def to_ort(array: Array) -> Any:
    """Wrap the memory of an array, ``ml_dtypes.bfloat16`` included; the array must stay alive."""
    array = np.asarray(array, order="C")  # which, unlike ascontiguousarray, adds no axis
    if array.dtype.kind == _EXTENSION:
        return _of_bits(array)
    return onnxruntime_module().OrtValue.ortvalue_from_numpy(array)


def _of_bits(array: Array) -> Any:
    """An array of ``ml_dtypes.bfloat16``, which NumPy has no name for."""
    from onnx import TensorProto

    value = onnxruntime_module().OrtValue
    return value.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)


def on_device(array: Array, provider: str) -> Any:
    """An array as an input that lies where ``provider`` runs; on the CPU it must stay alive."""
    if provider == "cpu":
        return to_ort(array)
    array = np.asarray(array, order="C")
    if array.dtype.kind != _EXTENSION:
        return onnxruntime_module().OrtValue.ortvalue_from_numpy(array, provider, 0)
    there = room_for(array.shape, array.dtype, provider)
    there.update_inplace(_of_bits(array))
    return there


def room_for(shape: Sequence[int], dtype: np.dtype[Any], provider: str) -> Any:
    """A value that lies where ``provider`` runs, not filled."""
    from onnx import TensorProto

    kind: Any = TensorProto.BFLOAT16 if dtype.kind == _EXTENSION else dtype
    value = onnxruntime_module().OrtValue
    return value.ortvalue_from_shape_and_type(list(shape), kind, provider, 0)


def from_ort(value: Any) -> Array:
    """Copy a value out of onnxruntime."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    import ml_dtypes

    shape = value.shape()
    if value.device_name() != "cpu":
        there, value = value, room_for(shape, np.dtype(ml_dtypes.bfloat16), "cpu")
        value.update_inplace(there)
    memory = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    bits: Array = np.frombuffer(memory, dtype=np.uint16)
    wide: Array = bits.view(ml_dtypes.bfloat16).reshape(shape)
    return wide
