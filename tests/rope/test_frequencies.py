"""Tables and inverse frequencies against fifty-digit arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch

from rope_export.checks import finite_number
from rope_export.errors import BadInputError
from rope_export.rope.frequencies import cos_sin_table, default_inv_freq

SERIES = [(2, 10000.0), (8, 10000.0), (8, 500000.0), (64, 10000.0), (128, 1e6), (6, 2.5), (4, 0.5)]


def exact_inv_freq(dim, theta):
    return [mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / dim) for i in range(dim // 2)]


def exact_cos_sin(positions, inv_freq):
    """Cosines and sines of ``positions`` as float64, of angles that carry fifty digits."""
    with mpmath.workdps(50):
        angles = [[position * frequency for frequency in inv_freq] for position in positions]
        cos = [[float(mpmath.cos(angle)) for angle in row] for row in angles]
        sin = [[float(mpmath.sin(angle)) for angle in row] for row in angles]
    return np.array(cos), np.array(sin)


def assert_rounded_once(table, exact, *, share):
    """Every entry within a float32 spacing of the truth; ``share`` of them the nearest float32."""
    assert table.dtype == torch.float32
    entries = table.numpy()
    assert entries.shape == exact.shape
    assert np.abs(entries.astype(np.float64) - exact).max() <= 6e-8
    assert (entries == exact.astype(np.float32)).mean() >= share


@pytest.mark.parametrize(("dim", "theta"), SERIES)
def test_inverse_frequencies_are_exact_to_float64(dim, theta):
    with mpmath.workdps(50):
        exact = np.array([float(frequency) for frequency in exact_inv_freq(dim, theta)])
    inv_freq = default_inv_freq(dim, theta)
    assert inv_freq.dtype == torch.float64
    np.testing.assert_allclose(inv_freq.numpy(), exact, rtol=5e-16, atol=0)


@pytest.mark.parametrize(("dim", "theta"), SERIES[:4])
def test_every_entry_of_a_short_table_is_the_truth_rounded_once(dim, theta):
    length = 4096 // dim
    with mpmath.workdps(50):
        exact = exact_cos_sin(range(length), exact_inv_freq(dim, theta))
    for table, expected in zip(
        cos_sin_table(default_inv_freq(dim, theta), length), exact, strict=True
    ):
        assert_rounded_once(table, expected, share=0.999)


@pytest.mark.parametrize("channel", [0, 1])
def test_a_table_is_as_exact_at_position_16_million_as_at_position_1(channel):
    """Float32 angles are off by a whole radian there: 2^24 + 1 is not even a float32."""
    last = 2**24 + 1
    dim, theta = 8, 10000.0
    tables = cos_sin_table(default_inv_freq(dim, theta)[channel : channel + 1], last + 1)
    around_powers = [2**power + step for power in range(2, 25) for step in (-1, 0, 1)]
    spread = np.random.default_rng(0).integers(0, last, 200).tolist()
    positions = [0, 1, *around_powers, *spread]
    assert max(positions) == last
    with mpmath.workdps(50):
        inv_freq = exact_inv_freq(dim, theta)[channel : channel + 1]
    for table, exact in zip(tables, exact_cos_sin(positions, inv_freq), strict=True):
        assert table.shape == (last + 1, 1)
        assert_rounded_once(table[positions], exact, share=0.9)


def test_a_longer_table_starts_with_the_shorter_one():
    inv_freq = default_inv_freq(16, 10000.0)
    for short, long in zip(cos_sin_table(inv_freq, 7), cos_sin_table(inv_freq, 1000), strict=True):
        assert torch.equal(short, long[:7])


def test_neither_default_device_nor_default_dtype_reaches_the_tables():
    expected = cos_sin_table(default_inv_freq(8, 10000.0), 9)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            tables = cos_sin_table(default_inv_freq(8, 10000.0), 9)
    finally:
        torch.set_default_dtype(before)
    for table, original in zip(tables, expected, strict=True):
        assert table.device.type == "cpu"
        assert torch.equal(table, original)


@pytest.mark.parametrize("theta", [math.nan, math.inf, -math.inf, 0, 0.0, -1.0, -10000])
def test_a_theta_without_frequencies_is_refused(theta):
    with pytest.raises(
        BadInputError, match=rf"^theta must be a finite number above 0, got {theta}$"
    ):
        finite_number("theta", theta)


@pytest.mark.parametrize("theta", [10000, 5e-324, 0.5, 1e30])
def test_any_finite_theta_above_zero_is_taken_as_a_float(theta):
    checked = finite_number("theta", theta)
    assert type(checked) is float
    assert checked == theta
