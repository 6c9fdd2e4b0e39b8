"""Its functions and the angles of axes give what those of rotary-embedding-torch give."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import rotary_embedding_torch
import torch
from drop_in import (
    NARROW,
    ROUNDING,
    allowed,
    angles_of_grid,
    assert_within,
    base_of,
    channels_of_pairs,
    configurations,
    flags,
    laws,
    layouts,
    normal,
    seeds,
    theirs,
    turned,
)
from hypothesis import given, settings
from rotary_embedding_torch.rotary_embedding_torch import broadcat as their_broadcat

from rope_export import (
    BadInputError,
    RotaryEmbedding,
    apply_learned_rotations,
    apply_rotary_emb,
    broadcat,
)

# Axes of images and videos

quarters = st.integers(-400, 4000).map(lambda n: n / 4)


@st.composite
def grids(draw):
    """A configuration, sizes of one to three axes, and offsets as their method takes them."""
    config = draw(configurations())
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    rows = draw(st.sampled_from([None, "tuple", "tensor", "whole", "rows"]))
    count = 3 * len(sizes)
    drawn = draw(st.lists(quarters, min_size=count, max_size=count))
    offsets = {
        None: None,
        "tuple": tuple(drawn[: len(sizes)]),
        "tensor": torch.tensor(drawn[: len(sizes)]),
        "whole": tuple(int(number) for number in drawn[: len(sizes)]),
        "rows": torch.tensor(drawn).reshape(len(sizes), 3, 1),
    }[rows]
    return config, sizes, offsets


@laws
@given(grids())
def test_axial_angles_are_theirs(drawn):
    config, sizes, offsets = drawn
    exact, factors = (a.repeat(2, axis=-1) for a in angles_of_grid(*drawn))
    actual = RotaryEmbedding(**config).get_axial_freqs(*sizes, offsets=offsets)
    expected = theirs(**config).get_axial_freqs(*sizes, offsets=offsets)
    base = base_of(**config) if config["freqs_for"] == "lang" else 1.0
    assert_within(actual, expected, (9 + abs(math.log(base))) * ROUNDING * factors)
    assert_within(actual, exact, 2.1 * ROUNDING * factors)


@laws
@given(grids(), st.integers(0, 3), st.integers(0, 3), layouts, seeds)
def test_axial_angles_turn_videos(drawn, start, after, layout, seed):
    config, sizes, offsets = drawn
    rope = RotaryEmbedding(**config, layout=layout)
    freqs = rope.get_axial_freqs(*sizes, offsets=offsets)
    angles, factors = angles_of_grid(*drawn)
    rows = 3 if freqs.ndim > len(sizes) + 1 else 2
    x = normal(rows, *sizes, start + freqs.shape[-1] + after, seed=seed)
    exact = turned(x, angles, start=start, layout=layout)
    off = np.hypot(*channels_of_pairs(x.double().numpy(), angles.shape[-1], start, layout))
    slack = np.zeros(x.shape)
    for channels in channels_of_pairs(slack, angles.shape[-1], start, layout):
        channels[...] = off * (3 * ROUNDING * factors + 1e-6)
    assert_within(apply_rotary_emb(freqs, x, start, layout=layout), exact, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, *NARROW], ids=str)
def test_offsets_of_an_axis_do_not_choose_the_dtype_of_its_positions(dtype):
    rope, given = RotaryEmbedding(8), torch.tensor([256, 2048]).to(dtype)
    expected = rope.get_axial_freqs(300, 3, offsets=(256, 2048))
    assert torch.equal(rope.get_axial_freqs(300, 3, offsets=given), expected)


def test_an_offset_for_each_axis_is_needed():
    with pytest.raises(BadInputError, match=r"^offsets .* each of 3 axes, got \[1\.0, 2\.0\]$"):
        RotaryEmbedding(8).get_axial_freqs(2, 3, 4, offsets=(1, 2))


# Functions


@st.composite
def rotations(draw):
    """Heads of 3 to 5 axes, angles of their last tokens and how they are to be found."""
    rank, half = draw(st.integers(3, 5)), draw(st.integers(1, 6))
    start, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    shape = [*(draw(st.integers(1, 4)) for _ in range(rank - 1)), start + 2 * half + after]
    x = normal(*shape, seed=draw(seeds))
    seq_dim, extra = -2, draw(st.integers(0, 4))
    way = draw(st.sampled_from(["2", "named", "tokens first"] + ["full"] * (rank > 3)))
    if way == "2":
        angles, named = 10 * normal(shape[-2] + extra, half, seed=1), None
    elif way == "named":
        angles, named = 10 * normal(shape[-3], shape[-2] + extra, half, seed=1), 1
    elif way == "tokens first":
        seq_dim = -3
        angles, named = 10 * normal(shape[-3] + extra, 1, half, seed=1), 0
    else:
        angles, named = 10 * normal(*shape[:-1], half, seed=1), None
    scale = draw(st.sampled_from([1.0, 0.5, "token", "channel"]))
    if scale == "token":
        scale = normal(shape[-2], 1, seed=2).exp()
    elif scale == "channel":
        scale = normal(half, seed=2).exp().repeat_interleave(2)
    positive = draw(flags)
    if named is not None and draw(flags):
        named -= 3
    return x, angles, start, scale, seq_dim + rank if positive else seq_dim, named


@settings(laws, max_examples=60)
@given(rotations(), st.sampled_from([torch.float32, torch.float64]))
def test_given_angles_turn_heads_as_theirs_do(drawn, dtype):
    x, angles, start, scale, seq_dim, named = drawn
    x = x.to(dtype)
    freqs = angles.repeat_interleave(2, dim=-1)
    arguments = (start, scale, seq_dim, named)
    actual = apply_rotary_emb(freqs, x, *arguments)
    expected = rotary_embedding_torch.apply_rotary_emb(freqs, x, *arguments)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    if named is None and freqs.ndim == 2:
        named = 0
    if named is not None:
        angles = angles.movedim(named, 0)[-x.shape[seq_dim] :].movedim(0, named)
    angles = angles.double().numpy()
    growth = scale if isinstance(scale, float) else scale.double().numpy()[..., ::2]
    exact = turned(x, angles, start=start, growth=growth)
    assert_within(actual, exact, allowed(x, angles, start=start, growth=growth))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("of_angles", [torch.float32, *NARROW], ids=str)
def test_narrow_heads_are_turned_in_float32(dtype, of_angles):
    x, angles = normal(2, 3, 40, 12, dtype=dtype), (10 * normal(40, 4, seed=1)).to(of_angles)
    actual = apply_rotary_emb(angles.repeat_interleave(2, dim=-1), x, 2, 0.75)
    exact = turned(x, angles.double().numpy(), start=2, growth=0.75)
    assert actual.dtype == dtype
    slack = allowed(x, angles.float().numpy(), start=2)
    slack += (slack > 0) * (0.51 * torch.finfo(dtype).eps * np.abs(exact) + 2.0**-25)
    assert_within(actual, exact, slack)


@pytest.mark.parametrize("named", [2, 5, -3])
def test_an_axis_that_the_angles_do_not_have_is_no_other_axis(named):
    with pytest.raises((IndexError, BadInputError)):
        apply_rotary_emb(normal(8, 8), normal(2, 3, 8, 8), freqs_seq_dim=named)


@pytest.mark.parametrize(("height", "width"), [(6, 3), (3, 6), (5, 1), (4, 4)])
def test_an_image_without_a_batch_is_turned_by_its_own_angles(height, width):
    """Theirs takes the last ``width`` rows of the angles."""
    rope, x = RotaryEmbedding(4), normal(height, width, 9)
    angles, _ = angles_of_grid({"dim": 4, "freqs_for": "lang"}, (height, width), None)
    actual = apply_rotary_emb(rope.get_axial_freqs(height, width), x)
    assert_within(actual, turned(x, angles), allowed(x, angles))


@st.composite
def learned_rotations(draw):
    rank, count = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 3)) for _ in range(rank - 1)]
    ranges = draw(st.sampled_from([None, 1, 3]))
    angles = 3 * normal(*shape, count, seed=draw(seeds))
    ranges = None if ranges is None else normal(ranges, seed=1)
    start, wide = draw(st.integers(0, 2)), 2 * count * (1 if ranges is None else len(ranges))
    return angles, normal(2, 2, *shape, start + wide + 1, seed=2)[(0,) * (rank == 4)], start, ranges


@laws
@given(learned_rotations())
def test_learned_rotations_are_theirs(drawn):
    angles, x, start, ranges = drawn
    actual = apply_learned_rotations(angles, x, start, ranges)
    expected = rotary_embedding_torch.apply_learned_rotations(angles, x, start, ranges)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    exact = angles.double().numpy()
    if ranges is not None:
        exact = (exact[..., None] * ranges.double().numpy()).reshape(*exact.shape[:-1], -1)
    slack = allowed(x, exact, start=start, relative=2 * ROUNDING)
    assert_within(actual, turned(x, exact, start=start), slack)


@pytest.mark.parametrize(("batch", "length"), [(4, 1), (4, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("ranges", [None, torch.tensor([1.0, 0.3])])
def test_every_row_of_a_batch_has_its_own_learned_rotations(batch, length, ranges):
    """Theirs takes the rotations of the last ``length`` rows for those of all ``batch``."""
    angles, x = 3 * normal(batch, length, 3), normal(batch, length, 14, seed=1)
    exact = angles.double().numpy()
    if ranges is not None:
        exact = (exact[..., None] * ranges.double().numpy()).reshape(batch, length, -1)
    actual = apply_learned_rotations(angles, x, freq_ranges=ranges)
    assert_within(actual, turned(x, exact), allowed(x, exact, relative=2 * ROUNDING))


def test_a_learned_rotation_passes_gradients_to_angles_and_ranges():
    angles, ranges = normal(2, 5, 3).requires_grad_(), normal(2, seed=1).requires_grad_()
    x, upstream = normal(2, 5, 12, seed=2), normal(2, 5, 12, seed=3)
    found = []
    for function in (apply_learned_rotations, rotary_embedding_torch.apply_learned_rotations):
        loss = (function(angles, x, 0, ranges) * upstream).sum()
        found.append(torch.autograd.grad(loss, (angles, ranges)))
    for ours, their in zip(*found, strict=True):
        assert their.abs().max() > 0.1
        torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-5)


@laws
@given(st.lists(st.lists(st.sampled_from([1, 3]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_broadcat_is_theirs(shapes):
    tensors = [normal(*shape, seed=number) for number, shape in enumerate(shapes)]
    for dim in (-1, 0, 1, -2):
        for some in (tensors, tuple(tensors)):
            assert torch.equal(broadcat(some, dim), their_broadcat(some, dim))
    assert torch.equal(broadcat(tensors), their_broadcat(tensors))
