"""`Inputs`: what a module is called with in a proof, drawn from its example or by the caller."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rope_export.artifacts.cache_layout import MASK
from rope_export.errors import BadInputError
from rope_export.exporting.blame import blamed
from rope_export.exporting.labels import is_name, size_of
from rope_export.exporting.module import ModuleRequest
from rope_export.exporting.signature import Signature
from rope_export.proof.arrays import from_numpy, to_numpy
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

    def draw(
        self, sizes: Mapping[str, int], rng: np.random.Generator, lengths: tuple[int, ...]
    ) -> dict[str, Array]:
        """Inputs of given sizes by name."""
        signature, call = self._signature, self._request.call
        given = self._given(sizes, rng)
        drawn: dict[str, Array] = {}
        for leaf, example in zip(call.leaves, call.tensors, strict=True):
            axes = signature.inputs[leaf.name]
            shape = tuple(size_of(axis, sizes) for axis in axes)
            if leaf.name in given:
                drawn[leaf.name] = _fitting(leaf.name, given[leaf.name], shape, example)
            elif leaf.name == MASK and signature.masked:
                new = self._signature.new_tokens(sizes) if lengths else 0
                drawn[leaf.name] = self._mask(shape, lengths, new, example)
            elif _POSITIONS in leaf.name and _counts(example):
                last = self._request.longest - shape[-1]
                first = max(0, min(int(example.flatten()[0]), last))
                if signature.past is not None:
                    first = size_of(signature.past, sizes)
                ids = np.broadcast_to(np.arange(shape[-1]) + first, shape)
                drawn[leaf.name] = ids.astype(to_numpy(example.detach().cpu()).dtype)
            else:
                drawn[leaf.name] = _like(example, shape, rng)
        return drawn

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
        mask = np.ones(shape, dtype=np.int64)
        for row, length in enumerate(lengths):
            pad = new - length
            if pad and self._request.padding == "left":
                mask[row, shape[1] - new : shape[1] - length] = 0
            elif pad:
                mask[row, shape[1] - pad :] = 0
        kind: Array = mask.astype(to_numpy(example.detach().cpu()[:0]).dtype)
        return kind


def _like(example: Tensor, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Values as the example has them: its spread, or its integers."""
    sample = example.detach().cpu()
    if sample.is_floating_point():
        values = sample.double().flatten()
        spread = float(values.std()) if values.numel() > 1 else 0.0
        usable = spread > 0 and np.isfinite(spread)
        mean = float(values.mean()) if usable else 0.0
        normal = rng.standard_normal(shape) * (spread if usable else 1.0) + mean
        return to_numpy(torch.as_tensor(normal).to(sample.dtype))
    array = to_numpy(sample)
    if not array.size:
        return np.zeros(shape, dtype=array.dtype)
    drawn: Array = rng.choice(array.reshape(-1), size=shape)
    return drawn.astype(array.dtype)


def _counts(example: Tensor) -> bool:
    """Whether every row counts up by one, as positions do."""
    if example.ndim == 0 or not example.numel() or example.dtype.is_floating_point:
        return False
    array = to_numpy(example.detach().cpu())
    return array.dtype.kind == "i" and bool((np.diff(array, axis=-1) == 1).all())


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
