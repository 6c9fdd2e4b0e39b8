"""`Tokens`: what one call of a block is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rope_export.lowering import ops
from rope_export.scores import token_order, visible_keys


@dataclass(frozen=True)
class Tokens:
    """What one call of a block is given, as `Attention.forward` has it.

    Attributes:
        hidden_states: ``[B, S, hidden_size]``.
        position_ids: for the rotation, or None when implied.
        offset: added to implied positions.
        past: rotated keys and values of earlier tokens, or None.
        attention_mask: ``[B, T]``, past first, or None.
    """

    hidden_states: Tensor
    position_ids: Tensor | None = None
    offset: int | Tensor = 0
    past: tuple[Tensor, Tensor] | None = None
    attention_mask: Tensor | None = None

    def last(self, columns: Tensor) -> Tensor:
        """Columns of the new tokens: ``[B, T]`` to ``[B, S]``."""
        return ops.last_columns(columns, self.hidden_states.shape[1])

    def visible(self, *, causal: bool, window: int | None) -> Tensor:
        """Which keys each new token sees, bool ``[B, S, T]``; there must be a mask."""
        assert self.attention_mask is not None
        order = token_order(self.attention_mask)
        return visible_keys(
            self.last(order), order, causal=causal, window=window, real=self.attention_mask != 0
        )
