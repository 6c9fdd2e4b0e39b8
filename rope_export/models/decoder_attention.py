"""`DecoderAttention`: `Attention` called as transformers calls its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export.attention.block import Attention, Cache
from rope_export.attention.visibility import visible_keys
from rope_export.errors import BadInputError
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.layer import Layer
from rope_export.pretrained.weights import Piece, pieces, unmade

# What transformers calls this attention, so that it makes the masks that `DecoderAttention` takes.
IMPLEMENTATION = "rope_export"


class DecoderAttention(Attention):
    """`Attention` of one layer of a transformers decoder, called as transformers calls its own.

    Made by `replace_attention`. Its state dict has the names and tensors of the module it stands
    for, whatever its own parameters are called.

    Args:
        block: an attention without weights, which this one becomes.
        geometry: what it was made from.
        theirs: the module it replaces, whose parameters it takes.
    """

    def __init__(self, block: Attention, geometry: Layer, theirs: nn.Module) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(block))
        self.geometry = geometry
        self.config = theirs.config
        self.layer_idx = geometry.index
        self.is_causal = True
        self.scores_dropout = _rate(theirs, "attention_dropout", "attn_dropout")
        if geometry.family == "falcon":  # which applies it with ALiBi alone
            self.scores_dropout = 0.0
        self.residual_dropout = _rate(theirs, "residual_dropout", "resid_dropout")
        taken = dict(theirs.named_parameters())
        for piece in self._pieces():
            found = [taken[name] for name in piece.tensors]
            owner, _, leaf = piece.parameter.rpartition(".")
            setattr(self.get_submodule(owner), leaf, _parameter(piece, found))
        self.train(theirs.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_masks()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: object = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        layer_past: Any = None,
        position_ids: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' module would.

        Args:
            hidden_states: ``[B, S, hidden_size]``, the new tokens.
            position_embeddings: positions of the new tokens, from `Positions`.
            attention_mask: which keys each query sees, bool ``[B, 1, S, T]`` as transformers makes
                it for PyTorch's own attention; None for all keys up to a query's own. One of no
                columns says that the rows are whole sequences from position 0.
            past_key_values: a cache of transformers, read and written, or a `CallCache`.
            layer_past: the same, as some families call it.
            position_ids: positions where there are no ``position_embeddings``.

        Returns:
            ``[B, S, hidden_size]``, and None in the place of the weights of attention.

        Raises:
            BadInputError: the mask is none that transformers makes for this attention, or scores
                would be dropped out in training.
        """
        cache = layer_past if past_key_values is None else past_key_values
        if isinstance(cache, CallCache):
            return cache.attend(self, hidden_states), None
        if self.training and self.scores_dropout:
            raise BadInputError(
                f"attention_dropout must be 0 in training, got {self.scores_dropout}: set it to 0 "
                "in the model's config before its attention is replaced"
            )
        positions = position_embeddings if isinstance(position_embeddings, Tensor) else position_ids
        q, k, v = self.heads(hidden_states, position_ids=positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        visible = None
        if attention_mask is not None and attention_mask.shape[-1]:
            visible = _seen(attention_mask)
        elif attention_mask is not None and self.window is not None:
            order = torch.arange(q.shape[2], device=q.device)
            visible = visible_keys(order, order, causal=True, window=self.window)
        # Without a mask a single token sees all that came before it. (In this order it is a plain
        # bool even where lengths are symbols.)
        is_causal = q.shape[2] > 1 and visible is None
        context = self.attend(q, k, v, is_causal=is_causal, visible=visible)
        output = self.merge(context)
        if self.residual_dropout:
            output = F.dropout(output, self.residual_dropout, self.training)
        return output, None

    def _pieces(self) -> list[Piece]:
        return pieces(self.geometry, FAMILIES[self.geometry.family].tensors)

    def _renamed(self) -> list[Piece]:
        """What the parameters are made of, where some are not simply the tensors of that name."""
        made = self._pieces()
        return [] if all(piece.tensors == (piece.parameter,) for piece in made) else made

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of the module this one stands for."""
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        made = self._renamed()
        own = {piece.parameter: found.pop(prefix + piece.parameter) for piece in made}
        found.update({prefix + name: tensor for name, tensor in unmade(made, own).items()})
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        read, spent = {}, set()
        for piece in self._renamed():
            names = [prefix + name for name in piece.tensors]
            found = [state_dict[name] for name in names if name in state_dict]
            # What is missing or does not fit is left for torch to report.
            if len(found) == len(names) and all(tuple(t.shape) == piece.shape for t in found):
                read[prefix + piece.parameter] = piece.make(found).contiguous()
                spent.update(names)
        for name in spent:
            del state_dict[name]
        state_dict.update(read)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@dataclass
class CallCache:
    """One call of a decoder as `Attention` has it, in the place of a cache of transformers.

    It reaches every attention as caches do, and says what `Attention.forward` is given.

    Attributes:
        past: keys and values of each layer, or None.
        attention_mask: ``[B, P + S]``, or None.
        position_ids: for the rotation, or None when implied.
        present: keys and values of each layer, filled on the way.
    """

    past: Sequence[Cache] | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    present: dict[int, Cache] = field(default_factory=dict)

    def attend(self, attention: DecoderAttention, hidden_states: Tensor) -> Tensor:
        """Attention of one layer, ``[B, S, hidden_size]``."""
        given = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        forward: Any = super(DecoderAttention, attention).forward
        output: Tensor
        if self.past is None:
            output = forward(hidden_states, **given)
        else:
            index = attention.layer_idx
            output, self.present[index] = forward(hidden_states, past=self.past[index], **given)
        return output

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the past, as far as transformers has to do with it: nothing."""
        del layer_idx
        return 0


def whole_rows(tokens: Tensor) -> Tensor:
    """A mask of no columns; transformers hands masks of four axes to the layers as they are."""
    return tokens.new_empty((1, 1, 0, 0), dtype=torch.bool)


def register_masks() -> None:
    """Let transformers make bool masks for `IMPLEMENTATION`."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _seen(attention_mask: Tensor) -> Tensor:
    """``[B, S, T]`` of a mask that transformers made."""
    shape = tuple(attention_mask.shape)
    if len(shape) != 4 or shape[1] != 1 or attention_mask.dtype != torch.bool:
        raise BadInputError(
            f"the mask of an attention must be [B, 1, S, T] of bool, as transformers makes it with "
            f"config._attn_implementation {IMPLEMENTATION!r}, got {shape} of {attention_mask.dtype}"
        )
    return attention_mask[:, 0]


def _parameter(piece: Piece, found: list[nn.Parameter]) -> nn.Parameter:
    if piece.keeps_rows:
        return found[0]
    with torch.no_grad():
        value = piece.make(found).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=any(tensor.requires_grad for tensor in found))


def _rate(module: nn.Module, *names: str) -> float:
    """A dropout's rate, by whatever name it has, as a number or as a module."""
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return float(found.p if isinstance(found, nn.Dropout) else found)
    return 0.0
