"""Mixtures of experts of transformers: of its ways to compute them ONNX has one."""

from __future__ import annotations

from torch import nn

from rope_export.errors import BadInputError

_WAY = "batched_mm"
# What every 5.x notes on modules whose experts it computes in one of several ways.
_NOTED = ("has_bias", "is_transposed")


def refuse_experts(model: nn.Module) -> None:
    """Check that experts are computed in a way that a graph can have.

    Raises:
        BadInputError: they are not; the message names them and the call that changes it.
    """
    for name, module in model.named_modules():
        way = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if all(hasattr(module, noted) for noted in _NOTED) and way != _WAY:
            raise BadInputError(
                f"{name} computes its experts by {way!r}, for which ONNX has no operator: call "
                f"model.set_experts_implementation({_WAY!r}), which gathers the weights of every "
                "token's experts"
            )
