"""In the place of rotary-embedding-torch 0.9.1: its arguments, methods and numbers."""

import inspect
import math
import pickle

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
    cases,
    configurations,
    flags,
    frequencies,
    in_its_place,
    interpolations,
    laws,
    layouts,
    normal,
    offsets,
    seeds,
    theirs,
    turned,
)
from hypothesis import given
from rotary_embedding_torch.rotary_embedding_torch import broadcat as their_broadcat

from rope_export import (
    BadInputError,
    RotaryEmbedding,
    apply_learned_rotations,
    apply_rotary_emb,
    broadcat,
)


def growth_of(dim, places, scale_base):
    """xPos's scale of queries at ``places``, counted from the origin: ``[S, dim / 2]``."""
    decay = (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
    return decay ** (np.asarray(places, dtype=np.float64)[:, None] / scale_base)


def test_arguments_are_theirs_in_name_order_and_default():
    names = [name for name, _ in inspect.getmembers(rotary_embedding_torch.RotaryEmbedding)]
    own = vars(rotary_embedding_torch.RotaryEmbedding)
    methods = [name for name in names if name in own and inspect.isfunction(own[name])]
    assert {"forward", "get_scale", "rotate_queries_with_cached_keys"} < set(methods)
    pairs = [
        (getattr(RotaryEmbedding, name), getattr(rotary_embedding_torch.RotaryEmbedding, name))
        for name in methods
    ]
    pairs += [
        (apply_rotary_emb, rotary_embedding_torch.apply_rotary_emb),
        (apply_learned_rotations, rotary_embedding_torch.apply_learned_rotations),
        (broadcat, their_broadcat),
    ]
    for ours, their in pairs:
        mine, expected = (inspect.signature(f).parameters for f in (ours, their))
        shared = [p for p in mine.values() if p.kind is not p.KEYWORD_ONLY or p.name == "offsets"]
        assert [(p.name, p.kind) for p in shared] == [(p.name, p.kind) for p in expected.values()]
        for p in shared:
            if p.name != "theta":  # None here: 10000, or what `scaling` says
                assert p.default == expected[p.name].default
    constructor = inspect.signature(rotary_embedding_torch.RotaryEmbedding).parameters
    assert RotaryEmbedding(8).theta == constructor["theta"].default


# One tensor


@laws
@given(cases(), offsets, flags)
def test_one_tensor_turns_as_theirs_does(case, offset, as_tensor):
    x = case.heads()
    given = torch.tensor(offset) if as_tensor else offset
    actual = RotaryEmbedding(**case.config).rotate_queries_or_keys(x, case.given, given)
    slack = allowed(x, case.angles(offset + np.arange(case.length)), relative=case.relative)
    expected = case.theirs("rotate_queries_or_keys", x, offset=offset)
    assert_within(actual, expected, slack)
    if case.given in (None, -2, -3) and case.axis >= -3:
        straight = theirs(**case.config).rotate_queries_or_keys(x, case.given, offset)
        assert_within(actual, straight, slack)


@laws
@given(
    cases(smallest_dim=2),
    offsets,
    layouts,
    st.sampled_from([None, 5009]),
    st.sampled_from([torch.float32, torch.float64, *NARROW]),
)
def test_one_tensor_turns_as_truth_does(case, offset, layout, max_seq_len, dtype):
    x = case.heads(dtype=dtype)
    rope = RotaryEmbedding(**case.config, layout=layout, max_seq_len=max_seq_len)
    freqs = case.freqs
    if case.config["learned_freq"]:
        np.testing.assert_allclose(rope.freqs.detach(), freqs, rtol=ROUNDING * 1.01)
        freqs = rope.freqs.detach().double().numpy()  # a parameter is as exact as float32 is
    angles = case.angles(offset + np.arange(case.length), freqs)
    actual = rope.rotate_queries_or_keys(x, case.given, offset)
    assert actual.dtype == dtype
    exact = turned(x, angles, layout=layout)
    slack = allowed(x, angles, layout=layout)
    if dtype in NARROW:
        slack += (slack > 0) * (torch.finfo(dtype).eps * np.abs(exact) + 2.0**-25)
    assert_within(actual, exact, slack)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_positions_of_narrow_heads_are_not_narrow(dtype):
    """Theirs counts positions in the dtype of the heads: 4001 is 4000 in bfloat16."""
    x = normal(2, 4, 8, dtype=dtype)
    angles = np.outer(4001 + np.arange(4), frequencies(8))
    slack = allowed(x, angles) + torch.finfo(dtype).eps * np.abs(turned(x, angles)) + 2.0**-25
    assert_within(
        RotaryEmbedding(8).rotate_queries_or_keys(x, offset=4001), turned(x, angles), slack
    )
    with pytest.raises(AssertionError, match="beyond"):  # so that this test can fail
        assert_within(
            theirs(dim=8).rotate_queries_or_keys(x, offset=4001), turned(x, angles), slack
        )


SCALES = [(), (8,), (5, 1), (5, 8), (1, 1, 5, 8), (3, 5, 8), (2, 1, 5, 8), (2, 3, 1, 1)]


@pytest.mark.parametrize("shape", SCALES, ids=str)
@pytest.mark.parametrize("use_xpos", [False, True])
def test_a_scale_broadcasts_against_the_heads_as_theirs_does(shape, use_xpos):
    x, scale = normal(2, 3, 5, 8), normal(*shape, seed=1).abs() + 0.5
    expected = theirs(dim=8, use_xpos=use_xpos).rotate_queries_or_keys(x, scale=scale)
    actual = RotaryEmbedding(8, use_xpos=use_xpos).rotate_queries_or_keys(x, scale=scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(5, 1, 8), (5, 1, 1), (1, 5, 1, 8)], ids=str)
