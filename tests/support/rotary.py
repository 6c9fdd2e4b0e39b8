"""Heads turned in float64, to hold RotaryEmbedding to."""

import numpy as np
import pytest
import torch

ANY_LENGTH = pytest.mark.parametrize("max_seq_len", [64, None])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def queries_and_keys(length, *, batch=2, head_dim=8):
    q = normal(batch, 3, length, head_dim, seed=length)
    return q, normal(batch, 1, length, head_dim, seed=length + 1)


def inverse_frequencies(dim, theta=10000.0):
    return float(theta) ** (-np.arange(0, dim, 2) / dim)


IN_FLOAT64 = inverse_frequencies(8)


def rotated_exactly(x, positions, inv_freq, layout):
    """Rotate by complex multiplication in float64: ``[B, H, S, D]`` by ``[S]`` or ``[B, S]``."""
    x, half = x.double().numpy().copy(), len(inv_freq)
    angles = np.asarray(positions, dtype=np.float64)[..., None, :, None] * np.asarray(inv_freq)
    if layout == "half":
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    x[..., first], x[..., second] = turned.real, turned.imag
    return x


def assert_rotated(outputs, inputs, positions, inv_freq, layout="interleaved", atol=1e-6):
    for output, x in zip(outputs, inputs, strict=True):
        expected = rotated_exactly(torch.as_tensor(x), positions, inv_freq, layout)
        np.testing.assert_allclose(np.asarray(output), expected, rtol=0, atol=atol)


CALLS = {
    "float32": lambda rope: rope.rotate(*queries_and_keys(6)),
    "bfloat16": lambda rope: rope.rotate(*(x.bfloat16() for x in queries_and_keys(6))),
    "long": lambda rope: rope.rotate(*queries_and_keys(64)),
    "offset": lambda rope: rope.rotate(*queries_and_keys(6), offset=40),
    "ids": lambda rope: rope.rotate(*queries_and_keys(6), position_ids=torch.arange(12, 6, -1)),
    "one tensor": lambda rope: (rope.rotate_queries_or_keys(normal(5, 8), offset=3),),
    "inference mode": torch.inference_mode()(lambda rope: rope.rotate(*queries_and_keys(7))),
}
