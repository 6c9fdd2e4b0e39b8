"""Caches of transformers by the name that the release at hand has for them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def caching(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument that hands a model its cache: ``cache`` since 5.24, else the older name."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_in(result: Any) -> Any:
    """The cache among what a model returned, or None."""
    return result.get("cache", result.get("past_key_values"))


def counted(model: nn.Module, places: Any) -> dict[str, Any]:
    """Where new tokens go in a cache of fixed length, which releases up to 5.3 want to be told."""
    known = inspect.signature(model.forward).parameters
    return {"cache_position": places} if "cache_position" in known else {}
