"""The arithmetic of the verdict: errors, tolerances, and what can never pass."""

import math

import numpy as np
import pytest
import torch

from rope_export.artifacts.comparison import UNIT_ROUNDOFF, Errors, errors_against, tolerance

LENIENT = Errors(1e300, 1e300, 0.0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def length(vector):
    return math.sqrt(math.fsum(entry * entry for entry in vector))


def worst_row(truth, output):
    """Error of the worst token over its length, or over half a typical one if that is longer."""
    tokens = truth.reshape(-1, truth.shape[-1])
    typical = length(tokens.ravel()) / math.sqrt(len(tokens))
    errors = (output - truth).reshape(tokens.shape)
    return max(length(e) / max(length(t), typical / 2) for e, t in zip(errors, tokens, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 33, 8)])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 2.0])
def test_errors_are_relative_to_the_whole_and_to_the_worst_token(shape, size):
    truth = normal(*shape)
    output = truth + size * normal(*shape, seed=1)
    errors = errors_against(truth, output)
    difference = (output - truth).ravel()
    expected = length(difference) / length(truth.ravel())
    assert errors.rel == pytest.approx(expected, rel=1e-12, abs=0)
    assert errors.row == pytest.approx(worst_row(truth, output), rel=1e-12, abs=0)
    assert errors.max_abs == max(abs(entry) for entry in difference)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_perfect_output_has_no_error(dtype):
    output = normal(2, 5, 7).astype(dtype)
    assert errors_against(output.astype(np.float64), output) == Errors(0.0, 0.0, 0.0)


def test_the_output_is_widened_before_it_is_subtracted():
    truth = np.full((1, 1, 4), 1.0 + 2.0**-20)
    output = np.ones((1, 1, 4), dtype=np.float16)
    assert errors_against(truth, output).max_abs == 2.0**-20


def test_one_wrong_row_among_thousands_cannot_hide():
    """It is 1 % of the tolerated error over the whole, and far beyond it in its own row."""
    truth = normal(1, 8192, 16)
    output = truth + 1e-7 * normal(1, 8192, 16, seed=1)
    honest = errors_against(truth, output)
    limit = Errors(2e-3, 2e-3, 0.0)
    assert honest.within(limit)
    output[0, 4321] *= 1.1
    errors = errors_against(truth, output)
    assert errors.rel < limit.rel
    assert errors.row == pytest.approx(0.1, rel=1e-3)
    assert not errors.within(limit)


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("token", [0, 2, 4])
def test_the_worst_row_is_found_wherever_it_is(batch, token):
    truth = normal(3, 5, 7)
    output = truth.copy()
    output[batch, token] += 0.5 * truth[batch, token]
    assert errors_against(truth, output).row == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_what_is_not_finite_is_infinitely_wrong(bad, dtype):
    truth = normal(1, 4096, 4)
    output = truth.astype(dtype)
    output[0, 4000, 3] = bad
    errors = errors_against(truth, output)
    assert errors == Errors(math.inf, math.inf, math.inf)
    assert not errors.within(LENIENT)


def test_what_is_not_finite_fails_even_where_eager_was_not_finite():
    truth = normal(1, 3, 4)
    overflowed = truth.copy()
    overflowed[0, 1, 2] = math.inf
    eager = errors_against(truth, overflowed)
    assert not errors_against(truth, overflowed).within(tolerance(eager, "float16", 64))


def test_no_output_can_be_right_where_truth_is_not_finite():
    truth = np.full((1, 2, 2), math.inf)
    assert not errors_against(truth, truth).within(LENIENT)


def test_a_token_that_cancels_counts_as_half_a_typical_one():
    truth = np.full((1, 4, 1), 2.0)
    truth[0, 1] = 0.0
    assert errors_against(truth, truth) == Errors(0.0, 0.0, 0.0)
    output = truth.copy()
    output[0, 1] = 0.03
    # The typical length is the root mean square: sqrt(3 * 4 / 4).
    assert errors_against(truth, output).row == pytest.approx(0.03 / (math.sqrt(3) / 2), rel=1e-12)


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_an_output_that_should_be_zero_altogether_must_be_zero(size):
    truth = np.zeros((1, 3, 4))
    assert errors_against(truth, truth) == Errors(0.0, 0.0, 0.0)
    assert not errors_against(truth, np.full((1, 3, 4), size)).within(LENIENT)


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 3, 1), (4,), (2, 3, 4)], ids=str)
def test_an_output_of_another_shape_is_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"shape"):
        errors_against(np.ones((1, 3, 4)), np.ones(shape))


@pytest.mark.parametrize(
    ("dtype", "products", "floor"),
    [
        # Half a rounding to the dtype, and 8 + sqrt(products) / 4 to float32.
        ("float32", 64, 2**-25 + 10 * 2**-24),
        ("float32", 4096, 2**-25 + 24 * 2**-24),
        ("float16", 64, 2**-12 + 10 * 2**-24),
        ("bfloat16", 64, 2**-9 + 10 * 2**-24),
        ("bfloat16", 1, 2**-9 + 8.25 * 2**-24),
    ],
)
@pytest.mark.parametrize("eager", [Errors(0.0, 0.0, 9.0), Errors(3e-7, 5e-6, 9.0)])
def test_a_provider_is_held_to_twice_eagers_error_and_a_floor(dtype, products, floor, eager):
    limit = tolerance(eager, dtype, products)
    assert limit.rel == pytest.approx(2 * eager.rel + floor, rel=1e-12, abs=0)
    assert limit.row == pytest.approx(2 * eager.row + floor, rel=1e-12, abs=0)
    assert limit.max_abs == 0.0
    assert eager.within(limit)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_wrong_score_scale_is_beyond_any_tolerance_of_a_wide_block(dtype):
    """What the proof must see: a change of one per cent, in a block 16384 wide."""
    assert not Errors(1e-2, 1e-2, 0.0).within(tolerance(Errors(0.0, 0.0, 0.0), dtype, 16384))


LIMIT = Errors(1e-3, 1e-2, 0.0)


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        (Errors(0.0, 0.0, 0.0), True),
        (Errors(1e-3, 1e-2, 0.0), True),
        (Errors(1e-3, 1e-2, 1e9), True),  # absolute errors are shown, not judged
        (Errors(math.nextafter(1e-3, 1), 1e-2, 0.0), False),
        (Errors(1e-3, math.nextafter(1e-2, 1), 0.0), False),
        (Errors(math.nan, 0.0, 0.0), False),
        (Errors(0.0, math.nan, 0.0), False),
        (Errors(math.inf, 0.0, 0.0), False),
        (Errors(0.0, math.inf, 0.0), False),
    ],
)
def test_both_relative_errors_must_keep_to_their_limit(errors, verdict):
    assert errors.within(LIMIT) is verdict


@pytest.mark.parametrize("limit", [Errors(math.nan, 1.0, 0.0), Errors(1.0, math.nan, 0.0)])
def test_a_limit_that_is_no_number_lets_nothing_pass(limit):
    assert not Errors(0.0, 0.0, 0.0).within(limit)


def test_unit_roundoff_is_half_the_spacing_of_each_dtype():
    for name, roundoff in UNIT_ROUNDOFF.items():
        assert roundoff == torch.finfo(getattr(torch, name)).eps / 2
    assert set(UNIT_ROUNDOFF) == {"float32", "float16", "bfloat16"}
