"""`Target`: what is being exported to, and the record of what was chosen on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from rope_export.lowering import onnx, ort, primitive, rules
from rope_export.pairs import Layout
from rope_export.rotation import rotate_sequence

if TYPE_CHECKING:
    from rope_export.attention import Attention

Attend = Callable[["Attention", Tensor, Tensor | None, rules.Choice], Tensor]

_ATTEND: dict[str, Attend] = {
    "ort": ort.attend,
    "onnx": onnx.attend,
    "primitive": primitive.attend,
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
        shifted = isinstance(offset, Tensor) or offset != 0
        implied = position_ids is None and not shifted
        if position_ids is None and shifted and attention.rope is not None:
            length = hidden_states.shape[1]
            position_ids = attention.rope.implied_positions(length, offset)
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        choice = rules.choose(
            self.name,
            rules.situations(attention, self.providers, dtype=dtype, implied_positions=implied),
        )
        self.choices.append(choice)
        return _ATTEND[self.name](attention, hidden_states, position_ids, choice)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout, seq_dim: int
    ) -> Tensor:
        """Emit the rotation of heads, as `rotation.rotate_sequence` has it."""
        if self.name == "primitive":  # opset 18 has no operator for it
            return rotate_sequence(x, cos, sin, layout=layout, seq_dim=seq_dim)
        return onnx.rotate(x, cos, sin, layout=layout, seq_dim=seq_dim)
