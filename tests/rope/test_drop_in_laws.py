"""Whatever its configuration, a rotation is one: lengths stay, positions add, distances count."""

import math

import hypothesis.strategies as st
import numpy as np
import torch
from drop_in import (
    LAYOUTS,
    allowed,
    assert_within,
    channels_of_pairs,
    configurations,
    flags,
    laws,
    layouts,
    normal,
    offsets,
    seeds,
)
from hypothesis import given

from rope_export import RotaryEmbedding, apply_rotary_emb

# Laws


@st.composite
def rotating(draw):
    """A module of either layout, and an `rng` seed for its heads."""
    config = draw(configurations(smallest_dim=2))
    bounded = draw(st.sampled_from([None, 10020]))
    arguments = config | {"layout": draw(layouts), "seq_before_head_dim": False}
    return RotaryEmbedding(**arguments, max_seq_len=bounded), draw(seeds)


@laws
@given(rotating(), offsets)
def test_the_length_of_every_pair_is_kept(drawn, offset):
    rope, seed = drawn
    x = normal(2, 4, rope.dim + 3, seed=seed)
    y = rope.rotate_queries_or_keys(x, offset=offset).detach()
    before, after = (
        np.hypot(*channels_of_pairs(t.double().numpy(), rope.dim // 2, 0, rope.layout))
        for t in (x, y)
    )
    np.testing.assert_allclose(after, before, rtol=2e-6)
    assert torch.equal(y[..., rope.dim :], x[..., rope.dim :])


@laws
@given(rotating(), offsets, offsets)
def test_rotations_compose_by_adding_positions(drawn, first, second):
    rope, seed = drawn
    x = normal(2, 1, rope.dim + 1, seed=seed)
    twice = rope.rotate_queries_or_keys(rope.rotate_queries_or_keys(x, offset=first), offset=second)
    once = rope.rotate_queries_or_keys(x, offset=first + second)
    assert_within(twice, once, allowed(x, np.zeros(rope.dim // 2), layout=rope.layout, floor=3e-6))


@laws
@given(rotating(), st.integers(0, 300), st.integers(0, 300), offsets, flags)
def test_scores_depend_on_the_distance_alone(drawn, at_q, at_k, shift, use_xpos):
    rope, seed = drawn
    if use_xpos:
        rope = RotaryEmbedding(rope.dim, use_xpos=True, layout=rope.layout)
    rope.requires_grad_(False)
    q, k = normal(1, 1, rope.dim, seed=seed), normal(1, 1, rope.dim, seed=seed + 1)

    def score(i, j):
        turned_q, turned_k = rope.rotate(q, q, offset=i)[0], rope.rotate(k, k, offset=j)[1]
        return float((turned_q.double() * turned_k.double()).sum())

    steepest = abs(at_q - at_k) / 512 * 1.26 if use_xpos else 0.0
    slack = 5e-6 * float(q.norm() * k.norm()) * math.exp(steepest)
    assert abs(score(at_q, at_k) - score(at_q + shift, at_k + shift)) <= slack


@laws
@given(configurations(smallest_dim=2), offsets, seeds)
def test_the_layouts_are_one_rotation_of_permuted_channels(config, offset, seed):
    paired, halved = (RotaryEmbedding(**config, layout=layout) for layout in LAYOUTS)
    width = paired.dim
    order = [*range(0, width, 2), *range(1, width, 2), width, width + 1]
    x = normal(2, 5, width + 2, seed=seed)
    for rotate in (
        lambda rope, t: rope.rotate_queries_or_keys(t, -2, offset),
        lambda rope, t: apply_rotary_emb(rope(torch.arange(5)), t, layout=rope.layout),
        lambda rope, t: apply_rotary_emb(rope.get_axial_freqs(5), t, layout=rope.layout),
    ):
        expected = rotate(paired, x)[..., order]
        torch.testing.assert_close(rotate(halved, x[..., order]), expected, rtol=0, atol=1e-6)
