"""The dtype that a tensor has in the module's own terms, while everything is float64.

Code that asks for a dtype (``assert q.dtype == torch.float32``, ``torch.finfo(scores.dtype).min``)
means the one of an ordinary run. So every result remembers what it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

_REMEMBERED = "_stated_dtype"
_CASTS = {
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "double": torch.float64,
    "cfloat": torch.complex64,
    "cdouble": torch.complex128,
}
_CASTING = {*(getattr(Tensor, name) for name in _CASTS if hasattr(Tensor, name))}
_CASTING |= {Tensor.to, Tensor.type, Tensor.type_as}
_LEGACY = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
}
_COMPLEX = {torch.float16: torch.complex32, torch.float64: torch.complex128}
_REAL = {torch.complex32: torch.float16, torch.complex128: torch.float64}
_HALVES = (torch.float16, torch.bfloat16)
_WIDEST = (torch.float64, torch.complex128)


def stated(tensor: Tensor) -> torch.dtype:
    """What the dtype of a tensor would be, had nothing been widened."""
    if tensor.dtype not in _WIDEST:
        return tensor.dtype
    known: torch.dtype = getattr(tensor, _REMEMBERED, tensor.dtype)
    return known


def remember(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Have a float64 tensor answer to another dtype."""
    if tensor.dtype in _WIDEST:
        setattr(tensor, _REMEMBERED, dtype)
    return tensor


def question(func: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The answer to a question for a tensor's dtype, or None where ``func`` asks for none."""
    if func == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
        return stated(args[0])
    if func == torch.Tensor.type and len(args) == 1:
        legacy = _LEGACY.get(stated(args[0]))
        return None if legacy is None else f"torch.{legacy}Tensor"
    return None


def carried_over(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> Any:
    """What a function gave, remembering its dtype; that follows from what it was given."""
    given: torch.dtype | None = None

    def carried(leaf: Any) -> Any:
        nonlocal given
        if not isinstance(leaf, Tensor) or leaf.dtype not in _WIDEST:
            return leaf
        passed_on = any(leaf is arg for arg in args)
        if passed_on and func not in _CASTING:  # or written in place
            return leaf
        given = given or _given(func, args, kwargs)
        dtype = _as_complex(given) if leaf.is_complex() else _as_real(given)
        if passed_on and stated(leaf) == dtype:
            return leaf
        return remember(leaf.view_as(leaf) if passed_on else leaf, dtype)

    return tree_map(carried, result)


def _given(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype:
    name = getattr(func, "__name__", "")
    if name in _CASTS:
        return _CASTS[name]
    leaves = tree_flatten((args, dict(kwargs)))[0]
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)
    if asked is not None:
        return asked
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if name in ("to", "type_as") and len(tensors) > 1:
        return stated(tensors[1])
    floating = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    # A number beside a tensor takes the tensor's dtype, as in PyTorch.
    counted = [t for t in floating if t.ndim] or floating
    if not counted:
        return torch.get_default_dtype()
    dtypes = {_as_real(stated(tensor)) for tensor in counted}
    if len(dtypes) > 1 and dtypes <= set(_HALVES):
        return torch.float32
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _as_complex(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_complex else _COMPLEX.get(dtype, torch.complex64)


def _as_real(dtype: torch.dtype) -> torch.dtype:
    return _REAL.get(dtype, torch.float32) if dtype.is_complex else dtype
