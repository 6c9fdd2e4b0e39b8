"""What rotary-embedding-torch would take and get wrong is refused, with its value."""

import re

import numpy as np
import pytest
import torch
from drop_in import normal

from rope_export import BadInputError, RotaryEmbedding, apply_rotary_emb

# Refusals

INFINITY, NAN = float("inf"), float("nan")
BAD = {
    "dim": [({}, bad) for bad in (7, 1, 0, -8, 8.0, "8", None, True)],
    "custom_freqs": [
        ({}, bad)
        for bad in (
            torch.ones(2, 4),
            torch.tensor(1.0),
            torch.ones(0),
            torch.tensor([1.0, NAN]),
            torch.tensor([INFINITY]),
            torch.ones(4, dtype=torch.complex64),
            [1.0, 0.5],
            np.ones(4),
        )
    ],
    "freqs_for": [({}, bad) for bad in ("text", "Lang", None, 3)],
    "theta": [({}, bad) for bad in (0, -1, -10000.0, NAN, INFINITY, "many", "10000", True)],
    "max_freq": [({"freqs_for": "pixel"}, bad) for bad in (0, -3, NAN, INFINITY, "256", None)],
    "num_freqs": [({"freqs_for": "constant"}, bad) for bad in (0, -1, 1.5, True, "3", None)],
    "xpos_scale_base": [({"use_xpos": True}, bad) for bad in (0, -512, NAN, INFINITY, "512", None)],
    "interpolate_factor": [({}, bad) for bad in (0.5, 0, -2, NAN, INFINITY, "2", None)],
    "theta_rescale_factor": [({}, bad) for bad in (0, -1.5, NAN, INFINITY, 1e300, "2", None)],
    "cache_max_seq_len": [({}, bad) for bad in (-1, 1.5, "long")],
}


def shown(bad):
    """What a message must show of a value."""
    if not isinstance(bad, torch.Tensor | np.ndarray | list):
        return re.escape(str(bad))
    if isinstance(bad, torch.Tensor) and bad.dtype.is_complex:
        return "complex"
    if isinstance(bad, torch.Tensor):
        finite = bool(bad.isfinite().all())
        return re.escape(str(tuple(bad.shape) if finite else bad.tolist()))
    return r"(list|\[1\.0, 0\.5\])" if isinstance(bad, list) else r"(ndarray|array|\[1)"


@pytest.mark.parametrize(
    ("name", "others", "bad"), [(name, *case) for name, found in BAD.items() for case in found]
)
def test_an_argument_out_of_range_is_named_with_its_value(name, others, bad):
    with pytest.raises(BadInputError, match=rf"^{name} .*{shown(bad)}"):
        RotaryEmbedding(**{"dim": 8} | others | {name: bad})


@pytest.mark.parametrize("factor", [1.5, 2])
def test_a_rescaled_base_needs_two_pairs(factor):
    with pytest.raises(BadInputError, match=r"^theta_rescale_factor needs .*, got 2$"):
        RotaryEmbedding(2, theta_rescale_factor=factor)


def test_numbers_of_numpy_are_numbers():
    config = {"dim": np.int64(8), "theta": np.float32(500.0), "max_freq": np.int64(10)}
    x = normal(2, 5, 8)
    expected = RotaryEmbedding(8, theta=500).rotate_queries_or_keys(x, offset=3)
    actual = RotaryEmbedding(**config).rotate_queries_or_keys(x, offset=np.int64(3))
    assert torch.equal(actual, expected)
    constant = RotaryEmbedding(8, freqs_for="constant", num_freqs=np.int64(4))
    assert constant.freqs.tolist() == [1.0] * 4


REFUSED_CALLS = {
    "longer queries": (
        lambda rope, x: rope.rotate_queries_with_cached_keys(x, x[:, :3]),
        "q must be no longer than k, got 5 and 3 tokens",
    ),
    "unequal lengths": (
        lambda rope, x: rope.rotate_queries_and_keys(x, x[:, :3]),
        r"same sequence length, got \(2, 5, 8\) and \(2, 3, 8\)",
    ),
    "xpos without a scale": (
        lambda _, x: RotaryEmbedding(8, use_xpos=True).rotate_queries_or_keys(x),
        "needs a scale with use_xpos=True, got None",
    ),
    "scales without xpos": (
        lambda rope, _: rope.get_scale(torch.arange(5)),
        "get_scale needs use_xpos=True, got False",
    ),
    "narrow heads": (
        lambda rope, x: rope.rotate_queries_or_keys(x[..., :6]),
        r"t must be .* D >= 8, got \(2, 5, 6\)",
    ),
    "narrow heads of angles": (
        lambda rope, x: apply_rotary_emb(rope(torch.arange(5)), x, 1),
        r"t must have at least 9 channels \(start_index 1 and 8 angles\), got \(2, 5, 8\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_a_call_that_does_not_fit_is_refused(call, message):
    with pytest.raises(BadInputError, match=message):
        call(RotaryEmbedding(8), normal(2, 5, 8))


@pytest.mark.parametrize("arguments", [{}, {"use_xpos": True}, {"learned_freq": True}])
def test_a_module_made_on_meta_and_loaded_by_assignment_rotates(arguments):
    usual = RotaryEmbedding(8, **arguments)
    with torch.device("meta"):
        rope = RotaryEmbedding(8, **arguments)
    rope.load_state_dict(usual.state_dict(), assign=True)
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(rope.rotate(q, q), usual.rotate(q, q), strict=True):
        assert torch.equal(got, expected)
