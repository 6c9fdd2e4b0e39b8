"""Float64 truth of a cache of integers, written apart from the arithmetic that it judges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rope_export.attention.block import Attention


@dataclass(frozen=True)
class Rounding:
    """What a cache of integers means; replace a field to state a defect.

    Attributes:
        bits: of an integer.
        scales: of keys and of values, ``[1, G, 1, width]`` float64.
        clips: whether integers beyond those there are become the last of them.
        read_by: the scales by which integers come back, if not the same.
    """

    bits: int
    scales: tuple[Tensor, Tensor]
    clips: bool = True
    read_by: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, block: Attention) -> Rounding | None:
        """That of a block, or None where its cache holds numbers."""
        stated = block.cache_rounding
        if stated is None:
            return None
        return cls(stated.bits, (stated.key_scale.double(), stated.value_scale.double()))

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def integers(self, exact: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest integers of float64 keys and values ``[B, G, S, width]``, as float64."""
        low, high = self.range
        keys, values = (torch.round(x / scale) for x, scale in zip(exact, self.scales, strict=True))
        return (keys.clamp(low, high), values.clamp(low, high)) if self.clips else (keys, values)

    def seen(self, exact: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What attention sees of float64 keys and values."""
        keys, values = self.integers(exact)
        of_keys, of_values = self.read_by or self.scales
        return keys * of_keys, values * of_values

    def stored(self, exact: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What a cache holds of them: int8, or uint8 of half the width."""
        keys, values = (self._stored(x) for x in self.integers(exact))
        return keys, values

    def _stored(self, integers: Tensor) -> Tensor:
        if self.bits == 8:
            return integers.to(torch.int8)
        raised = integers.to(torch.int64) - self.range[0]
        return (raised[..., 0::2] | (raised[..., 1::2] << 4)).to(torch.uint8)

    def distances(self, exact: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """How far keys and values are from where they would become another integer, in steps."""
        low, high = self.range
        found = []
        for x, scale in zip(exact, self.scales, strict=True):
            steps = (x / scale).clamp(low, high)  # beyond the last there is no other
            found.append((steps - steps.floor() - 0.5).abs())
        return found[0], found[1]
