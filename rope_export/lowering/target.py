"""`Target`: what is being exported to, and the record of what was chosen on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.lowering import onnx, ort, primitive, rules
from rope_export.lowering.tokens import Tokens
from rope_export.pairs import Layout
from rope_export.rotation import rotate_sequence
from rope_export.scores import token_order

if TYPE_CHECKING:
    from rope_export.attention import Attention, Cache

Attend = Callable[["Attention", Tokens, rules.Choice], "tuple[Tensor, Cache | None]"]

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
        longest: longest sequence served.
        padding: the side on which prompts are padded.
        choices: filled while tracing, one entry for each attention lowered.
    """

    name: str
    providers: tuple[str, ...]
    longest: int
    padding: str = "right"
    choices: list[rules.Choice] = field(default_factory=list)

    def attend(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Cache | None]:
        """Emit projections, rotation and attention.

        Returns:
            ``[B, S, num_heads * value_head_dim]``, and the present when there is a past.
        """
        if tokens.past is not None and tokens.attention_mask is None:
            raise BadInputError("attention_mask must be given to a graph with a past, got None")
        offset = tokens.offset
        shifted = isinstance(offset, Tensor) or offset != 0
        implied = tokens.position_ids is None and not shifted
        dtype = str(tokens.hidden_states.dtype).removeprefix("torch.")
        choice = rules.choose(
            self.name,
            rules.situations(
                attention,
                self.providers,
                dtype=dtype,
                implied_positions=implied,
                longest=self.longest,
                cache=tokens.past is not None,
                mask=tokens.attention_mask is not None,
                padding=self.padding,
            ),
        )
        self.choices.append(choice)
        # The fused operator counts positions itself.
        if tokens.position_ids is None and attention.rope is not None and choice.form.rotation:
            if tokens.attention_mask is not None:
                places = tokens.last(token_order(tokens.attention_mask))
                tokens = replace(tokens, position_ids=places + offset)
            elif shifted:
                length = tokens.hidden_states.shape[1]
                ids = attention.rope.implied_positions(length, offset)
                tokens = replace(tokens, position_ids=ids)
        return _ATTEND[self.name](attention, tokens, choice)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout, seq_dim: int
    ) -> Tensor:
        """Emit the rotation of heads, as `rotation.rotate_sequence` has it."""
        if self.name == "primitive":  # opset 18 has no operator for it
            return rotate_sequence(x, cos, sin, layout=layout, seq_dim=seq_dim)
        return onnx.rotate(x, cos, sin, layout=layout, seq_dim=seq_dim)
