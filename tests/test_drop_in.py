"""In the place of rotary-embedding-torch 0.9.1: its arguments, methods and numbers.

Theirs is made anew for each call with its cache off, and has seen no other. Its angles are float32
products, so it may be off by their rounding; float64 truth, written here by complex multiplication,
holds ours much closer, and holds it alone where theirs is wrong.
"""

import copy
import inspect
import math
import pickle
import re
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import rotary_embedding_torch
import torch
from hypothesis import given, settings
from rotary_embedding_torch.rotary_embedding_torch import broadcat as their_broadcat

from rope_export import (
    BadInputError,
    RotaryEmbedding,
    apply_learned_rotations,
    apply_rotary_emb,
    broadcat,
)

laws = settings(derandomize=True, deadline=None, max_examples=30)
ROUNDING = 2.0**-24  # of float32, relative
LAYOUTS = ("interleaved", "half")
NARROW = (torch.bfloat16, torch.float16)

seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
flags = st.booleans()
offsets = st.integers(0, 5000)
interpolations = st.one_of(st.just(1.0), st.floats(1, 8))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


# Truth, in float64 and apart from both


def base_of(dim, theta=10000.0, theta_rescale_factor=1.0, **_):
    if theta_rescale_factor == 1:
        return float(theta)
    return theta * theta_rescale_factor ** (dim / (dim - 2))


