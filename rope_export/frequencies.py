"""Inverse frequencies and cos/sin tables: pure functions, computed in float64.

Everything here runs on the host from Python scalars and is rounded once, at the end, so a
table row is as exact at position 16 million as at position 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rope_export.errors import BadInputError


def check_theta(theta: float) -> float:
    """Return ``theta`` as a float.

    Raises:
        BadInputError: it is not a finite number above zero.
    """
    value = float(theta)
    if not (math.isfinite(value) and value > 0):
        raise BadInputError(f"theta must be a finite number above 0, got {theta}")
    return value


def default_inv_freq(dim: int, theta: float) -> Tensor:
    """Inverse frequencies of the original RoPE: ``theta ** (-2i / dim)``.

    Source: Su et al., "RoFormer" (2021), section 3.2.2.

    Args:
        dim: rotated width of a head, even.
        theta: the base.

    Returns:
        ``[dim / 2]`` float64, in radians per position.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return theta**-exponents


def cos_sin_table(inv_freq: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``0 … length - 1``.

    Args:
        inv_freq: ``[r / 2]`` float64.
        length: number of rows.

    Returns:
        two ``[length, r / 2]`` float32 tables, each entry the float64 value rounded once.
    """
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, inv_freq.to("cpu", torch.float64))
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)
