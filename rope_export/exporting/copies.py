"""Copies of a module that share its weights: what runs is a copy, the caller's own stays untouched.

A module may keep tables, masks or counters from one call to the next. Were the module itself run,
a trace made afterwards would find what that run left, and so would its owner.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = ("_parameters", "_buffers", "_modules")
_OF_TORCH = frozenset(vars(nn.Module()))


def fresh(module: nn.Module) -> nn.Module:
    """A copy with the same parameters, and buffers, attributes and modes of its own.

    What cannot be copied (a lock, an open file, a Python module) the two share.
    """
    known: dict[int, Any] = {}
    for part in module.modules():
        known.update((id(p), p) for p in part._parameters.values() if p is not None)
        for value in (*vars(part).values(), *part._buffers.values()):
            # Computed from weights, as weight norm does: what it is now, without its history.
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, dict(known))
    except Exception:
        for part in module.modules():
            for name, value in vars(part).items():
                if name not in _PARTS and not _is_copied(value, known):
                    known[id(value)] = value
        return copy.deepcopy(module, known)


def _is_copied(value: Any, known: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(known))
    except Exception:
        return False
    return True


Kept = dict[tuple[str, str], Any]
"""Attributes and buffers, by the path of the module and the name, ``cache._cos`` of an object."""


def kept_by(before: nn.Module, after: nn.Module) -> Kept:
    """What a call left behind: attributes and buffers that are others than before.

    Args:
        before: a copy that was not called.
        after: one that was.

    Returns:
        what they are after the call.
    """
    earlier = dict(before.named_modules())
    kept: Kept = {}
    for path, part in after.named_modules():
        if path not in earlier:
            continue
        was = _attributes(earlier[path])
        for name, value in _attributes(part).items():
            if name not in was or not _same(was[name], value):
                kept[path, name] = value
    return kept


def cooled(module: nn.Module, kept: Kept, *, by: str) -> nn.Module:
    """A copy without what calls leave behind.

    Args:
        module: what is copied.
        kept: what calls of it leave behind.
        by: ``"none"`` puts None in its place, ``"zero"`` zeros; tensors that grow have no rows.
    """
    found = fresh(module)
    parts = dict(found.named_modules())
    for (path, name), value in kept.items():
        owner: Any = parts[path]
        *inside, leaf = name.split(".")
        for step in inside:
            owner = getattr(owner, step)
        if isinstance(value, dict | list):
            cold: Any = type(value)()
        elif by == "none":
            cold = None
        elif isinstance(value, Tensor) and value.shape == getattr(
            getattr(owner, leaf), "shape", None
        ):
            cold = torch.zeros_like(value)  # written into, not made anew
        elif isinstance(value, Tensor):
            cold = value.detach().new_empty((0, *value.shape[1:]) if value.ndim else ())
        else:
            cold = 0
        if isinstance(owner, nn.Module) and leaf in owner._buffers:
            owner._buffers[leaf] = cold
        else:
            setattr(owner, leaf, cold)
    return found


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Of a module and of plain objects it holds; no weights, no submodules."""
    found = {name: value for name, value in vars(part).items() if name not in _OF_TORCH}
    found |= part._buffers
    for name, value in list(found.items()):
        if _is_plain(value):
            del found[name]
            found |= {f"{name}.{inner}": held for inner, held in vars(value).items()}
    return found


def _is_plain(value: Any) -> bool:
    """Whether something is an object of the caller's own that may hold tensors."""
    library = type(value).__module__.partition(".")[0] in ("torch", "builtins", "transformers")
    callables = isinstance(value, type | nn.Module | Tensor) or callable(value)
    return not library and not callables and hasattr(value, "__dict__")


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return (
            before.shape == after.shape
            and before.dtype == after.dtype
            and bool(torch.equal(before.nan_to_num(), after.nan_to_num()))
        )
    if type(before) is not type(after):
        return False
    if isinstance(after, dict):
        return before.keys() == after.keys() and all(_same(before[k], after[k]) for k in after)
    if isinstance(after, list | tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if after is None or isinstance(after, bool | int | float | str | torch.Size):
        return bool(before == after)
    return True  # other objects are not looked into


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Put back what a call assigns: attributes, buffers, and what lists and dictionaries hold.

    Tensors written in place are not put back.
    """
    seen: dict[int, Any] = {}
    kept = [_Held.of(vars(part), seen) for part in module.modules()]
    try:
        yield
    finally:
        for held in kept:
            held.put_back()


class _Held:
    """A list or dictionary, what it held, and those inside it."""

    def __init__(self, container: dict[Any, Any] | list[Any]) -> None:
        self.container = container
        self.content = container.copy()
        self.inside: list[_Held] = []

    @classmethod
    def of(cls, container: dict[Any, Any] | list[Any], seen: dict[int, Any]) -> _Held:
        """With what is inside, each container once."""
        held = seen[id(container)] = cls(container)
        values = container.values() if isinstance(container, dict) else container
        for value in values:
            if type(value) in (dict, list) and id(value) not in seen:
                held.inside.append(cls.of(value, seen))
        return held

    def put_back(self) -> None:
        """As it was."""
        if isinstance(self.container, dict):
            self.container.clear()
            self.container.update(self.content)
        else:
            self.container[:] = self.content
        for inside in self.inside:
            inside.put_back()
