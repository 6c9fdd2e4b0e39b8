"""Float64 truth of any module: its own code, every operator widened, our parts by the reference.

A model is evaluated as it stands, with its rounded weights, but no operator rounds to less than
float64, whatever the code casts to. Attention and rotations of this package are computed by
`reference`, which shares nothing with the modules it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rope_export import dispatch
from rope_export.attention.block import Attention, Cache
from rope_export.attention.tokens import Tokens
from rope_export.attention.visibility import token_order
from rope_export.errors import BadInputError
from rope_export.proof import stated_dtypes
from rope_export.proof.reference import (
    Semantics,
    exact_angles,
    mix,
    plain_keys_and_values,
    queries,
    slice_rows,
    turn_pairs,
    turned_at,
)
from rope_export.proof.window_slots import WindowSlots
from rope_export.rope.frequencies import Frequencies
from rope_export.rope.rotation import over_heads

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
# They only move numbers: what they give is widened where it is first computed with.
_MOVES = frozenset({"aten::embedding", "aten::detach", "aten::lift_fresh", "aten::alias"})
_MOVING_FUNCTIONS = frozenset({"embedding", "detach", "clone"})


Kept = dict[int, tuple[Tensor, Tensor]]
"""Weights and what they are in float64, by the identity of the weight."""


@contextmanager
def exactly(
    module: nn.Module,
    alter: Callable[[Semantics], Semantics] | None = None,
    *,
    mirrored: str | None = None,
    kept: Kept | None = None,
) -> Iterator[None]:
    """Evaluate a module in float64 while the context lasts.

    Args:
        module: what is evaluated; it is as it was afterwards.
        alter: states a defect of every attention: what it does to its semantics.
        mirrored: states one of every rotation on its own, the wrong direction: in the ``"angles"``
            that a module asks for, or in the ``"rotation"`` by what it has.
        kept: holds widened weights from one evaluation to the next; empty at first. None: weights
            are widened where they are used and dropped again.
    """
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        dispatch.evaluated_by(Evaluator(alter, mirrored=mirrored)),
        _widened_recurrences(module),
        _buffers_put_back(module),
        _WidenedArguments(kept),
        _Widened(),  # type: ignore[no-untyped-call]
    ):
        yield


class _Widened(TorchDispatchMode):
    """Every operator reads and writes float64 where it would have less."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload | torch._ops.HigherOrderOperator,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        given = dict(kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._by_parts(func, args, given)
        schema = func._schema
        if func.is_view or schema.name in _MOVES:
            return func(*args, **given)
        written = {
            argument.name
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        names = [argument.name for argument in schema.arguments]
        wide_args = [
            arg if name in written else tree_map(_widened, arg)
            for name, arg in zip(names, args, strict=False)
        ]
        wide_kwargs = {
            name: arg if name in written else tree_map(_widened, arg) for name, arg in given.items()
        }
        result = func(*wide_args, **wide_kwargs)
        return result if written else tree_map(_widened, result)

    def _by_parts(
        self, func: torch._ops.HigherOrderOperator, args: tuple[Any, ...], given: dict[str, Any]
    ) -> Any:
        """Control flow (cond, while_loop, scan): the operators inside are widened."""
        run = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if run is None:
            raise BadInputError(f"{func.name()} cannot be evaluated in float64")

        def inside(value: Any) -> Any:
            if isinstance(value, Tensor) or not callable(value):
                return _widened(value)

            def widened(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return value(*args, **kwargs)

            return widened

        args, given = tree_map(inside, (args, given))
        return run(*args, **given)


class _WidenedArguments(TorchFunctionMode):
    """Functions that compare their arguments' dtypes before any operator runs get them widened.

    Code that asks for a dtype is told the one of an ordinary run.
    """

    def __init__(self, kept: Kept | None) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        given = dict(kwargs or {})
        answer = stated_dtypes.question(func, args)
        if answer is not None:
            return answer
        name = getattr(func, "__name__", "_")
        of_tensor = getattr(torch.Tensor, name, None) is func
        function = isinstance(func, BuiltinFunctionType | FunctionType) and not of_tensor
        writes = name.endswith("_") or "out" in given
        if function and not writes and name not in _MOVING_FUNCTIONS:
            wide_args, wide = tree_map(self._widened, (args, given))
            result = func(*wide_args, **wide)
        else:
            result = func(*args, **given)
        return stated_dtypes.carried_over(func, args, given, result)

    def _widened(self, value: Any) -> Any:
        if self._kept is None or not isinstance(value, nn.Parameter):
            return _widened(value)
        known = self._kept.get(id(value))
        if known is None:  # the weight is held too, so that its number stays its own
            known = self._kept[id(value)] = (value, _widened(value))
        return known[1]


@contextmanager
def _widened_recurrences(module: nn.Module) -> Iterator[None]:
    """Widen the weights of recurrent layers, which compare dtypes in Python."""
    weights = [p for m in module.modules() if isinstance(m, nn.RNNBase) for p in m.parameters()]
    kept = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.double()
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data


@contextmanager
def _buffers_put_back(module: nn.Module) -> Iterator[None]:
    """Put back the buffers that a module assigns when it is called: they would be float64."""
    kept = [(part, dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, buffers in kept:
            part._buffers.update(buffers)


def widened(tensor: Tensor) -> Tensor:
    """A copy of an input, in float64, that answers to its own dtype."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return stated_dtypes.remember(tensor.double(), tensor.dtype)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _WIDE:
        return value.to(_WIDE[value.dtype])
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    return value


class Evaluator:
    """What computes in place of our modules while truth is asked for.

    Args:
        alter: what is done to the semantics of every attention.
        mirrored: where rotations on their own turn the other way, as of `exactly`.
    """

    def __init__(
        self,
        alter: Callable[[Semantics], Semantics] | None = None,
        *,
        mirrored: str | None = None,
    ) -> None:
        self._alter = alter
        self._mirrored = mirrored

    def attend(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Cache | None]:
        """Attend as ``attention`` states, from its weights.

        Returns:
            ``[B, S, num_heads * value_head_dim]`` float64, and the present when there is a past.
        """
        meaning = Semantics.of(attention)
        if self._alter is not None:
            meaning = self._alter(meaning)
        x, mask = tokens.hidden_states.double(), tokens.attention_mask
        past = None if tokens.past is None else (tokens.past[0].double(), tokens.past[1].double())
        attention.check_inputs(x, past, mask, by_window=tokens.window_cache)
        earlier = 0 if past is None else past[0].shape[-2]
        total = earlier + x.shape[1]
        order = torch.arange(total, device=x.device).unsqueeze(0)
        real = slots = None
        if tokens.window_cache and past is not None and mask is not None:
            slots = WindowSlots(mask != 0, x.shape[1], earlier, attention.window or 1)
            order, real = slots.order, slots.real
        elif mask is not None:
            order, real = token_order(mask), mask != 0
        positions = tokens.position_ids
        if positions is None:
            positions = order[:, earlier:] + tokens.offset
        k, v = plain_keys_and_values(attention, x, meaning)
        longest = int(positions.max()) + 1
        q = turned_at(queries(attention, x, meaning), positions, meaning, longest, of_queries=True)
        k = turned_at(k, positions, meaning, longest, of_queries=False)
        v = v.roll(meaning.value_roll, 1)
        if past is not None:
            if slots is not None:
                past = slots.cleared(past[0]), slots.cleared(past[1])
            k = torch.cat((past[0], k), dim=-2)
            v = torch.cat((past[1], v), dim=-2)

        def hide(start: int, stop: int) -> tuple[int, int, Tensor]:
            ahead = order.unsqueeze(-2) - order[:, earlier:].unsqueeze(-1)[:, start:stop]
            hidden = ahead > 0 if meaning.causal else torch.zeros_like(ahead, dtype=torch.bool)
            if meaning.window is not None:
                far = ahead <= -meaning.window if meaning.causal else ahead.abs() > meaning.window
                hidden = hidden | far
            if real is not None:
                hidden = hidden | ~real.unsqueeze(-2)
            # A row of padding that sees nothing must not become NaN, which would spread.
            hidden = hidden & ~hidden.all(-1, keepdim=True)
            return 0, total, hidden[:, None, None]

        step = slice_rows(x.shape[0] * meaning.num_heads, total, meaning)
        context = mix(q, k, v, meaning, hide, step=step)
        if slots is not None:
            k, v = slots.kept(k), slots.kept(v)
        for tensor in (context, k, v):
            stated_dtypes.remember(tensor, attention.dtype)
        return context, None if past is None else (k, v)

    def cos_sin(
        self, found: Frequencies, position_ids: Tensor, *, axes_lead: bool
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions in float64, as `RotaryEmbedding.cos_sin` has them."""
        longest = int(position_ids.max()) + 1
        if axes_lead:
            of_axes = position_ids if position_ids.ndim == 3 else position_ids.unsqueeze(1)
            angles = exact_angles(of_axes, found, longest)
            angles = angles if position_ids.ndim == 3 else angles.squeeze(0)
        else:
            flat = exact_angles(position_ids.flatten(), found, longest)
            angles = flat.unflatten(0, position_ids.shape)
        factor = found.attention_factor
        sign = -1.0 if self._mirrored == "angles" else 1.0
        turns = angles.cos() * factor, angles.sin() * (sign * factor)
        for tensor in turns:
            stated_dtypes.remember(tensor, torch.float32)
        return turns

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, layout: str, seq_dim: int) -> Tensor:
        """Rotate heads, as `rotation.rotate_sequence` has it, in float64."""
        sign = -1.0 if self._mirrored == "rotation" else 1.0
        turn = torch.complex(cos.double(), sign * sin.double())
        turned = turn_pairs(x.double(), over_heads(turn, x.ndim, seq_dim), layout)
        return stated_dtypes.remember(turned, x.dtype)
