"""`Tokens`: what one call of a block is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What one call of a block is given, as `Attention.forward` has it.

    Attributes:
        hidden_states: ``[B, S, hidden_size]``.
        position_ids: for the rotation, or None when implied.
        offset: added to implied positions.
        past: rotated keys and values of earlier tokens, or None.
        attention_mask: ``[B, T]``, past first, or None.
        window_cache: whether the past holds the window only.
    """

    hidden_states: Tensor
    position_ids: Tensor | None = None
    offset: int | Tensor = 0
    past: tuple[Tensor, Tensor] | None = None
    attention_mask: Tensor | None = None
    window_cache: bool = False
