"""A config of its own for a model whose attention was replaced."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

# The ways of transformers whose masks `DecoderAttention` takes.
TAKEN = ("sdpa", "eager")


def way_of(decoder: Any) -> str:
    """How a replaced decoder is told to make masks: as before, where they can be taken."""
    way = str(decoder.config._attn_implementation)
    if way in TAKEN:
        return way
    return TAKEN[0] if decoder._supports_sdpa else TAKEN[1]


def give_own_config(model: nn.Module, decoder: Any) -> None:
    """Let a model have configs nobody else has, and ask for masks its attention can take.

    Models made from one config hold that very object: what is said in it of one is said of all.
    The new ones lie in the model as the old ones did, those within others included.

    Args:
        model: of transformers.
        decoder: the part of it whose attention was replaced.
    """
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    for holder in (model, decoder):
        copy.deepcopy(holder.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[name] = copies[id(value)]
    # Never a name of ours: a model built from this config later would look for its attention.
    decoder.config._attn_implementation = way_of(decoder)
