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
from rope_export.models.keywords import cache_of, refuse_unknown, transformers_version
from rope_export.models.own_config import TAKEN
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.layer import Layer
from rope_export.pretrained.weights import Piece, pieces, unmade


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
        self.own_kind = type(theirs)
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

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: object = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' module would.

        Args:
            hidden_states: ``[B, S, hidden_size]``, the new tokens.
            position_embeddings: positions of the new tokens, from `Positions`.
            attention_mask: which keys each query sees, as transformers makes it for PyTorch's own
                attention or for its own: ``[B or 1, 1, S, T]``, bool, or numbers that are added to
                the scores; None for all keys up to a query's own. One of no columns says that the
                rows are whole sequences from position 0.
            cache: of transformers, read and written, or a `CallCache`. Also by its other names,
                ``past_key_values`` and ``layer_past``.
            position_ids: positions where there are no ``position_embeddings``.
            cache_position: where in a cache of fixed length the new tokens go (up to 5.3).
            **others: what transformers hands on without effect on attention, and None.

        Returns:
            ``[B, S, hidden_size]``, and None in the place of the weights of attention.

        Raises:
            BadInputError: the mask is none that transformers makes for those attentions, an
                argument is unknown or asks for what is not done here, or scores would be dropped
                out in training.
        """
        refuse_unknown(others)
        if cache is None:
            cache = cache_of(others)
        if isinstance(cache, CallCache):
            return cache.attend(self, hidden_states), None
        if self.training and self.scores_dropout:
            raise BadInputError(
                f"attention_dropout must be 0 in training, got {self.scores_dropout}: set it to 0 "
                "in the model's config before its attention is replaced"
            )
        config: Any = self.config
        way = config._attn_implementation
        if way not in TAKEN:
            raise BadInputError(
                f"config._attn_implementation must be {' or '.join(map(repr, TAKEN))} after "
                f"replace_attention, whose masks it takes, got {way!r}: call "
                f"model.set_attn_implementation({TAKEN[0]!r})"
            )
        positions = position_embeddings if isinstance(position_embeddings, Tensor) else position_ids
        q, k, v = self.heads(hidden_states, position_ids=positions)
        if cache is not None:
            # Later releases count for themselves, and do not hand the positions on.
            places = () if cache_position is None else ({"cache_position": cache_position},)
            k, v = cache.update(k, v, self.layer_idx, *places)
        visible = None
        if attention_mask is not None and attention_mask.shape[-1]:
            visible = _seen(attention_mask, q, k.shape[2])
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
        by_window: whether layers with a window are given no more than that of the past.
        present: keys and values of each layer, filled on the way.
    """

    past: Sequence[Cache] | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    by_window: bool = False
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
            output, self.present[index] = forward(
                hidden_states,
                past=self.past[index],
                window_cache=self.by_window and attention.window is not None,
                **given,
            )
        return output

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the past, as far as transformers has to do with it: nothing."""
        del layer_idx
        return 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by Python itself
            raise AttributeError(name)
        raise _UnknownOfCacheError(
            f"transformers {transformers_version()} asks this model's cache for {name!r}: it keeps "
            "more than keys and values, or reads them outside attention, which DecoderWithCache "
            "has no place for"
        )


class _UnknownOfCacheError(BadInputError, AttributeError):
    """For those who only ask whether there is such an attribute, that there is none."""


def whole_rows(tokens: Tensor) -> Tensor:
    """A mask of no columns; transformers hands masks of four axes to the layers as they are."""
    return tokens.new_empty((1, 1, 0, 0), dtype=torch.bool)


def _seen(attention_mask: Tensor, q: Tensor, keys: int) -> Tensor:
    """``[B, S, T]`` of a mask that transformers made, for queries ``q`` and so many keys."""
    shape = tuple(attention_mask.shape)
    added = attention_mask.is_floating_point()
    if len(shape) != 4 or shape[1] != 1 or not (added or attention_mask.dtype == torch.bool):
        raise BadInputError(
            "the mask of an attention must be [B, 1, S, T] of bool or numbers to add, as "
            f"transformers makes it, got {shape} of {attention_mask.dtype}"
        )
    # Some families of 5.0 make it a column too wide, and leave the rest to their attention.
    mask = attention_mask[:, 0, :, :keys]
    if added and mask.dtype != q.dtype:
        # The lowest number of a wider type would be no number, and a row of them no weights.
        mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    return mask


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
