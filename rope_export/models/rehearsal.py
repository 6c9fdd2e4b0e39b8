"""Running a decoder of transformers on a few tokens, and leaving it as it was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Longer windows are run as windows of so many tokens.
NARROW = 8
ROWS = 3
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Run:
    """A few tokens in three rows.

    Attributes:
        name: what it is, in words.
        steps: how many tokens there are in each call.
        left: padding at the beginning of each row.
        right: and at its end.
        cached: whether there is a cache.
    """

    name: str
    steps: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    cached: bool

    @property
    def mask(self) -> Tensor:
        """``[rows, tokens]``, 1 for a token."""
        order = torch.arange(sum(self.steps))
        left, right = (torch.tensor(n)[:, None] for n in (self.left, self.right))
        return ((order >= left) & (order < len(order) - right)).long()

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return any((*self.left, *self.right))

    def calls(self) -> Iterator[tuple[int, int]]:
        """Where each call begins and ends."""
        start = 0
        for count in self.steps:
            yield start, start + count
            start += count


def runs(longest: int) -> list[Run]:
    """Whole rows, rows padded on either side, and several calls: of two windows, where served."""
    tokens = min(2 * NARROW + 5, longest)
    ahead, behind = tokens // 4, tokens // 5
    several = (tokens - tokens // 2, *filter(None, (tokens // 4, min(1, tokens // 8))))
    whole = (0,) * ROWS
    return [
        Run("whole rows", (tokens,), whole, whole, cached=False),
        Run("padded rows", (tokens,), (ahead, 0, 1), (0, behind, 0), cached=False),
        Run("calls with a cache", several, (0, ahead // 2, 1), whole, cached=True),
    ]


class _HeardError(Exception):
    """What was to be heard of a layer was."""


def listen(layer: nn.Module, attention: nn.Module, hear: Callable[[Any, Any], None]) -> None:
    """Have a layer end where it calls its attention.

    Args:
        layer: of a decoder.
        attention: the part of it that is listened to.
        hear: told the positional arguments it is called with, and those by name.
    """
    whole = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hear(args, kwargs)
        raise _HeardError

    def until_heard(*args: Any, **kwargs: Any) -> Any:
        try:
            return whole(*args, **kwargs)
        except _HeardError:
            # The stream as it came in: nobody looks at it. A layer that gives a tuple is asked for
            # the first of it, which is the rows' first, and that is put back for the next.
            stream = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return _Stream.of(stream)

    vars(attention)["forward"] = forward
    vars(layer)["forward"] = until_heard


class _Stream(Tensor):
    """Hidden states that are also the first of what a layer gives."""

    @staticmethod
    def of(hidden_states: Tensor) -> Tensor:
        return hidden_states.as_subclass(_Stream)

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, int) else super().__getitem__(key)


def called(module: nn.Module, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What an attention in float32 gives for ``x``, called as it is by its layer."""
    given = dict(kwargs)
    if "hidden_states" in given:
        given["hidden_states"] = x
        taken = tuple(args)
    else:
        taken = (x, *args[1:])
    taken, given = _wide(taken), _wide(given)
    result = type(module).forward(module, *taken, **given)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output.detach().float().cpu()


def _wide(value: Any) -> Any:
    """In float32; caches stay the objects they are, also where PyTorch is told how to rebuild them.

    transformers tells it so (``register_dynamic_cache_export_support``) when it exports.
    """
    if type(value) in (tuple, list):
        return type(value)(map(_wide, value))
    if type(value) is dict:
        return {name: _wide(held) for name, held in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.as_subclass(Tensor).float()
    return value


def in_float32(module: Any) -> Any:
    """The module, or a copy that computes in float32 and shares its tables and its config."""
    if all(p.dtype == torch.float32 for p in module.parameters()):
        return module
    kept: dict[int, Any] = {}
    for value in (*vars(module).values(), getattr(module, "rope", None)):
        if not isinstance(value, Tensor | dict):
            kept[id(value)] = value
    return copy.deepcopy(module, kept).float()


@contextmanager
def as_it_was(root: nn.Module) -> Iterator[None]:
    """Put back every attribute of every module, however often it was changed."""
    kept = [
        (part, dict(vars(part)), [(own, dict(own)) for own in _registers(part)])
        for part in root.modules()
    ]
    try:
        yield
    finally:
        for part, attributes, registers in kept:
            vars(part).clear()
            vars(part).update(attributes)
            for own, content in registers:
                own.clear()
                own.update(content)


def _registers(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


@contextmanager
def plainly() -> Iterator[None]:
    """Neither compiled nor under the caller's autocast."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with torch.compiler.set_stance("force_eager"):
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        try:
            yield
        finally:
            for kind in kinds:
                torch.set_autocast_enabled(kind, True)


def narrow(window: int | None) -> int | None:
    """A window no longer than `NARROW`."""
    return None if window is None else min(window, NARROW)


def give_config(model: nn.Module, decoder: Any, way: str) -> None:
    """Configs of its own, in which windows are narrow and masks are made as told.

    Args:
        model: what is run.
        decoder: the part of it whose attention is of interest.
        way: how attention is computed, in transformers' words.
    """
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    for holder in (model, decoder):
        copy.deepcopy(getattr(holder, "config", None), copies)
    for part in model.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(part)[name] = copies[id(value)]
    decoder.config._attn_implementation = way
    if isinstance(getattr(decoder.config, "sliding_window", None), int):
        decoder.config.sliding_window = narrow(decoder.config.sliding_window)


def keep_angles_in_float32(decoder: Any) -> None:
    """Have rotary embeddings round nothing, where the model is or was in half precision."""
    for part in decoder.modules():
        kind = type(part)
        if "Rotary" not in kind.__name__ or kind.__module__.startswith("rope_export"):
            continue
        if "config" in inspect.signature(kind).parameters:
            made: Any = kind
            fresh = made(config=decoder.config)._buffers
            held = part._buffers
            if any(_is_rounded(held.get(name), exact) for name, exact in fresh.items()):
                device = next(b.device for b in held.values() if b is not None)
                held.update({n: None if b is None else b.to(device) for n, b in fresh.items()})
        whole = part.forward

        def forward(x: Tensor, *args: Any, whole: Any = whole, **kwargs: Any) -> Any:
            return whole(x.float(), *args, **kwargs)

        vars(part)["forward"] = forward


def _is_rounded(held: Tensor | None, exact: Tensor | None) -> bool:
    """Whether a buffer is in half precision, or went through it."""
    if held is None or exact is None or not held.is_floating_point():
        return False
    if held.dtype in _HALF:
        return True
    now, meant = held.detach().cpu(), exact.detach().cpu().to(held.dtype)
    if now.shape != meant.shape or torch.equal(now, meant):
        return False
    return any(torch.equal(now, meant.to(half).to(now.dtype)) for half in _HALF)