def test_a_scale_made_for_their_seq_dim_of_minus_3_serves(shape):
    x, scale = normal(2, 5, 3, 8), normal(*shape, seed=1).abs() + 0.5
    expected = theirs(dim=8).rotate_queries_or_keys(x, seq_dim=-3, scale=scale)
    actual = RotaryEmbedding(8).rotate_queries_or_keys(x, seq_dim=-3, scale=scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)


@laws
@given(cases(smallest_dim=2), offsets, st.floats(0.1, 4), flags, layouts)
def test_a_scale_multiplies_the_rotated_channels_alone(case, offset, scale, per_token, layout):
    x, rope = case.heads(), RotaryEmbedding(**case.config, layout=layout)
    factors = np.full((case.length, len(case.freqs)), scale)
    given = scale
    if per_token:
        factors *= 1 + np.arange(case.length)[:, None]
        given = torch.from_numpy(factors).float().repeat(1, 2)
    angles = case.angles(offset + np.arange(case.length), rope.freqs.detach().double().numpy())
    growth = in_its_place(factors, case.axis)
    actual = rope.rotate_queries_or_keys(x, case.given, offset, given)
    slack = {"relative": 0 if case.config["learned_freq"] else ROUNDING}
    exact = turned(x, angles, growth=growth, layout=layout)
    assert_within(actual, exact, allowed(x, angles, growth=growth, layout=layout, **slack))


# Queries and keys


@laws
@given(cases(), st.integers(0, 9), offsets)
def test_cached_keys_turn_as_theirs_do(case, cached, offset):
    q, k = case.heads(), case.heads(case.length + cached, seed=1)
    actual = RotaryEmbedding(**case.config).rotate_queries_with_cached_keys(
        q, k, case.given, offset
    )
    expected = case.theirs("rotate_queries_with_cached_keys", q, k, offset=offset)
    positions = (offset + cached + np.arange(q.shape[case.axis]), np.arange(k.shape[case.axis]))
    for ours, their, x, at in zip(actual, expected, (q, k), positions, strict=True):
        assert_within(ours, their, allowed(x, case.angles(at), relative=case.relative))
        assert_within(ours, turned(x, case.angles(at)), trained_slack(case, x, at))


def trained_slack(case, x, at, **options):
    """Truth uses float64 frequencies; a parameter holds them rounded to float32."""
    relative = ROUNDING * 1.01 if case.config["learned_freq"] else 0.0
    return allowed(x, case.angles(at), relative=relative, **options)


def xpos_growth(case, places):
    """By position after interpolation, counted from the origin; and how far theirs may be off."""
    base = case.config["xpos_scale_base"]
    growth = growth_of(2 * len(case.freqs), places, base)
    powers = np.abs(places).max() / base
    return in_its_place(growth, case.axis), 1e-6 + 6 * powers * ROUNDING


