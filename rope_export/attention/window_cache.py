"""A cache of the window only: which tokens lie in which slots, and what a call makes of them.

The layout is that of onnxruntime's GroupQueryAttention (``sliding_window_cache``), so that PyTorch
and every target can take over from one another in the middle of a sequence. Of ``T`` tokens the
``L`` latest lie from slot 0 on in their order; of ``C`` slots for a window of ``W``, ``C - W + 1``
are freed at once when all are taken, so ``L`` is at least the window and follows from ``T`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rope_export.attention.visibility import visible_keys
from rope_export.errors import BadInputError


def resident(tokens: Tensor, window: int, capacity: int) -> Tensor:
    """How many of so many tokens lie in the cache, for each of ``tokens`` (integers)."""
    freed = capacity - window + 1
    over = (tokens - capacity).clamp(min=0)
    return tokens - freed * torch.div(over + (freed - 1), freed, rounding_mode="floor")


def check_capacity(name: str, capacity: int, window: int) -> None:
    """Check that a window fits into the slots of a cache, called ``name`` where it does not.

    Raises:
        BadInputError: the cache has fewer slots.
    """
    if capacity < window:
        raise BadInputError(
            f"{name} must be at least the window of {window} tokens, got {capacity}"
        )


@dataclass(frozen=True)
class WindowCall:
    """What one call does with a cache of the window: which keys are seen, and which are kept.

    Attributes:
        visible: which keys each new token sees, bool ``[B, S, C + S]``: slots of the past, then
            new tokens.
        filled: which slots of the past hold a token, bool ``[B, C]``.
        source: for each slot of the present, which of those ``C + S`` it takes, int64 ``[B, C]``;
            any where it holds no token.
    """

    visible: Tensor
    filled: Tensor
    source: Tensor

    @classmethod
    def of(cls, mask: Tensor, new: Tensor, *, window: int, capacity: int) -> WindowCall:
        """Plan a call.

        Args:
            mask: ``[B, T]``, 1 for a token and 0 for padding, of the whole sequence.
            new: its columns of this call, ``[B, S]``.
            window: keys that a token sees, itself included.
            capacity: slots of the cache, at least ``window``.
        """
        real = new != 0
        nth = real.to(torch.int64).cumsum(-1)
        total = (mask != 0).to(torch.int64).sum(-1, keepdim=True)
        earlier = total - real.to(torch.int64).sum(-1, keepdim=True)
        before, after = (resident(t, window, capacity) for t in (earlier, total))
        slot = torch.arange(capacity, device=mask.device).unsqueeze(0)
        filled = slot < before
        # Padding takes the place of the token before it, as everywhere.
        q_order = (earlier + nth - 1).clamp(min=0)
        k_order = torch.cat((earlier - before + slot, q_order), dim=-1)
        visible = visible_keys(
            q_order, k_order, causal=True, window=window, real=torch.cat((filled, real), dim=-1)
        )
        # New tokens first, padding behind them: where the n-th new one is.
        column = torch.ones_like(nth).cumsum(-1) - 1
        ahead = torch.where(real, nth - 1, nth[:, -1:] + column - nth)
        columns = torch.zeros_like(column).scatter(1, ahead, column)
        wanted = total - after + slot
        is_new = (wanted >= earlier) & (slot < after)
        of_new = torch.gather(columns, 1, torch.where(is_new, wanted - earlier, 0))
        of_past = torch.where(slot < after, wanted - earlier + before, 0)
        source = torch.where(is_new, capacity + of_new, of_past)
        return cls(visible, filled, source)

    def cleared(self, past: Tensor) -> Tensor:
        """A past ``[B, G, C, D]`` with zeros where no token is: what lies there is unspecified."""
        return past.masked_fill(~self.filled[:, None, :, None], 0)

    def kept(self, keys: Tensor) -> Tensor:
        """The present ``[B, G, C, D]``, of past and new ones ``[B, G, C + S, D]``."""
        index = self.source[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return torch.gather(keys, 2, index)
