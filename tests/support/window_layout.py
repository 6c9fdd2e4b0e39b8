"""What lies in a cache of the window, by onnxruntime's documentation of GroupQueryAttention."""

from __future__ import annotations

import math


def resident(tokens: int, capacity: int, window: int) -> int:
    """``L(T)``, word for word."""
    freed = capacity - window + 1
    if tokens <= capacity:
        return tokens
    return tokens - freed * math.ceil((tokens - capacity) / freed)
