"""`Inputs`: what a module is called with in a proof, drawn from its example or by the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rope_export.artifacts.cache_layout import MASK
from rope_export.errors import BadInputError
from rope_export.exporting.blame import blamed
from rope_export.exporting.call import Call
from rope_export.exporting.entries import counts
from rope_export.exporting.labels import is_name, size_of
from rope_export.exporting.module import ModuleRequest
from rope_export.exporting.signature import Signature
from rope_export.proof.arrays import from_numpy, to_numpy
from rope_export.proof.examples import Likeness
from rope_export.runtime.token_places import Array

_POSITIONS = "pos"  # in the name of an input that counts from where the past ends


class Inputs:
    """Draws inputs.

    Args:
        request: has the example.
        signature: what the graph takes.
    """

    def __init__(self, request: ModuleRequest, signature: Signature) -> None:
        self._request = request
        self._signature = signature

    @cached_property
    def likenesses(self) -> dict[str, Likeness]:
        """Of every input that is not drawn by a rule of its own."""
        inputs = self._signature.inputs
        batch = next(iter(inputs.values()))[:1]
        return {
            leaf.name: Likeness(leaf.name, example, rows=inputs[leaf.name][-2:-1] != batch)
            for leaf, example in zip(self._call.leaves, self._call.tensors, strict=True)
            if not self._is_padding(leaf.name) and not self._is_position(leaf.name, example)
        }

    @property
    def _call(self) -> Call:
        return self._request.call

    def _is_padding(self, name: str) -> bool:
        return name == MASK and self._signature.masked

    def _is_position(self, name: str, example: Tensor) -> bool:
        return _POSITIONS in name and counts(example)

    @cached_property
    def padded_side(self) -> str | None:
        """The side on which the example's mask pads, or None."""
        if not self._signature.masked:
            return None
        mask = self.example()[MASK] != 0
        padded = mask[~mask.all(axis=1)]
        if not len(padded):
            return None
        return "left" if (~padded[:, 0]).sum() > (~padded[:, -1]).sum() else "right"

    @property
    def shift(self) -> int:
        """How far single whole numbers, such as an offset, may shift a sequence."""
        single = [
            int(tensor)
            for tensor in self._call.tensors
            if tensor.numel() == 1 and tensor.dtype in (torch.int32, torch.int64)
        ]
        return max(single, default=0)

    def example(self) -> dict[str, Array]:
        """The caller's own."""
        pairs = zip(self._call.names, self._call.tensors, strict=True)
        return {name: to_numpy(t.detach().cpu().contiguous()) for name, t in pairs}

    def draw(
        self,
        sizes: Mapping[str, int],
        rng: np.random.Generator,
        lengths: tuple[int, ...],
        *,
        varied: bool = True,
        within: bool = False,
    ) -> dict[str, Array]:
        """Inputs of given sizes by name.

        Args:
            sizes: of the labels.
            rng: draws.
            lengths: of rows that are padded; none for rows that are not.
            varied: whether floating-point inputs that are the same everywhere may be others.
            within: whether whole numbers are no larger than the sequence they may be lengths of.
        """
        signature, call = self._signature, self._call
        given = self._given(sizes, rng)
        drawn: dict[str, Array] = {}
        for leaf, example in zip(call.leaves, call.tensors, strict=True):
            axes = signature.inputs[leaf.name]
            shape = tuple(size_of(axis, sizes) for axis in axes)
            if leaf.name in given:
                drawn[leaf.name] = _fitting(leaf.name, given[leaf.name], shape, example)
            elif self._is_padding(leaf.name):
                new = self._signature.new_tokens(sizes) if lengths else 0
                drawn[leaf.name] = self._mask(shape, lengths, new, example)
            elif self._is_position(leaf.name, example):
                last = self._request.longest - shape[-1]
                first = max(0, min(int(example.flatten()[0]), last))
                if signature.past is not None:
                    first = size_of(signature.past, sizes)
                ids = np.broadcast_to(np.arange(shape[-1]) + first, shape)
                drawn[leaf.name] = ids.astype(to_numpy(example.detach().cpu()).dtype)
            elif (counted := self._lengths(example, axes, sizes, rng)) is not None:
                drawn[leaf.name] = counted.reshape(shape)
            else:
                array = self.likenesses[leaf.name].draw(shape, rng, varied=varied)
                drawn[leaf.name] = self._no_longer(array, example, sizes) if within else array
        return drawn

    def _lengths(
        self,
        example: Tensor,
        axes: Sequence[str | int],
        sizes: Mapping[str, int],
        rng: np.random.Generator,
    ) -> Array | None:
        """Lengths of rows, where the example has a whole number a row and the longest is full."""
        kind = example.dtype in (torch.int32, torch.int64)
        batch = next(iter(self._signature.inputs.values()))[:1]
        full = self._new_tokens(self._request.labelled.sizes)
        if not kind or list(axes) != batch or full is None or not example.numel():
            return None
        if int(example.max()) != full or int(example.min()) < 1:
            return None
        longest = self._new_tokens(sizes) or 1
        found = rng.integers(1, longest + 1, size_of(axes[0], sizes))
        found[0] = longest
        lengths: Array = found.astype(to_numpy(example.detach().cpu()).dtype)
        return lengths

    def _new_tokens(self, sizes: Mapping[str, int]) -> int | None:
        label = self._signature.sequence
        return None if label is None else size_of(label, sizes)

    def _no_longer(self, array: Array, example: Tensor, sizes: Mapping[str, int]) -> Array:
        """Whole numbers up to a sequence's length, which those of the example do not exceed."""
        longest, full = self._new_tokens(sizes), self._new_tokens(self._request.labelled.sizes)
        whole = array.dtype.kind == "i" and example.ndim < 2
        if not whole or longest is None or full is None or int(example.max()) > full:
            return array
        return np.minimum(array, longest).astype(array.dtype)

    def drawn_in_words(self, inputs: Mapping[str, Array]) -> str:
        """What whole numbers and masks a case was given that its caller did not give."""
        shown = []
        for name, likeness in self.likenesses.items():
            array, whole = inputs[name], inputs[name].dtype.kind in "ib"
            if not array.size or array.ndim == 0 or not (whole or likeness.keeps):
                continue
            low, high = array.min(), array.max()
            shown.append(f"{name} {low}" if low == high else f"{name} {low} … {high}")
        return ", ".join(shown)

    def _given(self, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Tensor]:
        """What the caller's own function draws."""
        request = self._request
        if request.inputs is None:
            return {}
        known = dict(sizes)
        for _, _, asked in request.labelled.asked():
            if is_name(asked.label) and asked.label not in known:
                axes = self._signature.inputs
                known |= {
                    label.label: size_of(axes[name][axis], sizes)
                    for name, axis, label in request.labelled.asked()
                    if label.label == asked.label
                }
        try:
            got = request.inputs(known, rng)
        except Exception as error:
            raise BadInputError(
                f"inputs must draw inputs of every size: {blamed(error)} raises "
                f"{type(error).__name__} at {shown(known)}: {error}"
            ) from error
        if not isinstance(got, Mapping):
            raise BadInputError(f"inputs must return arguments by name, got {type(got).__name__}")
        arguments = dict(request.call.arguments)
        unknown = [name for name in got if name not in arguments]
        if unknown:
            raise BadInputError(
                f"inputs must return arguments of the example ({', '.join(arguments)}), got "
                f"{unknown[0]!r}"
            )
        found: dict[str, Tensor] = {}
        for name, value in got.items():
            names = [leaf.name for leaf in request.call.leaves if leaf.argument == name]
            parts = torch.utils._pytree.tree_leaves(value)
            parts = [from_numpy(p.copy()) if isinstance(p, np.ndarray) else p for p in parts]
            tensors = [part for part in parts if isinstance(part, Tensor)]
            if len(names) != len(tensors):
                raise BadInputError(
                    f"inputs must return {name} with {len(names)} tensors, got {len(tensors)}"
                )
            found |= dict(zip(names, tensors, strict=True))
        return found

    def _mask(
        self, shape: tuple[int, ...], lengths: tuple[int, ...], new: int, example: Tensor
    ) -> Array:
        side = self.padded_side or self._request.padding
        mask = np.ones(shape, dtype=np.int64)
        for row, length in enumerate(lengths):
            pad = new - length
            if pad and side == "left":
                mask[row, shape[1] - new : shape[1] - length] = 0
            elif pad:
                mask[row, shape[1] - pad :] = 0
        kind: Array = mask.astype(to_numpy(example.detach().cpu()[:0]).dtype)
        return kind


def _fitting(name: str, given: Tensor, shape: tuple[int, ...], example: Tensor) -> Array:
    if tuple(given.shape) != shape or given.dtype != example.dtype:
        raise BadInputError(
            f"inputs must give {name} as {list(shape)} of {example.dtype}, got "
            f"{list(given.shape)} of {given.dtype}"
        )
    return to_numpy(given.detach().cpu().contiguous())


def shown(sizes: Mapping[str, int]) -> str:
    """Sizes of labels in words."""
    return ", ".join(f"{label} {size}" for label, size in sizes.items())
