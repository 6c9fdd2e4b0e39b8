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
    offsets: Sequence[float] | Tensor | None,
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
    if offsets is not None:
        offsets = torch.as_tensor(offsets, device=device).double()
        if offsets.ndim == 0 or len(offsets) != len(dims):
            raise BadInputError(
                f"offsets must have one entry for each of {len(dims)} axes, got {offsets.tolist()}"
            )
    found = []
    for axis, size in enumerate(dims):
        if pixels:
            places = torch.linspace(-1, 1, size, dtype=torch.float64, device=device)
        else:
            places = torch.arange(size, device=device)
        found.append(places if offsets is None else places + offsets[axis])
    return found


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