def frequencies(dim, custom_freqs=None, freqs_for="lang", max_freq=10, num_freqs=1, **others):
    """Radians per position, before interpolation."""
    if custom_freqs is not None:
        return custom_freqs.double().numpy()
    if freqs_for == "constant":
        return np.ones(num_freqs)
    if freqs_for == "pixel":
        return np.pi * np.linspace(1, max_freq / 2, dim // 2)
    return base_of(dim, **others) ** (-np.arange(0, dim, 2) / dim)


def in_its_place(per_token, axis):
    """``[S, r / 2]``, broadcastable to a tensor whose tokens lie along ``axis``."""
    return np.asarray(per_token)[(slice(None), *(None,) * (-2 - axis))]


def growth_of(dim, places, scale_base):
    """xPos's scale of queries at ``places``, counted from the origin: ``[S, dim / 2]``."""
    decay = (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
    return decay ** (np.asarray(places, dtype=np.float64)[:, None] / scale_base)


def channels_of_pairs(x, half, start, layout):
    block = x[..., start : start + 2 * half]
    if layout == "half":
        return block[..., :half], block[..., half:]
    return block[..., 0::2], block[..., 1::2]


def turned(x, angles, *, start=0, growth=1.0, layout="interleaved"):
    x = x.detach().double().numpy().copy()
    first, second = channels_of_pairs(x, angles.shape[-1], start, layout)
    z = (first + 1j * second) * (growth * np.exp(1j * angles))
    first[...], second[...] = z.real, z.imag
    return x


def allowed(x, angles, *, start=0, growth=1.0, layout="interleaved", relative=0.0, floor=1e-6):
    """How far each channel may be off by angles ``relative`` off, and by ``floor`` of its pair."""
    slack = np.zeros(x.shape)
    pairs = channels_of_pairs(x.detach().double().numpy(), angles.shape[-1], start, layout)
    off = np.hypot(*pairs) * growth * (np.minimum(2, np.abs(angles) * relative) + floor)
    for channels in channels_of_pairs(slack, angles.shape[-1], start, layout):
        channels[...] = off
    return slack


def assert_within(actual, expected, slack):
    actual, expected = (
        t.detach().double().numpy() if isinstance(t, torch.Tensor) else t
        for t in (actual, expected)
    )
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - slack
    assert np.all(excess <= 0), f"{excess.max():.2e} beyond what is allowed"


# Random configurations


@st.composite
def configurations(draw, *, smallest_dim=4, learned=flags, for_xpos=False):
    """Arguments of both classes. Theirs divides by ``dim - 2``."""
    dim = 2 * draw(st.integers(smallest_dim // 2, 32))
    kind = draw(st.sampled_from(["lang", "lang", "pixel", "constant", "custom"]))
    config = {"dim": dim, "freqs_for": "lang" if kind == "custom" else kind}
    if kind == "lang":
        config["theta"] = draw(st.one_of(st.just(10000), st.floats(2, 1e7)))
        if dim > 2:
            config["theta_rescale_factor"] = draw(st.sampled_from([1.0, 1.0, 2.0, 7.5]))
    elif kind == "pixel":
        config["max_freq"] = draw(st.one_of(st.just(10), st.floats(1, 300)))
    elif kind == "constant":
        config["num_freqs"] = dim // 2 if for_xpos else draw(st.integers(1, 16))
    else:
        count = dim // 2 if for_xpos else draw(st.integers(1, 16))
        some = st.floats(-2, 2, width=32, allow_subnormal=False)
        config["custom_freqs"] = torch.tensor(draw(st.lists(some, min_size=count, max_size=count)))
    config["learned_freq"] = draw(learned)
    config["interpolate_factor"] = draw(interpolations)
    config["seq_before_head_dim"] = draw(flags)
    config["cache_if_possible"] = draw(flags)
    config["cache_max_seq_len"] = draw(st.sampled_from([1, 16, 8192]))
    if for_xpos:
        config |= {"use_xpos": True, "xpos_scale_base": draw(st.sampled_from([8, 64, 512, 100.5]))}
    return config


@dataclass(frozen=True)
class Case:
    """A configuration and heads of 3 to 5 axes; ``given`` is ``axis`` as a caller may state it."""

    config: dict
    shape: tuple
    axis: int
    given: "int | None"
    seed: int

    @property
    def freqs(self):
        return frequencies(**self.config)

    @property
    def length(self):
        return self.shape[self.axis]

    def angles(self, positions, freqs=None):
        freqs = self.freqs if freqs is None else freqs
        positions = np.asarray(positions, dtype=np.float64)
        angles = np.outer(positions / self.config["interpolate_factor"], freqs)
        return in_its_place(angles, self.axis)

    def heads(self, length=None, *, seed=0, dtype=torch.float32):
        shape = list(self.shape)
        shape[self.axis] = length or self.length
        return normal(*shape, seed=self.seed + seed, dtype=dtype)

    def theirs(self, method, *heads, **arguments):
        """By their method, the sequence moved to where it is surest of it, and back."""
        moved = [x.movedim(self.axis, -2) for x in heads]
        rotate = getattr(theirs(**self.config), method)
        found = rotate(*moved, seq_dim=-2, **arguments)
        if isinstance(found, torch.Tensor):
            return found.movedim(-2, self.axis).detach()
        return [x.movedim(-2, self.axis).detach() for x in found]

    @property
    def relative(self):
        """By how much their angles may be off: eight roundings, and a power taken in float32."""
        base = base_of(**self.config) if self.config["freqs_for"] == "lang" else 1.0
        return (8 + abs(math.log(base))) * ROUNDING


def theirs(**config):
    return rotary_embedding_torch.RotaryEmbedding(**config | {"cache_if_possible": False})


@st.composite
def cases(draw, **options):
    config = draw(configurations(**options))
    width, rank = 2 * len(frequencies(**config)), draw(st.integers(3, 5))
    given = draw(st.one_of(st.none(), st.integers(-rank, rank - 2).filter(lambda i: i != -1)))
    axis = -3 if config["seq_before_head_dim"] else -2
    if given is not None:
        axis = given if given < 0 else given - rank
    shape = [draw(st.integers(1, 3)) for _ in range(rank - 1)]
    shape.append(width + draw(st.sampled_from([0, 0, 1, 4])))
    shape[axis] = draw(st.integers(1, 9))
    return Case(config, tuple(shape), axis, given, draw(seeds))


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


def angles_of_grid(config, sizes, offsets):
    """``[(rows,) *sizes, len(sizes) * r / 2]``, and how large the factors of each product are."""
    freqs, angles, factors = frequencies(**config), [], []
    for axis, size in enumerate(sizes):
        pixel = config["freqs_for"] == "pixel"
        places = np.linspace(-1, 1, size) if pixel else np.arange(size)
        if offsets is not None:
            places = places + np.asarray(offsets[axis], dtype=np.float64)
        after = (None,) * (len(sizes) - 1 - axis)
        index = (Ellipsis, *(None,) * axis, slice(None), *after, slice(None))
        angles.append((places[..., None] * freqs)[index])
        factors.append(((1 + np.abs(places))[..., None] * np.abs(freqs))[index])
    return [
        np.concatenate(np.broadcast_arrays(*parts), axis=-1) if len(parts) > 1 else parts[0]
        for parts in (
            [_same_rank(a, angles) for a in angles],
            [_same_rank(f, factors) for f in factors],
        )
    ]


def _same_rank(part, parts):
    shape = np.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return np.broadcast_to(part, (*shape, part.shape[-1]))


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


# State


def reset(rope):
    rope.reset_parameters()
    return rope


CONVERSIONS = {
    "bfloat16": lambda rope: rope.to(torch.bfloat16),
    "half, deepcopy, float": lambda rope: copy.deepcopy(rope.half()).float(),
    "double": lambda rope: rope.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda rope: pickle.loads(pickle.dumps(rope.bfloat16())),
    "meta": lambda rope: reset(rope.to("meta").to_empty(device="cpu")),
    "bfloat16 on meta": lambda rope: reset(rope.to("meta").bfloat16().to_empty(device="cpu")),
}
MODELS = {
    "fixed": {},
    "learned": {"learned_freq": True},
    "xpos": {"use_xpos": True},
    "learned xpos": {"learned_freq": True, "use_xpos": True, "interpolate_factor": 3.0},
    "learned pixel": {"learned_freq": True, "freqs_for": "pixel"},
    "constant": {"freqs_for": "constant", "num_freqs": 4, "interpolate_factor": 1.5},
    "custom": {"custom_freqs": torch.tensor([0.9, 0.1, -0.04, 0.0017])},
}
any_model = pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)


def everything(rope):
    heads = normal(2, 3, 9, 10)
    found = [*rope.rotate(heads, heads, offset=3000), rope(torch.arange(7))]
    found += rope.rotate_queries_and_keys(heads, heads)
    return [*found, rope.get_axial_freqs(3, 4, offsets=(0.25, 7))]


@any_model
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_no_conversion_changes_a_number(arguments, convert):
    expected = everything(RotaryEmbedding(8, **arguments))
    rope = convert(RotaryEmbedding(8, **arguments))
    for actual, before in zip(everything(rope), expected, strict=True):
        assert torch.equal(actual, before)
    for name, tensor in rope.state_dict().items():
        assert (name, tensor.dtype) == ("freqs", torch.float32)


@any_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_made_on_meta_is_the_model_made_here(arguments, dtype):
    with torch.device("meta"):
        rope = RotaryEmbedding(8, **arguments).to(dtype)
    assert all(tensor.is_meta for tensor in (*rope.parameters(), *rope.buffers()))
    rope = reset(rope.to_empty(device="cpu"))
    for actual, expected in zip(
        everything(rope), everything(RotaryEmbedding(8, **arguments)), strict=True
    ):
        assert torch.equal(actual, expected)


def trained(arguments, seed=5):
    """A model of theirs whose frequencies were moved by training, if they can be."""
    other = theirs(dim=8, **arguments)
    if other.learned_freq:
        with torch.no_grad():
            other.freqs.add_(0.01 * normal(4, seed=seed))
    return other


def assert_same_rotation(rope, other, offset=50, relative=12 * ROUNDING):
    x = normal(2, 3, 9, 12)
    scale = {"scale": 1.0} if rope.use_xpos else {}
    actual = rope.rotate_queries_or_keys(x, offset=offset, **scale)
    expected = other.rotate_queries_or_keys(x, offset=offset, **scale)
    freqs = other.freqs.detach().double().numpy()
    angles = np.outer(offset + np.arange(9), freqs) / other.interpolate_factor
    assert_within(actual, expected, allowed(x, angles, relative=relative))


@any_model
def test_state_goes_from_theirs_to_ours_and_back(arguments):
    other = trained(arguments)
    rope = RotaryEmbedding(8, **arguments)
    rope.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(rope.freqs.detach(), other.freqs.detach())
    assert_same_rotation(rope, other)
    back = theirs(dim=8, **arguments)
    back.load_state_dict(rope.state_dict(), strict=True)
    assert torch.equal(back.freqs, other.freqs)
    assert_same_rotation(rope, back)


@any_model
def test_our_trained_state_serves_theirs(arguments):
    rope = RotaryEmbedding(8, **arguments)
    if rope.learned_freq:
        with torch.no_grad():
            rope.freqs.mul_(1.07)
    other = theirs(dim=8, **arguments)
    other.load_state_dict(rope.state_dict(), strict=True)
    assert_same_rotation(rope, other)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("use_xpos", [False, True])
def test_fixed_frequencies_take_what_theirs_was_trained_to(factor, use_xpos):
    arguments = {"interpolate_factor": factor, "use_xpos": use_xpos}
    other, rope = trained(arguments | {"learned_freq": True}), RotaryEmbedding(8, **arguments)
    rope.load_state_dict(other.state_dict(), strict=True)
    assert not list(rope.parameters())
    for same in (rope, copy.deepcopy(rope).half(), reset(rope)):
        assert_same_rotation(same, other)
    angles = np.outer(np.arange(3), other.freqs.detach().double().numpy())
    assert_within(rope(torch.arange(3)), angles.repeat(2, -1), 1.01 * ROUNDING * (1 + angles.max()))


def narrow_state(dim, dtype):
    """A checkpoint of theirs that was cast, and a rotation to judge what is made of it."""
    state = theirs(dim=dim, theta=500000.0).to(dtype).state_dict()
    freqs, x = frequencies(dim, theta=500000.0), normal(1, 9, dim)
    return state, freqs, x, np.outer(5000 + np.arange(9), freqs)


@pytest.mark.parametrize("dim", [8, 128])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_a_narrow_checkpoint_of_theirs_costs_no_precision(dim, dtype, assign):
    state, _, x, angles = narrow_state(dim, dtype)
    rope = RotaryEmbedding(dim, theta=500000.0)
    rope.load_state_dict(state, assign=assign)
    actual = rope.rotate_queries_or_keys(x, offset=5000)
    assert_within(actual, turned(x, angles), allowed(x, angles))


@pytest.mark.parametrize("dim", [8, 128])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_checkpoint_made_after_a_narrow_one_is_not_narrow(dim, dtype):
    state, freqs, x, angles = narrow_state(dim, dtype)
    first, second = (RotaryEmbedding(dim, theta=500000.0) for _ in range(2))
    first.load_state_dict(state)
    second.load_state_dict(first.state_dict())
    for rope in (first, second):
        actual = rope.rotate_queries_or_keys(x, offset=5000)
        assert_within(actual, turned(x, angles), allowed(x, angles))
        np.testing.assert_allclose(rope.freqs, freqs, rtol=1.01 * ROUNDING)


def test_a_narrow_checkpoint_of_trained_frequencies_is_taken_as_it_is():
    other = trained({"learned_freq": True}).half()
    rope = RotaryEmbedding(8, learned_freq=True)
    rope.load_state_dict(other.state_dict())
    assert rope.freqs.dtype == torch.float32
    assert torch.equal(rope.freqs.detach(), other.freqs.detach().float())
    assert_same_rotation(rope, other.float())


# Learned frequencies

WAYS = {
    "one": lambda m, x: m.rotate_queries_or_keys(x, offset=20, scale=1.0),
    "cached": lambda m, x: m.rotate_queries_with_cached_keys(x[:, :, -3:], x[:, :1].flip(-1)),
    "whole": lambda m, x: m.rotate_queries_and_keys(x, x[:, :1].flip(-1)),
    "angles": lambda m, x: m(x[0, 0, :, 0]),
    "axial": lambda m, x: m.get_axial_freqs(*x.shape[1:3], offsets=(2, 5)),
}


def gradient(rope, way):
    found = WAYS[way](rope, normal(2, 3, 9, 10))
    found = [found] if isinstance(found, torch.Tensor) else found
    upstream = [normal(*x.shape, seed=7 + n) for n, x in enumerate(found)]
    sum((x * u).sum() for x, u in zip(found, upstream, strict=True)).backward()
    return rope.freqs.grad


@pytest.mark.parametrize("freqs_for", ["lang", "pixel", "constant"])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_learned_frequencies_is_theirs(freqs_for, way):
    use_xpos = way == "whole"  # theirs takes whole sequences with xPos alone
    arguments = {"freqs_for": freqs_for, "num_freqs": 4, "interpolate_factor": 1.5}
    arguments |= {"use_xpos": use_xpos, "learned_freq": True}
    expected = gradient(theirs(dim=8, **arguments), way)
    actual = gradient(RotaryEmbedding(8, **arguments), way)
    assert expected.abs().min() > 0.1
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * size)


@laws
@given(
    cases(smallest_dim=2, learned=st.just(True)),
    offsets,
    layouts,
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_gradient_of_learned_frequencies_is_the_slope_of_truth(case, offset, layout, dtype):
    rope = RotaryEmbedding(**case.config, layout=layout)
    x, upstream = case.heads(dtype=dtype), case.heads(seed=1, dtype=dtype)
    (rope.rotate_queries_or_keys(x, case.given, offset) * upstream).sum().backward()
    freqs, positions = rope.freqs.detach().double().numpy(), offset + np.arange(case.length)
    step = 1e-5 / positions.max(initial=1)
    slopes = (
        turned(x, case.angles(positions, freqs + step), layout=layout)
        - turned(x, case.angles(positions, freqs - step), layout=layout)
    ) / (2 * step)
    products = torch.from_numpy(slopes * upstream.double().numpy()).flatten(0, -2)
    both = channels_of_pairs(products, len(freqs), 0, layout)
    expected = (both[0] + both[1]).sum(0)
    size = sum(part.abs().sum(0) for part in both)
    assert torch.all((rope.freqs.grad.double() - expected).abs() <= 2e-6 * size + 1e-7)


@any_model
def test_every_parameter_gets_a_gradient_and_fixed_models_have_none(arguments):
    rope, x = RotaryEmbedding(8, **arguments), normal(1, 2, 5, 8)
    parameters = dict(rope.named_parameters())
    assert list(parameters) == (["freqs"] if arguments.get("learned_freq") else [])
    for rotate in (rope.rotate, rope.rotate_queries_and_keys, rope.rotate_queries_with_cached_keys):
        rope.zero_grad()
        q, k = rotate(x, x)
        if parameters:
            (q * k.detach().flip(-1)).sum().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert torch.all(parameter.grad.isfinite())
            assert torch.all(parameter.grad != 0)


def test_learned_frequencies_are_trained_in_their_own_precision():
    """Theirs in bfloat16 would lose small steps of its frequencies."""
    rope, x = (
        RotaryEmbedding(8, learned_freq=True).bfloat16(),
        normal(1, 9, 8, dtype=torch.bfloat16),
    )
    before = rope.freqs.detach().clone()
    optimizer = torch.optim.SGD(rope.parameters(), lr=1e-6)
    rope.rotate_queries_or_keys(x).float().square().mul(normal(1, 9, 8, seed=1)).sum().backward()
    optimizer.step()
    moved = (rope.freqs.detach() - before).abs()
    assert rope.freqs.dtype == torch.float32
    assert torch.all(moved[1:] > 0)
    assert torch.all(moved < 1e-3)


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
