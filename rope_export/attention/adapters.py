"""Adapters and hooks, which act beside the weights that a graph is made from: refused by name."""

from __future__ import annotations

from torch import nn

from rope_export.attention.block import Attention
from rope_export.errors import BadInputError


def refuse_what_weights_do_not_say(block: Attention, prefix: str = "") -> None:
    """Graph and float64 truth are made from weights: what acts beside them would be left out.

    Args:
        block: the attention.
        prefix: its name within a model.

    Raises:
        BadInputError: a projection is no plain linear layer, or a module has forward hooks.
    """
    for name, module in block.named_modules(prefix=prefix):
        last = name.rpartition(".")[2]
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if last.endswith("_proj") and not plain:
            raise BadInputError(
                f"{name} must be a plain nn.Linear, whose weight is all it does, got "
                f"{type(module).__name__}: merge adapters into the weights before exporting"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise BadInputError(
                f"{name or type(block).__name__} must have no forward hooks, which a graph would "
                "not have: remove them before exporting"
            )
