"""How a module is called, taken apart into tensors with names and put together again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rope_export.errors import BadInputError
from rope_export.exporting.copies import fresh, left_as_it_was

KINDS = ("key", "value")
PAST, PRESENT = "past_key_values", "present"
_CACHE_ARGUMENT = ("past", "cache", "kv")
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Leaf:
    """A tensor that goes in or comes out.

    Attributes:
        name: in the graph.
        argument: the argument it is part of, or the result.
        layer: of a cache, which layer's, else None.
    """

    name: str
    argument: str
    layer: int | None = None


class Call:
    """The arguments of one example call.

    Args:
        module: what is called.
        args: positional example inputs.
        kwargs: example inputs by name.

    Raises:
        BadInputError: they do not fit the signature, or hold no tensor.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.module = module
        if not isinstance(args, list | tuple):
            raise BadInputError(
                f"args must be a tuple of example inputs, got {type(args).__name__}"
            )
        kind = type(module).__name__
        try:
            signature = inspect.signature(module.forward)
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadInputError(f"args must be example inputs of {kind}: {error}") from None
        self._bound = bound
        self.takes_pair = False
        self.arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            how = signature.parameters[name].kind
            if how is inspect.Parameter.VAR_KEYWORD:
                self.arguments |= value
            elif how is inspect.Parameter.VAR_POSITIONAL:
                self.arguments |= {f"{name}_{index}": entry for index, entry in enumerate(value)}
            else:
                self.arguments[name] = value
        flat, self._spec = pytree.tree_flatten_with_path((bound.args, bound.kwargs))
        names = self._names()
        self.leaves: list[Leaf] = []
        self.tensors: list[Tensor] = []
        self.constants: dict[str, Any] = {}
        self._slots: list[Any] = []
        for (_, value), leaf in zip(flat, names, strict=True):
            if isinstance(value, Tensor):
                check_dtype(leaf.name, value)
                self._slots.append(None)
                self.leaves.append(leaf)
                self.tensors.append(value)
            elif value is None or isinstance(value, bool | int | float | str):
                self._slots.append((value,))
                if value is not None:
                    self.constants[leaf.name] = value
            else:
                raise BadInputError(
                    f"{leaf.name} must be a tensor, a number, a text or None, got "
                    f"{type(value).__name__}{_instead_of(value)}"
                )
        if not self.tensors:
            raise BadInputError(f"args must hold a tensor: {kind} would be a constant, got none")
        repeated = {leaf.name for leaf in self.leaves if self.names.count(leaf.name) > 1}
        if repeated:
            raise BadInputError(f"two inputs would be named {min(repeated)!r}; rename an argument")

    @property
    def names(self) -> list[str]:
        """Of the tensors that go in, in order."""
        return [leaf.name for leaf in self.leaves]

    def _names(self) -> list[Leaf]:
        """A leaf for everything in the arguments, in the order of the flattened call."""
        leaves: list[Leaf] = []
        cached = False
        by_name = {**self.arguments}
        given = [*self._bound.args, *self._bound.kwargs.values()]
        for (name, value), entry in zip(by_name.items(), given, strict=True):
            assert value is entry
            pairs = isinstance(value, list | tuple) and (
                is_cache(value) or (_is_pair(value) and any(w in name for w in _CACHE_ARGUMENT))
            )
            stem = name
            if pairs:
                self.takes_pair |= not is_cache(value)
                stem = PAST if not cached else name
                cached = True
            leaves += [
                Leaf(_joined(stem, path, pairs=pairs), name, _layer(path) if pairs else None)
                for path, _ in pytree.tree_flatten_with_path(value)[0]
            ]
        return leaves

    def of(self, module: nn.Module) -> Call:
        """The same call of another module, such as a copy."""
        other = copy.copy(self)
        other.module = module
        return other

    def fresh(self) -> Call:
        """The same call of a copy of the module, which is as the caller's own is now."""
        return self.of(fresh(self.module))

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """Call the module with these tensors in place of the example's."""
        given = iter(tensors)
        values = [next(given) if slot is None else slot[0] for slot in self._slots]
        args, kwargs = pytree.tree_unflatten(values, self._spec)
        return self.module(*args, **kwargs)


class _Found:
    """Kept apart from the module, whose own attributes a trace restores."""

    leaves: list[Leaf]
    given: tuple[Tensor, ...] = ()


