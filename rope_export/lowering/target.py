"""`Target`: what is being exported to, and the record of what was chosen on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rope_export.artifacts.targets import PROVIDERS
from rope_export.attention.block import Attention, Cache
from rope_export.attention.tokens import Tokens
from rope_export.attention.window_cache import check_capacity
from rope_export.errors import BadInputError
from rope_export.inspection import since
from rope_export.lowering import (
    new_tokens,
    onnx,
    ops,
    ort,
    primitive,
    rules,
    scaled_dot_product,
    situation,
    translations,
)
from rope_export.lowering.choice import Choice, choose
from rope_export.rope.pairs import Layout
from rope_export.rope.rotation import rotate_sequence

Attend = Callable[["Attention", Tokens, Choice], "tuple[Tensor, Cache | None]"]

_ATTEND: dict[str, Attend] = {
    "ort": ort.attend,
    "onnx": onnx.attend,
    "primitive": primitive.attend,
}


@dataclass(frozen=True)
class Lengths:
    """How many tokens one attention or rotation is given, as sizes of the trace.

    Attributes:
        new: new tokens.
        past: cached ones, or None without a past or where it holds a window only.
        total: columns of the mask, or None without one.
    """

    new: int
    past: int | None = None
    total: int | None = None


@dataclass
class Target:
    """An export target and the providers its graph is made for.

    Attributes:
        name: one of `targets.TARGETS`.
        providers: some of `targets.PROVIDERS`.
        longest: longest sequence served.
        padding: the side on which prompts are padded.
        form: name of the form every attention takes, or None: the best.
        onnxruntime: the oldest one the graph is to run in.
        choices: filled while tracing, one entry for each attention lowered.
        lengths: likewise, one entry for each attention and each rotation on its own.
        windows: likewise, keys that came in as a cache of the window, and the window.
        lacks: likewise, why a provider cannot run what was lowered.
    """

    name: str
    providers: tuple[str, ...]
    longest: int
    padding: str = "right"
    form: str | None = None
    onnxruntime: str = since.NEWEST
    choices: list[Choice] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    windows: list[tuple[Tensor, int]] = field(default_factory=list)
    lacks: dict[str, str] = field(default_factory=dict)

    def attend(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Cache | None]:
        """Emit projections, rotation and attention.

        Returns:
            ``[B, S, num_heads * value_head_dim]``, and the present when there is a past.
        """
        if tokens.past is not None and tokens.attention_mask is None:
            raise BadInputError("attention_mask must be given to a graph with a past, got None")
        if tokens.past is not None and self.longest > new_tokens.MOST:
            raise BadInputError(
                f"max_seq_len must be at most {new_tokens.MOST} with a past, got {self.longest}"
            )
        offset = tokens.offset
        shifted = isinstance(offset, Tensor) or offset != 0
        implied = tokens.position_ids is None and not shifted
        dtype = str(tokens.hidden_states.dtype).removeprefix("torch.")
        slots = None
        if tokens.window_cache and tokens.past is not None:
            size = tokens.past[0].shape[2]
            slots = size if isinstance(size, int) else 0
        describe = partial(
            situation.situations,
            attention,
            dtype=dtype,
            implied_positions=implied,
            longest=self.longest,
            cache=tokens.past is not None,
            mask=tokens.attention_mask is not None,
            padding=self.padding,
            slots=slots,
            onnxruntime=self.onnxruntime,
        )
        choice = choose(self.name, describe(self.providers), self.form)
        self.choices.append(choice)
        for provider in PROVIDERS:
            broken = rules.broken_limits(choice.form, describe([provider]), to_run=True)
            if broken:
                self.lacks.setdefault(provider, broken[0])
        past, mask = tokens.past, tokens.attention_mask
        earlier = None if past is None else past[0].shape[2]
        if past is not None and tokens.window_cache:
            assert attention.window is not None
            if isinstance(earlier, int):  # else its range says so
                check_capacity("the slots of past", earlier, attention.window)
            self.windows.append((past[0], attention.window))
            earlier = None
        self.lengths.append(
            Lengths(
                tokens.hidden_states.shape[1],
                earlier,
                None if mask is None else mask.shape[1],
            )
        )
        # The fused operator counts positions itself.
        if tokens.position_ids is None and attention.rope is not None and choice.form.rotation:
            if tokens.attention_mask is not None:
                tokens = replace(tokens, position_ids=new_tokens.places(tokens) + offset)
            elif shifted:
                length = tokens.hidden_states.shape[1]
                ids = attention.rope.implied_positions(length, offset)
                tokens = replace(tokens, position_ids=ids)
        return _ATTEND[self.name](attention, tokens, choice)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout, seq_dim: int
    ) -> Tensor:
        """Emit the rotation of heads, as `rotation.rotate_sequence` has it."""
        self.lengths.append(Lengths(x.shape[seq_dim]))
        if self.name == "primitive":  # opset 18 has no operator for it
            return rotate_sequence(x, cos, sin, layout=layout, seq_dim=seq_dim)
        return onnx.rotate(x, cos, sin, layout=layout, seq_dim=seq_dim)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Emit an RMS norm of the last axis."""
        if self.name == "primitive":  # opset 18 has no operator for it
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return ops.rms_norm(x, torch.ones(x.shape[-1]) if weight is None else weight, eps)

    def translations(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """PyTorch's operators that are written in ONNX otherwise than PyTorch does it."""
        fused = self.name != "primitive"
        attend = scaled_dot_product.translation(fused=fused, widened="cpu" in self.providers)
        return {
            torch.ops.aten.scaled_dot_product_attention.default: attend,
            **translations.lacking(),
        }
