"""The sinusoidal encoding in float64, and small modules to hold to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rope_export.positional.sinusoidal import SinusoidalPositionalEncoding

HALVES = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def truth(positions: Any, d_model: int) -> np.ndarray:
    """Section 3.5 in float64, channel by channel: ``[len(positions), d_model]``."""
    result = np.empty((len(positions), d_model))
    for channel in range(d_model):
        angles = np.asarray(positions) / 10000 ** ((channel - channel % 2) / d_model)
        result[:, channel] = np.cos(angles) if channel % 2 else np.sin(angles)
    return result


def encoding(d_model: int = 8, max_len: int = 64, **others: Any) -> SinusoidalPositionalEncoding:
    return SinusoidalPositionalEncoding(d_model, max_len, **others).eval()


def assert_rounded_once(actual: Tensor | np.ndarray, exact: np.ndarray) -> None:
    """Each element is exact but for one rounding to its dtype, and float64's (or float32's) own."""
    actual = torch.as_tensor(actual)
    values = actual.double().numpy()
    # Half the distance between neighbours, at the exact value's power of two.
    half = torch.finfo(actual.dtype).eps * 2.0 ** (np.frexp(exact)[1] - 2)
    slack = 1e-10 if actual.dtype == torch.float32 else 1e-6
    assert values.shape == exact.shape
    assert (np.abs(values - exact) <= half + slack).all()


def assert_added(actual: Any, x: Tensor, positions: Any, atol: float = 6e-7) -> None:
    """``x`` plus the truth, every element, in the dtype of ``x``."""
    actual = torch.as_tensor(actual)
    assert actual.dtype == x.dtype
    exact = x.double().numpy() + truth(positions, x.shape[-1])
    if x.dtype in HALVES:
        assert_rounded_once(actual, exact)
    else:
        np.testing.assert_allclose(actual.double().numpy(), exact, rtol=0, atol=atol)


CALLS: dict[str, Callable[[SinusoidalPositionalEncoding], Tensor]] = {
    "float32": lambda module: module(normal(2, 6, 8)),
    "bfloat16": lambda module: module(normal(2, 6, 8).bfloat16()),
    "float64": lambda module: module(normal(2, 6, 8).double()),
    "long": lambda module: module(normal(1, 64, 8)),
    "offset": lambda module: module(normal(2, 6, 8), offset=40),
    "tensor offset": lambda module: module(normal(2, 6, 8), offset=torch.tensor(40)),
    "inference mode": torch.inference_mode()(lambda module: module(normal(2, 7, 8))),
}
EVEN, ABOVE_0 = "must be a positive even integer, got", "must be an integer above 0, got"
