"""Bringing an existing model over: modules of other libraries replaced by ours, weights kept."""

from __future__ import annotations

from typing import Any

from torch import nn

from rope_export.rope.embedding import RotaryEmbedding

_THEIR_PACKAGE = "rotary_embedding_torch"


def replace_rotary_embeddings(model: nn.Module) -> list[str]:
    """Replace every `RotaryEmbedding` of rotary-embedding-torch inside ``model``, in place.

    Frequencies are those of the replaced module, and where they are learned they stay the same
    parameter, so that an optimizer made before keeps training it. The model's state dict has the
    same names. What several modules share they share afterwards. A module kept elsewhere than as
    a submodule (in a plain list, say) is not found.

    Args:
        model: any module that holds them, at any depth.

    Returns:
        names of the submodules replaced, empty if there are none.
    """
    made: dict[int, RotaryEmbedding] = {}
    replaced = []
    for owner_name, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if not _is_theirs(child):
                continue
            ours = made.get(id(child))
            if ours is None:
                ours = made[id(child)] = _ours(child)
            setattr(owner, name, ours)
            replaced.append(f"{owner_name}.{name}" if owner_name else name)
    return replaced


def _is_theirs(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "RotaryEmbedding" and kind.__module__.split(".")[0] == _THEIR_PACKAGE
        for kind in type(module).__mro__
    )


def _ours(theirs: Any) -> RotaryEmbedding:
    freqs = theirs.freqs.detach()
    ours = RotaryEmbedding(
        2 * len(freqs),
        custom_freqs=freqs.cpu(),
        freqs_for=theirs.freqs_for,
        learned_freq=theirs.learned_freq,
        use_xpos=theirs.use_xpos,
        xpos_scale_base=theirs.scale_base if theirs.use_xpos else 512,
        interpolate_factor=theirs.interpolate_factor,
        seq_before_head_dim=theirs.seq_before_head_dim,
        cache_if_possible=theirs.cache_if_possible,
        cache_max_seq_len=theirs.cache_max_seq_len,
    ).to(freqs.device)
    if theirs.learned_freq:
        ours.freqs = theirs.freqs
    return ours.train(theirs.training)
