"""One token for every row, past and present in one buffer: bound once, or captured by CUDA."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.cache_layout import MASK, CacheLayout
from rope_export.errors import BadInputError, first_line
from rope_export.runtime.providers import onnxruntime_module
from rope_export.runtime.session import Session, from_ort, on_device, room_for, to_ort

Array = npt.NDArray[Any]
# Of captured graphs, each of its own: decoders on one session have buffers of their own.
_GRAPHS = itertools.count(1)
_NOT_CAPTURED = "-1"


@dataclass(frozen=True)
class StepInputs:
    """What a step takes and gives, and the buffers between.

    Attributes:
        session: the graph.
        layout: how it keeps its cache.
        batch: rows.
        capacity: tokens each row has room for.
        width: axes of a token after ``[batch, 1]``.
        answer_width: of its answer, likewise.
        dtype: of tokens.
        output_dtype: of answers.
        mask_dtype: of the mask.
        buffers: keys and values of every layer, past and present at once.
    """

    session: Session
    layout: CacheLayout
    batch: int
    capacity: int
    width: tuple[int, ...]
    answer_width: tuple[int, ...]
    dtype: np.dtype[Any]
    output_dtype: np.dtype[Any]
    mask_dtype: np.dtype[Any]
    buffers: Sequence[Any]

    def bind_buffers(self, binding: Any) -> None:
        """Bind every buffer as past and as present."""
        for (past, present, *_), value in zip(self.layout.names(), self.buffers, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)


class BoundStep:
    """A step in which all but the mask stays bound.

    Wrapping and binding arrays anew takes as long as a small graph runs.
    """

    def __init__(self, given: StepInputs) -> None:
        self._given = given
        layout, batch = given.layout, given.batch
        self._binding = given.session.raw.io_binding()
        self._tokens: Array = np.zeros((batch, 1, *given.width), given.dtype)
        self._answer: Array = np.zeros((batch, 1, *given.answer_width), given.output_dtype)
        self._ones: Array = np.ones(batch * given.capacity, given.mask_dtype)
        axes = layout.position_axes
        self._ids: Array = np.zeros((*([axes] if axes > 1 else []), batch, 1), np.int64)
        inputs = {layout.tokens: self._tokens, **({"position_ids": self._ids} if axes else {})}
        self._kept = [to_ort(array) for array in (*inputs.values(), self._answer)]
        for name, value in zip(inputs, self._kept, strict=False):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(layout.output, self._kept[-1])
        given.bind_buffers(self._binding)

    def run(
        self,
        lengths: npt.NDArray[np.int64],
        tokens: Array,
        ids: Array | None,
        options: Any = None,
    ) -> Array:
        """Run it after rows of ``lengths`` tokens.

        Raises:
            RuntimeError: onnxruntime does not run it.
        """
        given = self._given
        np.copyto(self._tokens, tokens)
        if ids is not None:
            np.copyto(self._ids, ids)
        try:
            if given.layout.mask:
                mask = to_ort(self._mask(lengths))
                self._binding.bind_ortvalue_input(MASK, mask)
            given.session.raw.run_with_iobinding(self._binding, options)
        except Exception as error:
            raise RuntimeError(first_line(error)) from error
        return self._answer.copy()

    def _mask(self, lengths: npt.NDArray[np.int64]) -> Array:
        longest, batch = int(lengths.max()), len(lengths)
        mask = self._ones[: batch * (longest + 1)].reshape(batch, longest + 1)
        if int(lengths.min()) == longest:
            return mask
        mask = mask.copy()
        mask[:, :longest] = np.arange(longest) < lengths[:, None]
        return mask


class CapturedStep:
    """A step as a CUDA graph: every shape and address stays.

    The mask always has the width of the buffers: its row sums are the lengths, and its last column
    is the new token.
    """

    def __init__(self, given: StepInputs) -> None:
        self._given = given
        self._inputs: dict[str, Any] = {}
        self._output: Any = None
        self._binding: Any = None
        self._options = onnxruntime_module().RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(next(_GRAPHS)))

    def run(self, lengths: npt.NDArray[np.int64], tokens: Array, ids: Array | None) -> Array:
        """Capture it at first, then replay it, after rows of ``lengths`` tokens.

        Raises:
            RuntimeError: onnxruntime does not run or capture it.
        """
        given = self._given
        column = np.arange(given.capacity)
        mask = (column < lengths[:, None]).astype(np.int64)
        mask[:, -1] = 1
        arrays = {given.layout.tokens: tokens, MASK: mask.astype(given.mask_dtype)}
        if ids is not None:
            arrays["position_ids"] = ids
        try:
            if self._binding is None:
                self._bind(arrays)
            for name, array in arrays.items():
                self._inputs[name].update_inplace(to_ort(array))
            given.session.raw.run_with_iobinding(self._binding, self._options)
            return from_ort(self._output)
        except Exception as error:
            raise RuntimeError(first_line(error)) from error

    def _bind(self, arrays: dict[str, Array]) -> None:
        given = self._given
        binding = given.session.raw.io_binding()
        for name, array in arrays.items():
            self._inputs[name] = on_device(array, "cuda")
            binding.bind_ortvalue_input(name, self._inputs[name])
        given.bind_buffers(binding)
        shape = (given.batch, 1, *given.answer_width)
        self._output = room_for(shape, given.output_dtype, "cuda")
        binding.bind_ortvalue_output(given.layout.output, self._output)
        self._binding = binding


def uncaptured() -> Any:
    """Options of a run beside a captured step: it is none of it."""
    options = onnxruntime_module().RunOptions()
    options.add_run_config_entry("gpu_graph_id", _NOT_CAPTURED)
    return options


def check_capturable(provider: str, layout: CacheLayout) -> None:
    """Check that a decoding step can be a CUDA graph.

    Raises:
        BadInputError: it cannot; the message says why.
    """
    why = None
    if provider != "cuda":
        why = f"provider {provider} has none"
    elif not layout.packs_rows:
        why = "the cache of this target grows with each step, and a CUDA graph has one shape"
    elif layout.by_rows:
        why = "the graph has control flow, for the CPU; export it with --provider cuda alone"
    if why is not None:
        raise BadInputError(f"cuda_graph=True is not possible: {why}")
