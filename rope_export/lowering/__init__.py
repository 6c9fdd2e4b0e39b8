"""Lowering: from our modules to the operators of an export target.

A module asks `active()` whether it is being exported to a target; if so it hands its tensors to
that target, else it runs plain PyTorch. One file per target emits operators, `rules` says which
operator is legal where, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from rope_export.lowering.tokens import Tokens as Tokens

if TYPE_CHECKING:
    from rope_export.exact import Evaluator
    from rope_export.lowering.target import Target

_active: Target | None = None
_evaluator: Evaluator | None = None


def active() -> Target | None:
    """Return the target being exported to, or None in eager, compiled and foreign exports."""
    return _active if torch.compiler.is_exporting() else None


@contextmanager
def lowering_to(target: Target) -> Iterator[Target]:
    """Make every module of this package lower to ``target`` while it is being exported."""
    global _active
    previous, _active = _active, target
    try:
        yield target
    finally:
        _active = previous


def evaluator() -> Evaluator | None:
    """Return what computes truth in place of our modules, or None but while it is asked for."""
    return None if torch.compiler.is_compiling() else _evaluator


@contextmanager
def evaluated_by(truth: Evaluator) -> Iterator[None]:
    """Make every module of this package hand its tensors to ``truth`` in eager PyTorch."""
    global _evaluator
    previous, _evaluator = _evaluator, truth
    try:
        yield
    finally:
        _evaluator = previous
