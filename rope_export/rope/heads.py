"""Checks of the heads callers give: where their sequence is, and whether they are wide enough."""

from __future__ import annotations

from torch import Tensor

from rope_export.errors import BadInputError


def axis_of_sequence(x: Tensor, seq_dim: int | None, name: str, *, dim: int, default: int) -> int:
    """The axis of the sequence in ``x``, counted from the end.

    Args:
        x: heads.
        seq_dim: the axis the caller gave, or None.
        name: of ``x``.
        dim: channels that are rotated.
        default: the axis where none is given.

    Raises:
        BadInputError: there is no such axis, or heads are too narrow.
    """
    axis = default if seq_dim is None else seq_dim
    from_end = axis - x.ndim if axis >= 0 else axis
    if seq_dim is not None and not -x.ndim <= from_end <= -2:
        raise BadInputError(
            f"seq_dim must be an axis of {name} {tuple(x.shape)} before the last, got {seq_dim}"
        )
    if not -x.ndim <= from_end <= -2 or x.shape[-1] < dim:
        shape = f"[..., S, {'H, ' * (-2 - from_end)}D]" if from_end <= -2 else "[..., S, D]"
        raise BadInputError(f"{name} must be {shape} with D >= {dim}, got {tuple(x.shape)}")
    return from_end


def check_same_length(q: Tensor, k: Tensor, q_axis: int, k_axis: int) -> None:
    """Check that queries and keys are of one sequence.

    Raises:
        BadInputError: they are not.
    """
    if q.shape[q_axis] != k.shape[k_axis]:
        raise BadInputError(
            f"q and k must have the same sequence length, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