@laws
@given(cases(for_xpos=True))
def test_xpos_turns_whole_sequences_as_theirs_does(case):
    q, k = case.heads(), case.heads(seed=1)
    at = np.arange(case.length)
    growth, floor = xpos_growth(case, at / case.config["interpolate_factor"] - case.length // 2)
    actual = RotaryEmbedding(**case.config).rotate_queries_and_keys(q, k, case.given)
    expected = case.theirs("rotate_queries_and_keys", q, k)
    for ours, their, x, g in zip(actual, expected, (q, k), (growth, 1 / growth), strict=True):
        options = {"growth": g, "floor": floor}
        slack = allowed(x, case.angles(at), relative=case.relative, **options)
        assert_within(ours, their, slack)
        exact = turned(x, case.angles(at), growth=g)
        assert_within(ours, exact, trained_slack(case, x, at, growth=g))


@pytest.mark.parametrize(("length", "scale_base"), [(4096, 512), (3000, 32), (1900, 16)])
def test_xpos_serves_every_length_theirs_does(length, scale_base):
    """Their origin is the middle: float32 holds the scales of twice the positions."""
    q, k = normal(1, length, 8), normal(1, length, 8, seed=1)
    config = {"dim": 8, "use_xpos": True, "xpos_scale_base": scale_base}
    actual = RotaryEmbedding(**config).rotate_queries_and_keys(q, k)
    expected = theirs(**config).rotate_queries_and_keys(q, k)
    angles = np.outer(np.arange(length), frequencies(8))
    growth = growth_of(8, np.arange(length) - length // 2, scale_base)
    for ours, their, x, g in zip(actual, expected, (q, k), (growth, 1 / growth), strict=True):
        assert torch.all(their.isfinite())
        assert_within(ours, turned(x, angles, growth=g), allowed(x, angles, growth=g))
        options = {"growth": g, "floor": 1e-4}
        assert_within(ours, their, allowed(x, angles, relative=20 * ROUNDING, **options))


@pytest.mark.parametrize("max_seq_len", [None, 8192])
def test_xpos_never_turns_float16_keys_into_infinity(max_seq_len):
    """Theirs holds 6000 tokens in float16; where ours cannot, it is to say so."""
    x = torch.ones(1, 6000, 8, dtype=torch.float16)
    rope = RotaryEmbedding(8, use_xpos=True, max_seq_len=max_seq_len)
    for rotate in (rope.rotate_queries_and_keys, rope.rotate_queries_with_cached_keys):
        try:
            found = rotate(x, x)
        except BadInputError:
            continue
        assert all(torch.all(t.isfinite()) for t in found)


def scores(q, k, axis):
    return q.movedim(axis, -2).double() @ k.movedim(axis, -2).double().transpose(-1, -2)


@laws
@given(
    cases(for_xpos=True),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    flags,
    layouts,
)
def test_xpos_decodes_in_steps_what_it_gives_at_once(case, steps, bounded, layout):
    length = sum(steps)
    q, k = case.heads(length), case.heads(length, seed=1)
    rope = RotaryEmbedding(**case.config, layout=layout, max_seq_len=16 if bounded else None)
    whole = rope.rotate(*(x.movedim(case.axis, rope.default_seq_dim) for x in (q, k)))
    full = [x.movedim(rope.default_seq_dim, case.axis) for x in whole]
    done = 0
    for step in steps:
        now = q.narrow(case.axis, done, step), k.narrow(case.axis, 0, done + step)
        turned_q, turned_k = rope.rotate_queries_with_cached_keys(*now, case.given)
        for actual, whole, start, count in (
            (turned_q, full[0], done, step),
            (turned_k, full[1], 0, done + step),
        ):
            expected = whole.narrow(case.axis, start, count)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        done += step
    if layout == "interleaved":
        their = case.theirs("rotate_queries_and_keys", q, k)
        expected = scores(*their, case.axis)
        norms = [x.movedim(case.axis, -2).double().norm(dim=-1) for x in their]
        lengths = (norms[0].unsqueeze(-1) * norms[1].unsqueeze(-2)).numpy()
        angle_off = 2 * case.relative * np.abs(case.angles([length])).max()
        assert_within(scores(*full, case.axis), expected, lengths * (angle_off + 1e-5))


@pytest.mark.parametrize("seq_dim", [-3, 1])
def test_xpos_serves_tokens_before_heads(seq_dim):
    """Theirs raises here: it gives the heads' axis the scale of the sequence."""
    q, k = normal(2, 7, 3, 8), normal(2, 9, 3, 8, seed=1)
    for make in ({}, {"seq_before_head_dim": True}):
        rope = RotaryEmbedding(8, use_xpos=True, **make)
        actual = rope.rotate_queries_with_cached_keys(q, k, None if make else seq_dim)
        angles = [np.outer(at, frequencies(8)) for at in (2 + np.arange(7), np.arange(9))]
        growth = growth_of(8, np.arange(9), 512)
        for x, y, a, g in zip(actual, (q, k), angles, (growth[2:], 1 / growth), strict=True):
            a, g = in_its_place(a, -3), in_its_place(g, -3)
            assert_within(x, turned(y, a, growth=g), allowed(y, a, growth=g))


@pytest.mark.parametrize("use_xpos", [False, True])
@pytest.mark.parametrize("heads", [3, 5])
def test_a_positive_seq_dim_counts_from_the_front_of_each_tensor(use_xpos, heads):
    """Multi-query attention: queries ``[B, S, H, D]``, keys ``[B, S, D]``, tokens along 1."""
    q, k = normal(2, 5, heads, 8), normal(2, 5, 8, seed=1)
    rope = RotaryEmbedding(8, use_xpos=use_xpos)
    for name in ("rotate_queries_and_keys", "rotate_queries_with_cached_keys"):
        rotate = getattr(rope, name)
        expected = rotate(q, k.unsqueeze(2), -3)
        actual = rotate(q, k, 1)
        for ours, other in zip(actual, (expected[0], expected[1].squeeze(2)), strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@laws
@given(cases(smallest_dim=2), offsets)
def test_every_method_means_one_axis_by_a_seq_dim(case, offset):
    x, rope = case.heads(), RotaryEmbedding(**case.config)
    axes = (case.axis, case.axis + len(case.shape))
    expected = rope.rotate_queries_or_keys(x, case.axis, offset)
    freqs = rope.forward(rope.get_seq_pos(case.length, offset=offset)).detach()
    freqs = freqs[(slice(None), *(None,) * (-2 - case.axis))]
    slack = allowed(x, case.angles(offset + np.arange(case.length)), relative=2 * ROUNDING)
    for axis in axes:
        assert torch.equal(rope.rotate_queries_or_keys(x, axis, offset), expected)
        last = rope.rotate_queries_with_cached_keys(x, x, axis, offset)[0]
        assert torch.equal(last, expected)
        if offset == 0:
            assert torch.equal(rope.rotate_queries_and_keys(x, x, axis)[0], expected)
        assert_within(apply_rotary_emb(freqs, x, seq_dim=axis), expected, slack)


@pytest.mark.parametrize("seq_dim", [-1, 3, 4, -5, 9])
def test_an_axis_that_cannot_be_the_sequence_is_named(seq_dim):
    x, rope = normal(2, 3, 5, 8), RotaryEmbedding(8)
    for rotate in (
        lambda: rope.rotate_queries_or_keys(x, seq_dim),
        lambda: rope.rotate_queries_and_keys(x, x, seq_dim),
        lambda: rope.rotate_queries_with_cached_keys(x, x, seq_dim),
    ):
        with pytest.raises(BadInputError, match=rf"seq_dim.* {seq_dim}\b"):
            rotate()


# Positions, scales, angles


@laws
@given(
    st.integers(0, 50),
    offsets,
    interpolations,
    st.sampled_from([None, torch.float32, torch.float64, *NARROW]),
)
def test_positions_are_exact_before_they_are_rounded(length, offset, factor, dtype):
    rope = RotaryEmbedding(4, interpolate_factor=factor)
    exact = torch.from_numpy((np.arange(length) + offset) / factor)
    actual = rope.get_seq_pos(length, None, dtype, offset)
    assert torch.equal(actual, exact.to(dtype or torch.float32))
    if dtype not in NARROW:
        other = theirs(dim=4, interpolate_factor=factor).get_seq_pos(length, None, dtype, offset)
        torch.testing.assert_close(actual, other, rtol=2 * ROUNDING, atol=0)


@laws
@given(configurations(for_xpos=True), st.integers(1, 40), offsets, layouts)
def test_scales_are_theirs(config, length, offset, layout):
    rope = RotaryEmbedding(**config, layout=layout)
    at = rope.get_seq_pos(length, offset=offset % 50)
    actual = rope.get_scale(at, length)
    expected = theirs(**config).get_scale(at, seq_len=length)
    if layout == "half":
        expected = torch.cat((expected[:, 0::2], expected[:, 1::2]), dim=-1)
    places = at.double().numpy() - length // 2
    powers = np.abs(places).max() / config["xpos_scale_base"]
    torch.testing.assert_close(actual, expected, rtol=1e-6 + 6 * powers * ROUNDING, atol=0)
    exact = growth_of(config["dim"], places, config["xpos_scale_base"])
    exact = np.tile(exact, 2) if layout == "half" else exact.repeat(2, axis=-1)
    np.testing.assert_allclose(actual, exact, rtol=2e-7)


@laws
@given(
    configurations(smallest_dim=2),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([torch.int64, torch.float32, torch.float64]),
    layouts,
    seeds,
)
def test_angles_are_theirs(config, shape, dtype, layout, seed):
    t = (3000 * normal(*shape, seed=seed)).to(dtype)
    rope = RotaryEmbedding(**config, layout=layout)
    actual = rope(t, 3, 2)  # neither a length nor an offset changes what `t` says
    assert actual.dtype == torch.float32
    freqs = frequencies(**config)
    exact = t.double().numpy()[..., None] * freqs
    exact = np.concatenate((exact, exact), -1) if layout == "half" else exact.repeat(2, -1)
    roundings = 2.1 if config["learned_freq"] else 1.01
    np.testing.assert_allclose(actual.detach(), exact, rtol=roundings * ROUNDING, atol=1e-37)
    if config["dim"] > 2 and layout == "interleaved":
        base = base_of(**config) if config["freqs_for"] == "lang" else 1.0
        slack = (8 + abs(math.log(base))) * ROUNDING * np.abs(exact) + 1e-37
        assert_within(actual, theirs(**config)(t, 3, 2), slack)


@laws
@given(configurations(), st.integers(1, 9), offsets)
def test_angles_of_a_sequence_rotate_as_the_methods_do(config, length, offset):
    rope = RotaryEmbedding(**config)
    freqs = rope(rope.get_seq_pos(length, offset=offset), seq_len=length, offset=offset)
    x = normal(2, length, freqs.shape[-1] + 1, seed=length)
    angles = np.outer((offset + np.arange(length)) / rope.interpolate_factor, frequencies(**config))
    slack = allowed(x, angles, relative=4 * ROUNDING)
    assert_within(apply_rotary_emb(freqs, x), rope.rotate_queries_or_keys(x, -2, offset), slack)


# Their README


def test_their_readme_usage_and_cache():
    rope, other = RotaryEmbedding(dim=32), rotary_embedding_torch.RotaryEmbedding(dim=32)
    q, k = normal(1, 8, 1024, 64), normal(1, 8, 1024, 64, seed=1)
    angles = np.outer(np.arange(1024), frequencies(32))
    slack = allowed(q, angles, relative=20 * ROUNDING)
    assert_within(rope.rotate_queries_or_keys(q), other.rotate_queries_or_keys(q), slack)
    last, keys = rope.rotate_queries_with_cached_keys(q[:, :, -1:], k)
    expected, _ = theirs(dim=32).rotate_queries_with_cached_keys(q[:, :, -1:], k)
    assert_within(last, expected, slack[:, :, -1:])
    assert_within(last, rope.rotate_queries_or_keys(q)[:, :, -1:], 0 * slack[:, :, -1:])
    assert torch.equal(keys, rope.rotate_queries_or_keys(k))
    assert torch.equal(last, rope.rotate_queries_or_keys(q[:, :, -1:], offset=1023))
    freqs = rope(torch.arange(1024))
    assert_within(
        apply_rotary_emb(freqs, q), turned(q, angles), allowed(q, angles, relative=ROUNDING)
    )


def test_their_readme_axial():
    arguments = {"dim": 16, "freqs_for": "pixel", "max_freq": 256}
    freqs = RotaryEmbedding(**arguments).get_axial_freqs(8, 64, 32)
    expected = rotary_embedding_torch.RotaryEmbedding(**arguments).get_axial_freqs(8, 64, 32)
    assert freqs.shape == (8, 64, 32, 48)
    for t in (normal(1, 8, 64, 32, 64), normal(1, 8, 64, 32, 64, seed=1)):
        actual = apply_rotary_emb(freqs, t)
        their = rotary_embedding_torch.apply_rotary_emb(expected, t)
        angles, factors = angles_of_grid(arguments, (8, 64, 32), None)
        assert_within(actual, turned(t, angles), allowed(t, factors, relative=3 * ROUNDING))
        assert_within(actual, their, allowed(t, factors, relative=10 * ROUNDING))


@pytest.mark.parametrize("more", [{"use_xpos": True}, {"interpolate_factor": 2.0}], ids=str)
def test_their_readme_xpos_and_interpolation(more):
    rope = RotaryEmbedding(dim=32, **more)
    other = rotary_embedding_torch.RotaryEmbedding(dim=32, **more)
    heads = normal(1, 8, 1024, 64), normal(1, 8, 1024, 64, seed=1)
    if rope.use_xpos:
        actual, expected = (m.rotate_queries_and_keys(*heads) for m in (rope, other))
    else:
        actual, expected = ([m.rotate_queries_or_keys(x) for x in heads] for m in (rope, other))
    angles = np.outer(np.arange(1024), frequencies(32)) / rope.interpolate_factor
    growth = growth_of(32, np.arange(1024) - 512, 512) if rope.use_xpos else np.ones((1024, 16))
    for ours, their, x, g in zip(actual, expected, heads, (growth, 1 / growth), strict=True):
        assert_within(ours, turned(x, angles, growth=g), allowed(x, angles, growth=g))
        assert_within(ours, their, allowed(x, angles, growth=g, relative=20 * ROUNDING, floor=2e-6))


# No call depends on an earlier one


def heads_for(length, dtype=torch.float32):
    return normal(1, 2, length, 8, seed=length, dtype=dtype)


CALLS = {
    "one, long": lambda rope: rope.rotate_queries_or_keys(heads_for(40), scale=1.0),
    "one, bfloat16": lambda rope: rope.rotate_queries_or_keys(
        heads_for(300, torch.bfloat16), scale=1.0
    ),
    "one, float16 at 4000": lambda rope: rope.rotate_queries_or_keys(
        heads_for(9, torch.float16), offset=4000, scale=2.0
    ),
    "cached": lambda rope: rope.rotate_queries_with_cached_keys(heads_for(2), heads_for(17)),
    "whole": lambda rope: rope.rotate_queries_and_keys(heads_for(20), heads_for(20)),
    "whole, shorter": lambda rope: rope.rotate_queries_and_keys(heads_for(6), heads_for(6)),
    "whole, bfloat16": lambda rope: rope.rotate_queries_and_keys(
        *(heads_for(30, torch.bfloat16),) * 2
    ),
    "axial": lambda rope: rope.get_axial_freqs(5, 9),
    "axial with offsets": lambda rope: rope.get_axial_freqs(5, 9, offsets=(100, 0.5)),
    "angles": lambda rope: rope(torch.arange(12) + 7, seq_len=12),
    "angles of other positions": lambda rope: rope(torch.arange(12) * 3, seq_len=12),
    "scales": lambda rope: rope.get_scale(torch.arange(12), seq_len=12) if rope.use_xpos else 0,
    "scales of others": lambda rope: (
        rope.get_scale(torch.arange(12) + 9, seq_len=12) if rope.use_xpos else 0
    ),
    "inference": torch.inference_mode()(lambda rope: rope.get_axial_freqs(7, offsets=(3,))),
}


@laws
@given(st.lists(st.sampled_from(list(CALLS)), min_size=2, max_size=6), flags, flags)
def test_no_call_depends_on_earlier_ones(names, learned_freq, use_xpos):
    arguments = {"learned_freq": learned_freq, "use_xpos": use_xpos, "max_seq_len": 5000}
    rope = RotaryEmbedding(8, **arguments)
    before = pickle.dumps(rope)
    for name in names[:-1]:
        CALLS[name](rope)
    again, fresh = (CALLS[names[-1]](m) for m in (rope, RotaryEmbedding(8, **arguments)))
    torch.testing.assert_close(again, fresh, rtol=0, atol=0)
    assert pickle.dumps(rope) == before


def test_offsets_of_axes_count_after_a_call_without():
    rope = RotaryEmbedding(8)
    rope.get_axial_freqs(6, 4)
    angles, factors = angles_of_grid({"dim": 8, "freqs_for": "lang"}, (6, 4), (10, 20))
    actual = rope.get_axial_freqs(6, 4, offsets=(10, 20))
    assert_within(actual, angles.repeat(2, -1), 1.01 * ROUNDING * factors.repeat(2, -1))
