"""Angles of grids: each axis turns channels of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.rope.pairs import Layout
from rope_export.rope.rotation import broadcat, repeat_for_pairs


def coordinates(
    dims: Sequence[int],
    offsets: Sequence[float | Tensor] | Tensor | None,
    *,
    pixels: bool,
    device: torch.device,
) -> list[Tensor]:
    """Coordinates along each axis of a grid.

    Args:
        dims: the size of each axis.
        offsets: added to the coordinates of each axis, or None.
        pixels: whether coordinates run from -1 to 1 instead of ``0 … size - 1``.
        device: where.

    Returns:
        for each axis ``[size]``, or with ``offsets`` of more axes those in front.

    Raises:
        BadInputError: there are not as many ``offsets`` as axes.
    """
    added = None if offsets is None else _of_each_axis(offsets, len(dims), device)
    found = []
    for axis, size in enumerate(dims):
        if pixels:
            places = _from_minus_one_to_one(size, device)
        else:
            places = torch.arange(size, device=device)
        found.append(places if added is None else places.double() + added[axis])
    return found


def _of_each_axis(
    offsets: Sequence[float | Tensor] | Tensor, axes: int, device: torch.device
) -> list[Tensor]:
    """``offsets``, float64, one a axis.

    Each for itself: of a list that holds sizes, `torch.as_tensor` keeps those of the trace.
    """
    if isinstance(offsets, (list, tuple)):
        found = [_float64(offset, device) for offset in offsets]
    else:
        given = torch.as_tensor(offsets, device=device).double()
        found = list(given) if given.ndim else []
    if len(found) != axes:
        shown = [offset.tolist() for offset in found] or offsets
        raise BadInputError(f"offsets must have one entry for each of {axes} axes, got {shown}")
    return found


def _float64(offset: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(offset, Tensor):
        return offset.to(device, torch.float64)
    return torch.tensor(offset, dtype=torch.float64, device=device)


def _from_minus_one_to_one(size: int, device: torch.device) -> Tensor:
    """``torch.linspace(-1, 1, size)`` in float64, in arithmetic that leaves a graph its size.

    `torch.linspace` has the number of steps for a constant: a trace keeps the one it saw. That
    the last step is a tensor keeps ``size == 1``, of which the only place is -1, from being
    decided while a graph of larger sizes is made.
    """
    steps = torch.arange(size, device=device)
    last = steps[-1:].clamp(min=1)
    return (2 * steps - last).double() / last.double()


def angles_of_grid(of_axes: Sequence[Tensor], *, layout: Layout) -> Tensor:
    """Angles of every point of a grid.

    Args:
        of_axes: angles along each axis, ``[..., size, r / 2]``.
        layout: which channels form a pair.

    Returns:
        ``[..., *sizes, len(of_axes) * r]``.
    """
    grids = []
    for axis, angles in enumerate(of_axes):
        index: list[Any] = [None] * len(of_axes)
        index[axis] = slice(None)
        grids.append(angles[(..., *index, slice(None))])
    if layout == "half":
        return repeat_for_pairs(broadcat(grids), layout="half")
    return broadcat([repeat_for_pairs(grid, layout=layout) for grid in grids])
