"""Rotating pairs of channels, against complex numbers and against the laws of RoPE."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import slow_unless

from rope_export.rope import pairs
from rope_export.rope.pairs import LAYOUTS, join_pairs, rotate_pairs, split_pairs

# Derandomized: every run tries the same examples, and none is stored on disk.
laws = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
half_widths = st.integers(1, 9)
positions = st.integers(0, 10**6)
thetas = st.floats(1.5, 1e7)


def complex_product(x, factors, layout):
    """Multiply ``first + i * second`` of every pair by a complex factor, in float64."""
    x, half = x.double().numpy().copy(), factors.shape[-1]
    if layout == "half":
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = (x[..., first] + 1j * x[..., second]) * factors
    x[..., first], x[..., second] = turned.real, turned.imag
    return x


def complex_rotation(x, angles, layout):
    return complex_product(x, np.exp(1j * angles), layout)


def rotated(x, angles, layout):
    return rotate_pairs(x, angles.cos(), angles.sin(), layout=layout)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "half"), [(2, 1), (8, 4), (8, 2), (7, 3), (10, 1)])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str
)
def test_pairs_turn_as_complex_numbers_do(layout, head_dim, half, dtype, atol):
    x = normal(2, 3, 5, head_dim, dtype=dtype)
    angles = 10 * normal(5, half, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    actual = rotate_pairs(x, cos, sin, layout=layout)
    assert actual.dtype == dtype
    expected = complex_rotation(x, angles.numpy(), layout)
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=atol)
    assert torch.equal(actual[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow_tables", [False, True])
def test_narrow_inputs_are_turned_in_float32_and_rounded_once(layout, dtype, narrow_tables):
    x = normal(2, 3, 64, 20, dtype=dtype)
    angles = 10 * normal(64, 8, seed=1)
    cos, sin = (
        t.to(dtype if narrow_tables else torch.float32) for t in (angles.cos(), angles.sin())
    )
    actual = rotate_pairs(x, cos, sin, layout=layout)
    assert actual.dtype == dtype
    factors = cos.double().numpy() + 1j * sin.double().numpy()
    exact = torch.from_numpy(complex_product(x, factors, layout))
    # A product rounded to half precision on the way would miss every second entry.
    assert (actual == exact.to(dtype)).double().mean() > 0.995
    spacing = torch.finfo(dtype).eps
    assert torch.all((actual.double() - exact).abs() <= spacing * exact.abs().clamp(min=1e-2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "angle_shape"),
    [
        ((4, 6), (4, 3)),
        ((5, 4, 6), (4, 3)),
        ((2, 5, 4, 6), (1, 1, 4, 3)),
        ((2, 5, 4, 6), (2, 1, 4, 3)),
        ((2, 5, 1, 6), (3,)),
    ],
    ids=str,
)
def test_angles_broadcast_over_batch_and_heads(layout, shape, angle_shape):
    x, angles = normal(*shape), normal(*angle_shape, seed=1)
    expected = complex_rotation(x, angles.numpy(), layout)
    assert rotated(x, angles, layout).shape == shape
    np.testing.assert_allclose(rotated(x, angles, layout).numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_the_input_stays(layout):
    x = normal(6, 5, 3, 2).permute(3, 2, 1, 0)
    angles = normal(3, 5, seed=1).T
    before = x.clone()
    actual = rotated(x, angles, layout)
    expected = complex_rotation(before, angles.numpy(), layout)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-14)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_rotation_back(layout):
    x, angles, upstream = normal(2, 3, 5, 7), normal(5, 3, seed=1), normal(2, 3, 5, 7, seed=2)
    x.requires_grad_()
    rotated(x, angles, layout).backward(upstream)
    expected = complex_rotation(upstream, -angles.numpy(), layout)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=0, atol=1e-14)


def angles_at(position, half, theta):
    exponents = torch.arange(half, dtype=torch.float64) / half
    return position * theta**-exponents


@laws
@given(seeds, layouts, half_widths, st.integers(0, 5), positions, thetas)
def test_a_rotation_keeps_the_norm(seed, layout, half, passed, position, theta):
    x = normal(3, 2 * half + passed, seed=seed)
    turned = rotated(x, angles_at(position, half, theta), layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)


@laws
@given(seeds, layouts, half_widths, positions, positions, thetas)
def test_rotations_compose_by_adding_positions(seed, layout, half, first, second, theta):
    x = normal(3, 2 * half + 1, seed=seed)
    twice = rotated(
        rotated(x, angles_at(first, half, theta), layout), angles_at(second, half, theta), layout
    )
    once = rotated(x, angles_at(first + second, half, theta), layout)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-8)  # angles reach 2e6: 2e-10 each


@laws
@given(seeds, layouts, half_widths, positions, thetas)
def test_the_opposite_rotation_leads_back(seed, layout, half, position, theta):
    x, angles = normal(3, 2 * half, seed=seed), angles_at(position, half, theta)
    torch.testing.assert_close(
        rotated(rotated(x, angles, layout), -angles, layout), x, rtol=0, atol=1e-14
    )
    assert torch.equal(rotated(x, angles_at(0, half, theta), layout), x)


@laws
@given(
    seeds,
    layouts,
    half_widths,
    st.integers(0, 4096),
    st.integers(0, 4096),
    st.integers(1, 10**6),
    thetas,
)
def test_a_score_depends_only_on_the_distance(seed, layout, half, query, key, shift, theta):
    q, k = normal(2, 2 * half, seed=seed)

    def score(query_position, key_position):
        turned_q = rotated(q, angles_at(query_position, half, theta), layout)
        return turned_q @ rotated(k, angles_at(key_position, half, theta), layout)

    torch.testing.assert_close(
        score(query + shift, key + shift), score(query, key), rtol=0, atol=1e-7
    )


@laws
@given(seeds, half_widths, st.integers(0, 3), positions, thetas)
def test_the_layouts_differ_by_a_permutation_of_channels(seed, half, passed, position, theta):
    x, angles = normal(3, 2 * half + passed, seed=seed), angles_at(position, half, theta)
    # Interleaved channel 2i is half channel i, and 2i + 1 is i + half.
    order = [i + side * half for i in range(half) for side in (0, 1)]
    order += range(2 * half, 2 * half + passed)
    assert torch.equal(
        rotated(x, angles, "half")[:, order], rotated(x[:, order], angles, "interleaved")
    )


# Whoever runs it

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-13}


def angles_of(length, half, dtype):
    angles = 10 * normal(length, half, seed=1)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(kept), angles.sin().to(kept)


# bfloat16 is turned in words of two where strides and widths let it be: everything with everything.
CALLS = [
    (mode, dtype, head_dim, transposed)
    for mode in ("eager", "dynamic")
    for dtype in ROUNDING
    for head_dim in (16, 18)
    for transposed in (False, True)
    if mode == "eager" or dtype == torch.bfloat16 or transposed == (head_dim == 18)
]
Call = tuple[str, torch.dtype, int, bool]  # layout, dtype, width, whether tokens come first


def given_of(call: Call):
    """Heads, what their gradient comes from, and angles."""
    _, dtype, head_dim, transposed = call
    shape = (2, 12, 3, head_dim) if transposed else (2, 3, 12, head_dim)
    x, upstream = (normal(*shape, seed=seed, dtype=dtype) for seed in (2, 3))
    if transposed:
        x, upstream = x.transpose(1, 2), upstream.transpose(1, 2)
    return x.requires_grad_(), upstream, *angles_of(12, 8, dtype)


# A C++ compiler takes its time: by default it makes words of two, the case with most to get wrong.
BY_DEFAULT = ("interleaved", torch.bfloat16, 16, False)


@pytest.mark.parametrize(
    ("layout", "mode", "dtype", "head_dim", "transposed"),
    slow_unless(
        lambda layout, mode, *call: mode == "eager" or (layout, *call) == BY_DEFAULT,
        [(layout, *call) for layout in LAYOUTS for call in CALLS],
    ),
    ids=str,
)
def test_values_and_gradients_are_exact_in_every_mode(layout, dtype, head_dim, transposed, mode):
    x, upstream, cos, sin = given_of((layout, dtype, head_dim, transposed))

    def turn(x, cos, sin):
        return rotate_pairs(x, cos, sin, layout=layout)

    if mode != "eager":
        torch.compiler.reset()
        turn = torch.compile(turn, fullgraph=True, dynamic=mode == "dynamic")
    turned = turn(x, cos, sin)
    (gradient,) = torch.autograd.grad(turned, x, upstream)
    assert turned.dtype == gradient.dtype == dtype
    factors = (cos + 1j * sin).numpy()
    for got, source, by in ((turned, x, factors), (gradient, upstream, factors.conj())):
        exact = torch.from_numpy(complex_product(source.detach(), by, layout))
        # Where the two products of a pair cancel, what is left is their own rounding.
        atol = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got.detach().double(), exact, rtol=ROUNDING[dtype], atol=atol)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bfloat16_is_rounded_to_nearest_even_and_keeps_what_is_no_number(layout, mode):
    values = [float("nan"), float("inf"), -float("inf"), 3.3e38, 1e-40, -0.0, 1.0, 1.00390625]
    x = torch.tensor(values).bfloat16().repeat(12, 2)
    cos, sin = torch.ones(12, 8), torch.zeros(12, 8)
    cos[1:], sin[1:] = angles_of(11, 8, torch.float32)
    turn = torch.compile(rotate_pairs, fullgraph=True) if mode == "compiled" else rotate_pairs
    a, b = split_pairs(x.float(), 8, layout)
    exact = join_pairs(a * cos - b * sin, b * cos + a * sin, layout).bfloat16()
    actual = turn(x, cos, sin, layout=layout)
    torch.testing.assert_close(actual, exact, rtol=0, atol=0, equal_nan=True)


def test_words_need_no_alignment():
    flat = normal(2 * 3 * 12 * 16 + 1, dtype=torch.bfloat16)
    x, (cos, sin) = flat[1:].view(2, 3, 12, 16), angles_of(12, 8, torch.bfloat16)
    turn = torch.compile(rotate_pairs, fullgraph=True)
    for heads in (x, x.clone()):
        actual = turn(heads, cos, sin, layout="interleaved")
        exact = complex_product(x, (cos + 1j * sin).numpy(), "interleaved")
        torch.testing.assert_close(
            actual.double(), torch.from_numpy(exact), rtol=2**-8 + 1e-6, atol=1e-6
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_input_is_turned_block_by_block_as_a_whole(layout, monkeypatch):
    x, (cos, sin) = normal(2, 3, 13, 10, dtype=torch.bfloat16), angles_of(13, 4, torch.bfloat16)
    exact = complex_product(x, (cos + 1j * sin).numpy(), layout)
    monkeypatch.setattr(pairs, "_BLOCK", 2 * 3 * 10 * 4)  # four tokens: 13 is no multiple
    for tables in ((cos, sin), (cos.expand(2, 1, 13, 4), sin.expand(2, 1, 13, 4))):
        actual = rotate_pairs(x, *tables, layout=layout)
        np.testing.assert_allclose(actual.double().numpy(), exact, rtol=2**-8 + 1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_function_transforms_see_through(layout):
    x, (cos, sin) = normal(2, 1, 5, 10), angles_of(5, 4, torch.float64)
    factors = (cos + 1j * sin).numpy()

    def turn(x):
        return rotate_pairs(x, cos, sin, layout=layout)

    exact = torch.from_numpy(complex_product(x, factors, layout))
    for actual in (torch.vmap(turn)(x), torch.func.jvp(turn, (x,), (x,))[1]):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-14)
    jacobian = torch.func.jacrev(turn)(x)
    torch.testing.assert_close(jacobian, torch.func.jacfwd(turn)(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.einsum("bhsdxyzw,xyzw->bhsd", jacobian, x), exact)
    of_tables = torch.vmap(lambda c, s: rotate_pairs(x, c, s, layout=layout))
    stacked = of_tables(torch.stack((cos, sin)), torch.stack((sin, -cos)))
    torch.testing.assert_close(stacked[0], exact, rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda x: turn(x).sin(), (x.requires_grad_(),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_angles_can_be_trained(layout):
    x, (cos, sin) = normal(1, 2, 5, 10), angles_of(5, 4, torch.float64)

    def turned(cos, sin):
        return rotate_pairs(x, cos, sin, layout=layout)

    assert torch.autograd.gradcheck(turned, (cos.requires_grad_(), sin.requires_grad_()))
    by_transform = torch.func.grad(lambda c: (turned(c, sin.detach()) ** 3).sum())(cos.detach())
    (by_autograd,) = torch.autograd.grad((turned(cos, sin) ** 3).sum(), cos)
    torch.testing.assert_close(by_transform, by_autograd)
    assert by_autograd.abs().min() > 0
