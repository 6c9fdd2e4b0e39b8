"""Factories of tensors whose number of elements is a size of the trace.

``torch.linspace(a, b, n)`` fixes a symbolic ``n`` (arithmetic on ``arange`` does not), and the
exporter takes the dtype of ``torch.arange(0.5, n)`` from ``n``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SizesStayFree(TorchFunctionMode):
    """While it lasts, ``torch.linspace`` and ``torch.logspace`` of a symbolic number of steps."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        del types
        given = dict(kwargs or {})
        if func in (torch.linspace, torch.logspace):
            names = ("start", "end", "steps", "base")
            named = dict(zip(names, args, strict=False)) | given
            if isinstance(named.get("steps"), torch.SymInt):
                return _spaced(**named, powers=func is torch.logspace)
        return func(*args, **given)


def _spaced(
    start: Any,
    end: Any,
    steps: Any,
    base: float = 10.0,
    *,
    powers: bool,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor:
    """From ``start`` to ``end``, both ends exact, as PyTorch counts: from the nearer end.

    ``out``, ``layout``, ``requires_grad`` and ``pin_memory`` say nothing in a graph.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    place = torch.arange(steps, dtype=torch.float64, device=device)
    last = torch.sym_max(steps - 1, 1)  # one step alone is the start
    step = (end - start) / last
    far = (steps - 1) - place
    found = torch.where(place < steps / 2, start + step * place, end - step * far)
    if powers:
        found = base**found
    return found.to(dtype)


def with_stated_dtypes(program: torch.export.ExportedProgram) -> None:
    """Give every ``arange`` of a program the dtype it has, in place."""
    for node in program.graph.nodes:
        target = node.target
        counts = isinstance(target, torch._ops.OpOverload) and target._schema.name == "aten::arange"
        if counts and node.kwargs.get("dtype") is None:
            for given in node.all_input_nodes:  # which torch.export does not keep in step
                given.users.setdefault(node)
            node.update_kwarg("dtype", node.meta["val"].dtype)
