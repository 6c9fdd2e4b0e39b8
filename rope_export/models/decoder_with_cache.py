"""`DecoderWithCache`: a decoder of transformers as one module for graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rope_export import dispatch
from rope_export.artifacts.cache_layout import WINDOW
from rope_export.attention.adapters import refuse_what_weights_do_not_say
from rope_export.attention.block import Cache
from rope_export.errors import BadInputError
from rope_export.models.decoder_attention import CallCache, DecoderAttention, whole_rows
from rope_export.models.experts import refuse_experts
from rope_export.models.keywords import cache_keyword


class DecoderWithCache(nn.Module):
    """A decoder as one module for graphs: prefill, chunks and tokens, its cache in and out.

    ``rope_export.export(decoder, path, **decoder.example())`` is one graph for all of them, with a
    dynamic batch and dynamic lengths, in which every layer's attention is the target's operator.

    Args:
        model: of transformers, after `replace_attention`.
        cache: ``"full"``: every layer keeps all tokens; ``"window"``: layers with a window keep no
            more than that, and the others all.

    Raises:
        BadInputError: it has no replaced attention, or something acts beside its weights; or
            ``cache`` is neither, or no layer has a window.
    """

    def __init__(self, model: nn.Module, *, cache: str = "full") -> None:
        super().__init__()
        self.model = model
        if cache not in ("full", WINDOW):
            raise BadInputError(f"cache must be 'full' or {WINDOW!r}, got {cache!r}")
        if not self.attentions:
            raise BadInputError(
                f"{type(model).__name__} has no attention of this package: call "
                "replace_attention(model) first"
            )
        self._by_window = cache == WINDOW
        if self._by_window and all(a.window is None for a in self.attentions):
            raise BadInputError(
                f"cache={WINDOW!r} needs layers with a window, and {type(model).__name__} has none"
            )
        for name, module in model.named_modules():
            if isinstance(module, DecoderAttention):
                refuse_what_weights_do_not_say(module, name)
        self._cache = cache_keyword(model)
        self._routes = getattr(model.config, "output_router_logits", False)

    @property
    def attentions(self) -> list[DecoderAttention]:
        """Attention of every layer, in order."""
        found = [m for m in self.model.modules() if isinstance(m, DecoderAttention)]
        return sorted(found, key=lambda attention: attention.layer_idx)

    def _keeps_window(self, attention: DecoderAttention) -> bool:
        return self._by_window and attention.window is not None

    def empty_cache(self, batch: int = 1, *, window_capacity: int | None = None) -> list[Cache]:
        """A past of no tokens for every layer, to begin with.

        Layers that keep a window have ``window_capacity`` slots, or as many as their window.

        Raises:
            BadInputError: that is less than a window.
        """
        return [
            attention.empty_cache(batch, capacity=window_capacity, window_cache=True)
            if self._keeps_window(attention)
            else attention.empty_cache(batch, window_cache=False)
            for attention in self.attentions
        ]

    def example(self, *, fixed_windows: bool = False) -> dict[str, Any]:
        """Arguments of `rope_export.export`: inputs of two rows, and which axes vary.

        Args:
            fixed_windows: whether layers that keep a window have as many slots as their window, as
                CUDA wants it, instead of any number from the largest window on (``capacity``).
        """
        batch, length, earlier = 2, 6, 5
        device = self.attentions[0].device
        generator = torch.Generator().manual_seed(0)
        vocabulary = cast(Any, self.model).get_input_embeddings().num_embeddings
        of_tokens = {0: "batch", 1: "sequence"}
        kwargs: dict[str, Any] = {
            "input_ids": torch.randint(vocabulary, (batch, length), generator=generator),
            "attention_mask": torch.ones(batch, earlier + length, dtype=torch.int64),
        }
        shapes: dict[str, Any] = {
            "input_ids": of_tokens,
            "attention_mask": {0: "batch", 1: "past_sequence+sequence"},
        }
        kwargs = {name: tensor.to(device) for name, tensor in kwargs.items()}
        windows = [a.window or 0 for a in self.attentions if self._keeps_window(a)]
        slots = None if fixed_windows or not windows else max(windows) + earlier
        kwargs["past_key_values"] = [
            tuple(
                torch.randn(
                    batch, t.shape[1], t.shape[2] or earlier, t.shape[3], generator=generator
                ).to(t)
                for t in pair
            )
            for pair in self.empty_cache(batch, window_capacity=slots)
        ]
        shapes["past_key_values"] = {0: "batch", 2: "past_sequence"}
        if windows:
            of_window: dict[int, Any] = {0: "batch"}
            if not fixed_windows:
                least = max(windows)
                most = 2 * least + earlier
                of_window[2] = torch.export.Dim("capacity", min=least, max=most)
            whole = shapes["past_key_values"]
            shapes["past_key_values"] = [
                (of_window if self._keeps_window(a) else whole,) * 2 for a in self.attentions
            ]
        axes = max(a.rope.axes if a.rope is not None else 1 for a in self.attentions)
        if axes > 1:  # no position is implied
            ids = torch.arange(length, device=device)
            kwargs["position_ids"] = ids.expand(axes, batch, -1).contiguous()
            shapes["position_ids"] = {1: "batch", 2: "sequence"}
        return {"kwargs": kwargs, "dynamic_shapes": shapes, "output_names": ["logits"]}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[Cache] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Cache]]:
        """Run the decoder.

        Args:
            input_ids: ``[B, S]``, the new tokens.
            attention_mask: ``[B, P + S]``, 1 for a token and 0 for padding, past first. A token's
                position is the number of ones before it, and windows count ones too.
            past_key_values: for each layer, rotated keys ``[B, num_kv_heads, P, head_dim]`` and
                values ``[B, num_kv_heads, P, value_head_dim]`` of earlier tokens, as an earlier
                call or `empty_cache` returned them. With ``cache="window"``, layers with a window
                keep the latest in so many slots, and ``attention_mask`` must be given.
            position_ids: positions for the rotation, instead of the implied ones.

        Returns:
            logits ``[B, S, vocabulary]`` (last hidden states of a model without a head); with
            ``past_key_values`` also the caches after these tokens.
        """
        if dispatch.lowering() is not None:
            refuse_experts(self.model)
        call = CallCache(past_key_values, attention_mask, position_ids, self._by_window)
        given: dict[str, Any] = {self._cache: call}
        if self._routes:  # what routers of experts give is for a loss, which would read the mask
            given["output_router_logits"] = False
        result = self.model(
            input_ids=input_ids,
            attention_mask=whole_rows(input_ids),
            use_cache=True,
            return_dict=True,
            **given,
        )
        output: Tensor = result["logits"] if "logits" in result else result["last_hidden_state"]
        if past_key_values is None:
            return output
        return output, [call.present[index] for index in sorted(call.present)]
