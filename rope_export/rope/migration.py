"""Bringing an existing model over: modules of other libraries replaced by ours, weights kept."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from rope_export.rope.embedding import RotaryEmbedding
from rope_export.rope.stored_frequencies import unrounded

_THEIR_PACKAGE = "rotary_embedding_torch"


def replace_rotary_embeddings(model: nn.Module) -> list[str]:
    """Replace every `RotaryEmbedding` of rotary-embedding-torch inside ``model``, in place.

    Frequencies are those of the replaced module, and where they are learned they stay the same
    parameter, so that an optimizer made before keeps training it. The model's state dict has the
    same names. What several modules share they share afterwards. A module kept elsewhere than as
    a submodule (in a plain list, say) is not found.

    A model that was cast to half precision, or to it and back, rounded its frequencies. They
    become exact again where it can be told what they were
    (`rope_export.rope.stored_frequencies.unrounded`): a series with the default ``theta``, or else
    with the only round one that gives each of them; the same of ``max_freq``. Where a series gives
    them and its ``theta`` cannot be told they stay rounded, with a warning that says so. Replaced
    before the model is cast, frequencies are exact always. Those that no formula gives, and those
    that are learned, stay as they are.

    Args:
        model: any module that holds them, at any depth.

    Returns:
        names of the submodules replaced, empty if there are none.

    Warns:
        UserWarning: frequencies stay rounded that were a series.
    """
    made: dict[int, RotaryEmbedding] = {}
    replaced = []
    for owner_name, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if not _is_theirs(child):
                continue
            full_name = f"{owner_name}.{name}" if owner_name else name
            ours = made.get(id(child))
            if ours is None:
                ours = made[id(child)] = _ours(child, full_name)
            setattr(owner, name, ours)
            replaced.append(full_name)
    return replaced


def _is_theirs(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "RotaryEmbedding" and kind.__module__.split(".")[0] == _THEIR_PACKAGE
        for kind in type(module).__mro__
    )


def _ours(theirs: Any, name: str) -> RotaryEmbedding:
    freqs = theirs.freqs.detach()
    found = None if theirs.learned_freq else unrounded(freqs, freqs_for=theirs.freqs_for)
    given: dict[str, Any] = {"custom_freqs": freqs.cpu()}
    if found is not None and found.value is not None:
        given = {found.name: found.value}
    elif found is not None:
        warnings.warn(
            f"{name}.freqs stay as they are: {found.doubt}; replace {name} before the model is "
            "cast to have exact ones",
            stacklevel=3,
        )
    ours = RotaryEmbedding(
        2 * len(freqs),
        **given,
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
