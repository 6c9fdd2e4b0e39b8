"""`Target`: what is being exported to, and the record of what was chosen on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from rope_export.lowering import onnx, ort, primitive, rules

if TYPE_CHECKING:
    from rope_export.attention import Attention
    from rope_export.rotary import RotaryEmbedding

Attend = Callable[["Attention", Tensor, Tensor | None, rules.Choice], Tensor]
Rotate = Callable[["RotaryEmbedding", Tensor, Tensor], Tensor]

_ATTEND: dict[str, Attend] = {
    "ort": ort.attend,
    "onnx": onnx.attend,
    "primitive": primitive.attend,
}
_ROTATE: dict[str, Rotate] = {
    "ort": onnx.rotate,  # the same operator; only attention differs
    "onnx": onnx.rotate,
    "primitive": primitive.rotate,
}


@dataclass
class Target:
    """An export target and the providers its graph is made for.

    Attributes:
        name: one of `rules.TARGETS`.
        providers: some of `rules.PROVIDERS`.
        choices: filled while tracing, one entry for each attention lowered.
    """

    name: str
    providers: tuple[str, ...]
    choices: list[rules.Choice] = field(default_factory=list)

    def attend(
        self,
        attention: Attention,
        hidden_states: Tensor,
        position_ids: Tensor | None,
        offset: int | Tensor,
    ) -> Tensor:
        """Emit projections, rotation and attention: ``[B, S, num_heads * head_dim]``."""
        batch, length = hidden_states.shape[0], hidden_states.shape[1]
        shifted = isinstance(offset, Tensor) or offset != 0
        implied = position_ids is None and not shifted
        if position_ids is None and shifted and attention.rope is not None:
            position_ids = attention.rope.implied_positions(length, offset)
        if position_ids is not None:
            position_ids = _one_row_each(position_ids, batch, length)
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        choice = rules.choose(
            self.name,
            rules.situations(attention, self.providers, dtype=dtype, implied_positions=implied),
        )
        self.choices.append(choice)
        return _ATTEND[self.name](attention, hidden_states, position_ids, choice)

    def rotate(self, rope: RotaryEmbedding, x: Tensor, position_ids: Tensor) -> Tensor:
        """Emit the rotation of ``[B, H, S, D]`` heads by ``[S]`` or ``[B, S]`` positions."""
        return _ROTATE[self.name](rope, x, _one_row_each(position_ids, x.shape[0], x.shape[2]))


def _one_row_each(position_ids: Tensor, batch: int, length: int) -> Tensor:
    """Positions shared by the batch, ``[S]`` or ``[1, S]``, as ``[B, S]``."""
    shared = position_ids.ndim == 1 or (
        isinstance(position_ids.shape[0], int) and position_ids.shape[0] == 1
    )
    return position_ids.expand(batch, length) if shared else position_ids
