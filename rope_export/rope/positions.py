"""Checks of the positions callers give."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.rope.frequencies import Frequencies

INTEGERS = (torch.int32, torch.int64)
_WHOLE: tuple[type, ...] = (Integral, torch.SymInt)  # Python's, NumPy's, a compiler's


def check_offset(offset: int | Tensor) -> None:
    """Check the position of a first token.

    Raises:
        BadInputError: it is neither an integer nor a 0-d tensor of one.
    """
    if isinstance(offset, Tensor):
        if offset.ndim or offset.dtype not in INTEGERS:
            raise BadInputError(
                f"offset must be an integer or a 0-d tensor of int32 or int64, "
                f"got {offset.dtype} of shape {tuple(offset.shape)}"
            )
    elif isinstance(offset, bool) or not isinstance(offset, _WHOLE):
        raise BadInputError(f"offset must be an integer or a 0-d integer tensor, got {offset!r}")


def check_position_ids(
    position_ids: Tensor, found: Frequencies, *, batch: int | None, length: int
) -> None:
    """Check the positions of sequences of ``length`` tokens.

    Args:
        position_ids: ``[S]`` or ``[B, S]``; with several axes ``[axes, B, S]``, and where a token
            cannot do with one position, ``[axes, S]``.
        found: says how many axes there are.
        batch: rows, or None for heads without a batch.
        length: tokens in each row.

    Raises:
        BadInputError: they are not int32 or int64, or their shape does not fit.
    """
    if position_ids.dtype not in INTEGERS:
        raise BadInputError(f"position_ids must be int32 or int64, got {position_ids.dtype}")
    axes, got = found.axes, tuple(position_ids.shape)
    leading = 0
    if axes > 1 and len(got) > (2 if found.one_position else 1):
        leading = 1
    fitting = ["[S]", "[B, S]"] if found.one_position else []
    if axes > 1:
        fitting += [] if found.one_position else [f"[{axes}, S]"]
        fitting += [f"[{axes}, B, S]"]
    shared = got[leading:]
    if (
        len(shared) not in (1, 2)
        or (leading and got[0] != axes)
        or (not leading and not found.one_position)
        or (len(shared) == 2 and batch is None)
    ):
        heads = " and heads without a batch" if batch is None else ""
        raise BadInputError(f"position_ids must be {' or '.join(fitting)}, got {got}{heads}")
    if shared[-1] != length:
        raise BadInputError(
            f"position_ids must have the sequence length {length} as last axis, got {got}"
        )
    if len(shared) == 2 and shared[0] not in (1, batch):
        raise BadInputError(f"position_ids must have one row or {batch}, got {got}")
