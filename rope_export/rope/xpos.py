"""xPos: queries grow and keys shrink with their position, so that far tokens attend less."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rope_export.checks import finite_number
from rope_export.errors import BadInputError
from rope_export.rope.angles import keeping_values
from rope_export.rope.frequencies import xpos_log_decay

# Of e, so that scaled values of ordinary size stay finite: float32 ends at exp(88.7), float16 at
# exp(11.1).
_LARGEST_EXPONENT = {torch.float32: 87.0, torch.float16: 10.4}

Turns = tuple[Tensor, Tensor]
"""Cosines and sines of tokens, ``[S, r / 2]`` or ``[B, S, r / 2]`` float32."""


class XPos(nn.Module):
    """Scales of xPos by position: ``decay ** ((position - origin) / scale_base)``.

    Queries are multiplied by the scale, keys divided by it; a score then holds
    ``decay ** (distance / scale_base)`` whatever the origin. The origin only says where both are
    1: it must not depend on the length seen, or keys cached earlier would carry another one.

    Source: Sun et al., "A Length-Extrapolatable Transformer" (2022).

    Args:
        dim: rotated width of a head, even.
        scale_base: positions over which each pair decays once.
        max_seq_len: positions served, or None; the origin is in their middle, or at 0.
        interpolate_factor: positions are divided by it first.
        device: where the rates go.

    Raises:
        BadInputError: an argument is out of range, or ``max_seq_len`` beyond what float32 scales.
    """

    log_decay: Tensor
    rate: Tensor
    interpolation: Tensor

    def __init__(
        self,
        dim: int,
        scale_base: float,
        max_seq_len: int | None,
        interpolate_factor: float,
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.scale_base = scale_base = finite_number("xpos_scale_base", scale_base)
        self.interpolate_factor = interpolate_factor
        self.steepest = -float(xpos_log_decay(dim)[0])
        self.origin = 0 if max_seq_len is None else max_seq_len // 2
        positions = self.positions()
        if max_seq_len is not None and max_seq_len > positions:
            raise BadInputError(
                f"max_seq_len must be at most {2 * self.reach()} with xpos_scale_base "
                f"{scale_base:g}: beyond, the scales of keys exceed float32; got {max_seq_len}"
            )
        for name in ("log_decay", "rate", "interpolation"):
            self.register_buffer(name, None, persistent=False)
        self.rebuild(device or torch.get_default_device())

    def reach(self, dtype: torch.dtype = torch.float32) -> int:
        """How far from the origin keys of ``dtype`` can be scaled, in positions."""
        largest = _LARGEST_EXPONENT[torch.float16 if dtype == torch.float16 else torch.float32]
        return int(largest / self.steepest * self.scale_base * self.interpolate_factor)

    def positions(self, dtype: torch.dtype = torch.float32) -> int:
        """How many positions are served from 0."""
        return self.origin + self.reach(dtype) + 1

    def rebuild(self, device: torch.device) -> None:
        """Make every buffer anew on ``device``."""
        per_position = self.scale_base * self.interpolate_factor
        log_decay = xpos_log_decay(self.dim)
        self.log_decay = log_decay.to(device)
        # Tensors, because torch.onnx writes Python's floats as float32.
        self.rate = (log_decay / per_position).to(device)
        factor = torch.tensor([self.interpolate_factor], dtype=torch.float64, device="cpu")
        self.interpolation = factor.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XPos:
        return super()._apply(keeping_values(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def forward(self, positions: Tensor, *, middle: int | None = None) -> Tensor:
        """Scales of positions.

        Args:
            positions: ``[..., S]``, before interpolation.
            middle: where the scale is 1, after interpolation; the module's own origin unless given.

        Returns:
            ``[..., S, r / 2]`` float32.
        """
        places = positions.to(torch.float64)
        places = places - (self.origin if middle is None else self.interpolation * middle)
        return torch.exp(places.unsqueeze(-1) * self.rate).to(torch.float32)


def scaled(cos: Tensor, sin: Tensor, scale: Tensor) -> tuple[Turns, Turns]:
    """What turns queries, which grow with ``scale``, and keys, which shrink with it."""
    return (cos * scale, sin * scale), (cos / scale, sin / scale)
