"""Who computes an attention or a rotation just now.

The modules of this package ask here before they compute. In plain PyTorch, eager or compiled,
nobody answers and they compute themselves; while a graph is exported a target answers, and while a
proof evaluates truth, its evaluator does. This module knows neither: whoever answers is put here
for as long as a context lasts, so that modules import neither what lowers nor what proves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Computer(Protocol):
    """Computes in place of a module."""

    def attend(self, attention: Any, tokens: Any) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Project, rotate and attend, as an `Attention` states it.

        Args:
            attention: the `Attention`.
            tokens: its `Tokens`.

        Returns:
            ``[B, S, num_heads * value_head_dim]``, and the present when there is a past.
        """
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, layout: Any, seq_dim: int) -> Tensor:
        """Rotate heads, as ``rope.rotation.rotate_sequence`` has it."""
        ...


class Lowering(Computer, Protocol):
    """Computes in the operators of an export target."""

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Normalise the last axis by its root mean square, in the dtype of ``x``."""
        ...


class Truth(Computer, Protocol):
    """Computes in float64 what a module states."""

    def cos_sin(
        self, found: Any, position_ids: Tensor, *, axes_lead: bool
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, as `RotaryEmbedding.cos_sin` has them.

        Args:
            found: the `Frequencies`.
            position_ids: integers.
            axes_lead: whether their first axis is that of several positions a token.
        """
        ...


_lowering: Lowering | None = None
_truth: Truth | None = None


def lowering() -> Lowering | None:
    """Return the target being exported to, or None in eager, compiled and foreign exports."""
    return _lowering if torch.compiler.is_exporting() else None


def truth() -> Truth | None:
    """Return what evaluates truth, or None but while it is asked for."""
    return None if torch.compiler.is_compiling() else _truth


def computer() -> Computer | None:
    """Return whoever computes in place of a module, or None: the module itself does."""
    return lowering() or truth()


@contextmanager
def lowering_to(target: Lowering) -> Iterator[None]:
    """Make every module of this package compute by ``target`` while it is being exported."""
    global _lowering
    previous, _lowering = _lowering, target
    try:
        yield
    finally:
        _lowering = previous


@contextmanager
def evaluated_by(evaluator: Truth) -> Iterator[None]:
    """Make every module of this package compute by ``evaluator`` in eager PyTorch."""
    global _truth
    previous, _truth = _truth, evaluator
    try:
        yield
    finally:
        _truth = previous
