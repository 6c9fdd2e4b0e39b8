"""Tensors as NumPy arrays and back, bfloat16 included."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rope_export.runtime.token_places import Array


def to_numpy(x: Tensor) -> Array:
    """Bring a tensor to numpy, bfloat16 included (as ``ml_dtypes.bfloat16``)."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        bits: Array = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: Array = x.numpy()
    return array


def from_numpy(array: Array) -> Tensor:
    """The other way round."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