class Flat(nn.Module):
    """A module as a function from tensors to tensors; fills in what its results are called.

    Args:
        call: how it is called.
        output_names: of the results that are no cache, or None.
        forgets: whether attributes and buffers that a call assigns are put back afterwards. A
            trace must: what it would leave are no numbers, and PyTorch refuses it.
    """

    def __init__(
        self, call: Call, output_names: Sequence[str] | None = None, *, forgets: bool = False
    ) -> None:
        super().__init__()
        self.module = call.module
        self.call = call
        self.output_names = output_names
        self._around = left_as_it_was if forgets else nullcontext
        self._found = _Found()

    @property
    def outputs(self) -> list[Leaf]:
        """What the results of the last call are called."""
        return self._found.leaves

    def place_of(self, tensor: Tensor) -> int | None:
        """Which of the tensors of the last call it is, if any."""
        return next((i for i, each in enumerate(self._found.given) if each is tensor), None)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call, and take the result apart."""
        self._found.given = tensors
        with self._around(self.module):
            result = self.call.call(tensors)
        self._found.leaves, results = outputs_of(
            result, self.output_names, pair=self.call.takes_pair
        )
        taken = next((leaf.name for leaf in self.outputs if leaf.name in self.call.names), None)
        if taken is not None:
            raise BadInputError(
                f"output {taken!r} would have the name of an input; give output_names"
            )
        seen = {id(tensor) for tensor in tensors}
        distinct = []
        for result in results:  # a graph gives each of its results a name of its own
            distinct.append(result.clone() if id(result) in seen else result)
            seen.add(id(result))
        return tuple(distinct)


def outputs_of(
    result: Any, output_names: Sequence[str] | None = None, *, pair: bool = False
) -> tuple[list[Leaf], list[Tensor]]:
    """Take a result apart.

    Args:
        result: what a module returned.
        output_names: of its entries that are no cache, in order, or None.
        pair: whether one pair of tensors is a cache too.

    Raises:
        BadInputError: something in it is no tensor that a graph could give.
    """
    plain = [name for name, value in _entries(result) if not _caches(value, pair)]
    if output_names is not None and len(output_names) != len(plain):
        raise BadInputError(
            f"output_names must name the {len(plain)} outputs that are no cache, got "
            f"{len(output_names)}: {', '.join(output_names)}"
        )
    renamed = dict(zip(plain, output_names or plain, strict=True))
    if output_names is None and plain == ["0"]:
        renamed = {"0": "output"}
    leaves, tensors = [], []
    cached = False
    for entry, value in _entries(result):
        pairs = _caches(value, pair)
        stem = renamed.get(entry, entry)
        stem = f"output_{stem}" if stem.isdigit() else stem
        if pairs:
            stem, cached = (PRESENT if not cached else stem), True
        for path, part in pytree.tree_flatten_with_path(value)[0]:
            name = _joined(stem, path, pairs=pairs)
            if part is None:
                continue
            if not isinstance(part, Tensor):
                shown = f" {part!r}" if isinstance(part, bool | int | float | str) else ""
                instead = _instead_of(part) or ": a graph returns nothing else"
                raise BadInputError(
                    f"{name} must be a tensor, got {type(part).__name__}{shown}{instead}"
                )
            leaves.append(Leaf(name, entry, _layer(path) if pairs else None))
            tensors.append(part)
    if not tensors:
        raise BadInputError(f"the module must return a tensor, got {type(result).__name__}")
    names = [leaf.name for leaf in leaves]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise BadInputError(f"two outputs would be named {min(repeated)!r}; give output_names")
    return leaves, tensors


def _instead_of(value: Any) -> str:
    """What to give or return in place of an object that is no tensor, where that is known."""
    if any(kind.__name__.endswith("Cache") for kind in type(value).__mro__):
        return (
            " (a cache of transformers): call the model with use_cache=False (or set it in the "
            "config), or have the cache in the graph with rope_export.replace_attention(model) and "
            "DecoderWithCache(model)"
        )
    if isinstance(value, np.ndarray | np.generic):
        return ": use torch.as_tensor" if value.ndim else f": use {value.item()!r}"
    if hasattr(value, "__dict__") and any(isinstance(v, Tensor) for v in vars(value).values()):
        return ": use its tensors themselves, a dictionary of them, or a NamedTuple"
    return ""


def _entries(result: Any) -> list[tuple[str, Any]]:
    """Top-level parts of a result, by name or number."""
    if isinstance(result, Tensor):
        return [("0", result)]
    if isinstance(result, Mapping):
        return [(str(name), value) for name, value in result.items()]
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return list(zip(result._fields, result, strict=True))
    if is_dataclass(result):
        return [(field.name, getattr(result, field.name)) for field in fields(result)]
    if isinstance(result, list | tuple) and not is_cache(result):
        return [(str(index), value) for index, value in enumerate(result)]
    return [("0", result)]


def _caches(value: Any, pair: bool) -> bool:
    return isinstance(value, list | tuple) and (is_cache(value) or (pair and _is_pair(value)))


def is_cache(value: Sequence[Any]) -> bool:
    """Whether something is keys and values of layers: a list of pairs of tensors of four axes."""
    return bool(value) and all(isinstance(pair, list | tuple) and _is_pair(pair) for pair in value)


def _is_pair(pair: Sequence[Any]) -> bool:
    return len(pair) == 2 and all(
        isinstance(part, Tensor) and part.ndim == 4 and part.is_floating_point() for part in pair
    )


def _keys(path: tuple[Any, ...]) -> list[str]:
    keys = []
    for entry in path:
        for field in ("key", "idx", "name"):
            if hasattr(entry, field):
                keys.append(str(getattr(entry, field)))
                break
    return keys


def _layer(path: tuple[Any, ...]) -> int:
    keys = _keys(path)
    return int(keys[0]) if len(keys) > 1 else 0


def _joined(stem: str, path: tuple[Any, ...], *, pairs: bool) -> str:
    keys = _keys(path)
    if pairs:
        keys = [str(_layer(path)), KINDS[int(keys[-1])]]
    return ".".join([stem, *keys])


def check_dtype(name: str, tensor: Tensor) -> None:
    """Check that a graph can take or give a tensor.

    Raises:
        BadInputError: its dtype or layout is none that a graph has.
    """
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
        got = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided:
            got += f" {str(tensor.layout).removeprefix('torch.')}"
        raise BadInputError(f"{name} must be one of {', '.join(DTYPE_NAMES.values())}, got {got}")
