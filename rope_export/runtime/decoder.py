"""`Decoder`: a graph with a cache, one batch of sequences at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.artifact import Artifact
from rope_export.artifacts.cache_layout import KINDS, MASK, CacheLayout
from rope_export.checks import positive_integer
from rope_export.errors import BadInputError, first_line
from rope_export.runtime import required
from rope_export.runtime.decoder_steps import (
    BoundStep,
    CapturedStep,
    StepInputs,
    check_capturable,
    uncaptured,
)
from rope_export.runtime.session import Session, from_ort, on_device, to_ort
from rope_export.runtime.windows import check_rewind, window_slots

Array = npt.NDArray[Any]
State = tuple[Array, Array, list[Any], dict[int, Array]]


class Decoder:
    """Serves an exported block or model with a cache: prompts in, then token after token.

    The tokens are hidden states or ids, whichever the graph takes, and the answer is what it gives
    for each of them: hidden states or logits. The keys and values stay in onnxruntime: where the
    graph allows it in one pair of buffers of full length for each layer, allocated once and used as
    past and present at the same time, so that a step copies nothing. Rows of a batch may have
    different lengths.

    Example:
        >>> decoder = Decoder.open("exported/block", batch=2)  # doctest: +SKIP
        >>> y = decoder.prefill(x, attention_mask=[[1, 1, 1, 1], [1, 1, 0, 0]])  # doctest: +SKIP
        >>> y = decoder.decode(y[:, -1:])  # doctest: +SKIP

    Args:
        session: the graph, opened on a provider.
        layout: how it keeps its cache.
        batch: rows.
        capacity: tokens each row has room for (default, and at most, the longest the graph serves).
        window_capacity: slots of layers that keep a window only (default: the window, and no other
            where the graph was made for CUDA). With more, tokens move less often, and drafts of up
            to so many more can be taken back by `restore`.
        cuda_graph: capture the decoding step on CUDA and replay it.

    Raises:
        BadInputError: an argument is out of range, or the step cannot be captured.
    """

    def __init__(
        self,
        session: Session,
        layout: CacheLayout,
        *,
        batch: int = 1,
        capacity: int | None = None,
        window_capacity: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        batch = positive_integer("batch", batch)
        capacity = positive_integer("capacity", layout.capacity if capacity is None else capacity)
        if capacity > layout.capacity:
            raise BadInputError(
                f"capacity must be from 1 to the {layout.capacity} tokens the graph serves, "
                f"got {capacity}"
            )
        if cuda_graph:
            check_capturable(session.provider, layout)
        self.session = session
        self.layout = layout
        self.batch = batch
        self.capacity = capacity
        self._slots = window_slots(layout, window_capacity)
        self._captures = cuda_graph
        self._captured: CapturedStep | None = None
        self._step: BoundStep | None = None
        inputs = {value.name: value for value in session.raw.get_inputs()}
        outputs = {value.name: value for value in session.raw.get_outputs()}
        given, answer = inputs[layout.tokens], outputs[layout.output]
        self.hidden_size = int(given.shape[2]) if len(given.shape) > 2 else None
        self._width = tuple(int(size) for size in given.shape[2:])
        self._answer_width = tuple(int(size) for size in answer.shape[2:])
        self.dtype = _dtype(given.type)
        self.output_dtype = _dtype(answer.type)
        self._mask_dtype = _dtype(inputs[MASK].type) if layout.mask else np.dtype(np.int64)
        self._cache_dtype = _dtype(inputs[next(layout.names())[0]].type)
        self._binding = session.raw.io_binding()
        self._buffers: list[Any] = []
        self._lengths: npt.NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
        self.reset()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        provider: str = "cpu",
        batch: int = 1,
        capacity: int | None = None,
        window_capacity: int | None = None,
        cuda_graph: bool = False,
    ) -> Decoder:
        """Open the artifact in ``folder`` on ``provider``.

        Raises:
            BadInputError: the artifact is incomplete or altered, has no cache, or an argument is
                out of range.
            ProviderUnavailableError: the provider does not load, or has no kernel for the graph's
                arithmetic, or onnxruntime is too old for it.
            RuntimeError: onnxruntime does not load the graph.
        """
        artifact = Artifact.read(Path(folder), verify=True)
        if artifact.cache is None:
            raise BadInputError(
                f"{folder}: the graph has no cache that a Decoder can drive; export it with one"
            )
        required.check(artifact)
        layout = artifact.cache
        if cuda_graph:
            check_capturable(provider, layout)
        options = {"enable_cuda_graph": "1"} if cuda_graph else None
        session = Session.open(artifact.model, provider, provider_options=options)
        session.require_placed()
        return cls(
            session,
            layout,
            batch=batch,
            capacity=capacity,
            window_capacity=window_capacity,
            cuda_graph=cuda_graph,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row's cache."""
        return tuple(int(n) for n in self._lengths)

    @property
    def cache_bytes(self) -> int:
        """What the keys and values of all rows and layers take now."""
        return sum(math.prod(value.shape()) * self._cache_dtype.itemsize for value in self._buffers)

    def state(self, *, windows: bool = False) -> State:
        """The tokens added so far, to go back to with `restore`.

        With ``windows`` it has copies of what layers with a window of their own hold, and can be
        gone back to after any number of tokens.
        """
        copies = {}
        if windows and self.layout.packs_rows:
            kept = [slots for slots in self._slots for _ in KINDS]
            copies = {
                index: from_ort(value).copy()
                for index, (value, slots) in enumerate(zip(self._buffers, kept, strict=True))
                if slots
            }
        return self._lengths.copy(), self._mask, self._buffers, copies

    def restore(self, state: State) -> None:
        """Forget the tokens added since a `state`: drafts that were refused, other branches.

        With one buffer for past and present, only states from which no other tokens were added in
        between can be gone back to: later tokens take the place of earlier ones. Where layers keep
        a window only, those tokens must not have pushed out earlier ones either, unless the state
        has copies of them.

        Raises:
            BadInputError: they have; the message says how many tokens can be taken back.
        """
        lengths, mask, buffers, copies = state
        if self.layout.packs_rows and not copies:
            check_rewind(self.layout, self._slots, self._lengths, lengths)
        for index, array in copies.items():
            buffers[index].update_inplace(to_ort(array))
        self._mask, self._buffers = mask, buffers
        self._lengths = lengths.copy()

    def reset(self) -> None:
        """Forget all tokens; the buffers are kept."""
        self._lengths = np.zeros(self.batch, dtype=np.int64)
        self._mask = np.zeros((self.batch, 0), dtype=np.int64)
        if self.layout.packs_rows and self._buffers:
            return
        length = self.capacity if self.layout.packs_rows else 0
        slots = [kept or length for kept in self._slots for _ in KINDS]
        self._buffers = [
            _zeros((self.batch, heads, size, width), self)
            for (_, _, heads, width), size in zip(self.layout.names(), slots, strict=True)
        ]
        if self.layout.packs_rows:  # for good: past and present stay where they are
            for (past, present, *_), value in zip(self.layout.names(), self._buffers, strict=True):
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)

    def prefill(
        self,
        tokens: npt.ArrayLike,
        *,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
    ) -> Array:
        """Add a prompt, or a further chunk of it, to every row.

        Args:
            tokens: hidden states ``[batch, S, hidden]``, or ids ``[batch, S]`` where the graph
                takes those.
            attention_mask: ``[batch, S]``, 1 for a token and 0 for padding, which is on the side
                the graph was exported for; None: all are tokens.
            position_ids: ``[batch, S]`` or ``[axes, batch, S]`` where the graph takes them.

        Returns:
            ``[batch, S, ...]``; unspecified at padding.

        Raises:
            BadInputError: a shape, dtype or padding does not fit, or the cache would overflow; the
                cache is as it was.
            RuntimeError: onnxruntime failed; the cache must be reset.
        """
        given = self._checked_tokens(tokens)
        length = given.shape[1]
        real = np.ones((self.batch, length), dtype=np.int64)
        if attention_mask is not None:
            real = self._checked_mask(_array("attention_mask", attention_mask), length)
        ids = self._checked_positions(position_ids, length)
        self._check_room(length)
        one_by_one = self.layout.packs_rows and not self.layout.by_rows and self.batch > 1
        if one_by_one and length > 1 and self._lengths.any():
            parts = [
                self._run(given[:, i : i + 1], real[:, i : i + 1], _columns(ids, i))
                for i in range(length)
            ]
            return np.concatenate(parts, axis=1)
        return self._run(given, real, ids)

    def decode(self, tokens: npt.ArrayLike, *, position_ids: npt.ArrayLike | None = None) -> Array:
        """Add one token to every row.

        Args:
            tokens: hidden states ``[batch, 1, hidden]`` or ids ``[batch, 1]``.
            position_ids: ``[batch, 1]`` or ``[axes, batch, 1]`` where the graph takes them.

        Returns:
            ``[batch, 1, ...]``.

        Raises:
            BadInputError: a shape or dtype does not fit, or the cache is full; the cache is as it
                was.
            RuntimeError: onnxruntime failed; the cache must be reset.
        """
        given = self._checked_tokens(tokens)
        if given.shape[1] != 1:
            raise BadInputError(
                f"decode takes one token for each row, {[self.batch, 1, *self._width]}; got "
                f"{list(given.shape)} (prefill takes several)"
            )
        ids = self._checked_positions(position_ids, 1)
        self._check_room(1)
        if not self.layout.packs_rows:
            return self._run(given, np.ones((self.batch, 1), dtype=np.int64), ids)
        if self._captures and self._lengths.any():
            if self._captured is None:
                self._captured = CapturedStep(self._step_inputs())
            output = self._captured.run(self._lengths, given, ids)
        else:
            if self._step is None:
                self._step = BoundStep(self._step_inputs())
            output = self._step.run(self._lengths, given, ids, self._run_options())
        self._lengths = self._lengths + 1
        return output

    def _step_inputs(self) -> StepInputs:
        return StepInputs(
            self.session,
            self.layout,
            self.batch,
            self.capacity,
            self._width,
            self._answer_width,
            self.dtype,
            self.output_dtype,
            self._mask_dtype,
            self._buffers,
        )

    def _run(self, tokens: Array, real: Array, ids: Array | None) -> Array:
        earlier = self._mask
        if self.layout.packs_rows:
            widest = int(self._lengths.max())
            earlier = (np.arange(widest) < self._lengths[:, None]).astype(np.int64)
        mask = np.concatenate((earlier, real), axis=1)
        inputs = {self.layout.tokens: tokens}
        if self.layout.mask:
            inputs[MASK] = mask.astype(self._mask_dtype)
        if ids is not None:
            inputs["position_ids"] = ids
        binding = self._binding
        answer: Array = np.empty((*tokens.shape[:2], *self._answer_width), self.output_dtype)
        try:
            kept = [to_ort(array) for array in (*inputs.values(), answer)]
            for name, value in zip(inputs, kept, strict=False):
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(self.layout.output, kept[-1])
            if not self.layout.packs_rows:
                for names, value in zip(self.layout.names(), self._buffers, strict=True):
                    binding.bind_ortvalue_input(names[0], value)
                    binding.bind_output(names[1], self.session.provider)
            self.session.raw.run_with_iobinding(binding, self._run_options())
            if not self.layout.packs_rows:
                _, *self._buffers = binding.get_outputs()
                self._mask = mask
        except Exception as error:
            raise RuntimeError(first_line(error)) from error
        self._lengths = self._lengths + real.sum(axis=1)
        return answer

    def _run_options(self) -> Any:
        return uncaptured() if self._captures else None

    def _check_room(self, more: int) -> None:
        used = int(self._lengths.max()) if self.layout.packs_rows else self._mask.shape[1]
        if used + more > self.capacity:
            raise BadInputError(
                f"the cache is full: {used} of {self.capacity} tokens are taken and {more} more "
                "do not fit; reset() it, or open it with a larger capacity"
            )

    def _checked_tokens(self, tokens: npt.ArrayLike) -> Array:
        name = self.layout.tokens
        given = _array(name, tokens)
        wanted = (self.batch, given.shape[1] if given.ndim > 1 else 0, *self._width)
        if given.shape != wanted or given.shape[1] < 1:
            shown = ", ".join(str(size) for size in (self.batch, "S", *self._width))
            raise BadInputError(
                f"{name} must be [{shown}] with at least one token, got {list(given.shape)}"
            )
        if given.dtype.kind in "iu" and self.dtype.kind == "i":
            given = given.astype(self.dtype)
        if given.dtype != self.dtype:
            raise BadInputError(
                f"{name} must be {self.dtype.name} as the graph is, got {given.dtype}"
            )
        return given

    def _checked_mask(self, mask: Array, length: int) -> Array:
        wanted = f"attention_mask must be [{self.batch}, {length}] of 0 and 1"
        if not self.layout.ragged and not mask.all():
            raise BadInputError(
                "attention_mask must be all ones: this graph serves rows of one length only"
            )
        if mask.shape != (self.batch, length):
            raise BadInputError(f"{wanted}, got {list(mask.shape)}")
        other = mask[~np.isin(mask, (0, 1))]
        if other.size:
            raise BadInputError(f"{wanted}, got a {other[0]}")
        real = mask.astype(np.int64)
        ahead = np.diff(real, axis=1)
        wrong = ahead > 0 if self.layout.padding == "right" else ahead < 0
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            raise BadInputError(
                f"attention_mask must have its padding on the {self.layout.padding}, as the graph "
                f"was exported; row {row} has it elsewhere"
            )
        return real

    def _checked_positions(self, position_ids: npt.ArrayLike | None, length: int) -> Array | None:
        axes = self.layout.position_axes
        if (position_ids is not None) != bool(axes):
            wanted = "needs position_ids" if axes else "takes no position_ids: they are implied"
            got = "None" if position_ids is None else "some"
            raise BadInputError(f"the graph {wanted}, got {got}")
        if position_ids is None:
            return None
        ids = _array("position_ids", position_ids)
        shape = (*([axes] if axes > 1 else []), self.batch, length)
        if ids.shape != shape or ids.dtype.kind not in "iu":
            raise BadInputError(
                f"position_ids must be integers {list(shape)}, got {list(ids.shape)} of {ids.dtype}"
            )
        return ids.astype(np.int64)


def _array(name: str, given: npt.ArrayLike) -> Array:
    try:
        return np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise BadInputError(f"{name} must be an array: {error}") from error


def _dtype(name: str) -> np.dtype[Any]:
    if name == "tensor(bfloat16)":
        import ml_dtypes

        wide: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return wide
    return np.dtype(
        {
            "tensor(float)": np.float32,
            "tensor(float16)": np.float16,
            "tensor(int64)": np.int64,
            "tensor(int32)": np.int32,
            "tensor(int8)": np.int8,
            "tensor(uint8)": np.uint8,
            "tensor(bool)": np.bool_,
        }[name]
    )


def _zeros(shape: tuple[int, ...], decoder: Decoder) -> Any:
    return on_device(np.zeros(shape, dtype=decoder._cache_dtype), decoder.session.provider)


def _columns(ids: Array | None, index: int) -> Array | None:
    return None if ids is None else ids[..., index : index + 1]
