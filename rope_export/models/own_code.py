"""A model whose attention was replaced, for a while with transformers' own again."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from rope_export.errors import BadInputError
from rope_export.models.decoder_attention import DecoderAttention
from rope_export.models.rehearsal import as_it_was, give_config
from rope_export.models.replacement import Positions, SayWholeRows


@contextmanager
def own_code(model: nn.Module) -> Iterator[list[str]]:
    """Put transformers' own attention and angles in the places of ours while the context lasts.

    They are made anew, by the classes that were replaced, from the present configuration, and hold
    the present weights: the same parameters, where theirs are named as ours are.

    Args:
        model: of transformers, after `replace_attention`; it is as it was afterwards.

    Yields:
        names of the classes.

    Raises:
        BadInputError: such a class no longer has the weights that it had.
    """
    decoder = cast(Any, model).get_decoder()
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, DecoderAttention)]
    with as_it_was(model):
        give_config(model, decoder, "eager")
        for path, attention in found:
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _own(path, attention))
        angles = getattr(decoder, "rotary_emb", None)
        if isinstance(angles, Positions) and angles.own_kind is not None:
            decoder.rotary_emb = angles.own_kind(config=decoder.config).to(found[0][1].device)
        vars(decoder)["_forward_pre_hooks"] = OrderedDict(
            (number, hook)
            for number, hook in decoder._forward_pre_hooks.items()
            if not isinstance(hook, SayWholeRows)
        )
        yield sorted({attention.own_kind.__name__ for _, attention in found})


def _own(path: str, attention: DecoderAttention) -> nn.Module:
    """The module that ``attention`` stands for, with its present weights."""
    kind: Any = attention.own_kind
    of_layer = {"layer_idx": attention.layer_idx}
    if "layer_idx" not in inspect.signature(kind).parameters:
        of_layer = {}
    with torch.device("meta"):
        own: nn.Module = kind(attention.config, **of_layer)
    if any(True for _ in own.buffers()):  # which the meta device has no numbers of
        with torch.random.fork_rng([]), torch.device(attention.device):
            own = kind(attention.config, **of_layer)
    weights = attention.state_dict(keep_vars=True)
    wanted = dict(own.named_parameters())
    if wanted.keys() != weights.keys():
        odd = sorted(wanted.keys() ^ weights.keys())
        raise BadInputError(
            f"{path}: {kind.__name__} made from its config no longer has the weights it had, which "
            f"differ in {', '.join(odd)}"
        )
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        part = own.get_submodule(owner)
        held = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        part._parameters[leaf] = held
    return own.train(attention.training)
