"""`WindowSlots`: a cache of the window, token by token as it would fill; part of the truth."""

from __future__ import annotations

import torch
from torch import Tensor


class WindowSlots:
    """Where the tokens of a call lie before and after it.

    Args:
        real: which columns of the mask are tokens, bool ``[B, T]``.
        length: columns of the call, the last ones.
        capacity: slots of the cache.
        window: of the attention.

    Attributes:
        order: places in their rows of what is in the slots and then of the new columns,
            ``[B, capacity + length]``.
        real: which of these are tokens, bool.
    """

    def __init__(self, real: Tensor, length: int, capacity: int, window: int) -> None:
        batch = real.shape[0]
        self.order = torch.zeros(batch, capacity + length, dtype=torch.int64, device=real.device)
        self.real = torch.zeros_like(self.order, dtype=torch.bool)
        self._capacity = capacity
        self._source = torch.zeros(batch, capacity, dtype=torch.int64, device=real.device)
        for row in range(batch):
            earlier = int(real[row, : real.shape[1] - length].sum())
            held: list[int] = []  # places in the row, by slot
            for place in range(earlier):
                _add(held, place, capacity, window)
            where = {place: slot for slot, place in enumerate(held)}
            for slot, place in enumerate(held):
                self.order[row, slot], self.real[row, slot] = place, True
            place = earlier
            for column in range(length):
                at = capacity + column
                if real[row, real.shape[1] - length + column]:
                    self.order[row, at], self.real[row, at] = place, True
                    where[place] = at
                    _add(held, place, capacity, window)
                    place += 1
                else:
                    self.order[row, at] = max(0, place - 1)
            for slot, kept in enumerate(held):
                self._source[row, slot] = where[kept]

    def cleared(self, past: Tensor) -> Tensor:
        """Keys or values ``[B, G, capacity, D]`` with zeros in slots that hold no token."""
        return past.masked_fill(~self.real[:, None, : self._capacity, None], 0.0)

    def kept(self, keys: Tensor) -> Tensor:
        """What lies in the slots after the call, of all keys or values."""
        rows = [one[:, source] for one, source in zip(keys, self._source, strict=True)]
        return torch.stack(rows)


def _add(held: list[int], place: int, capacity: int, window: int) -> None:
    """One more token; where all slots are taken, all but what the window needs are freed."""
    if len(held) == capacity:
        del held[: capacity - window + 1]
    held.append(place)
