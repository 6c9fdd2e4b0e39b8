"""State and learned frequencies are those of rotary-embedding-torch, in full precision."""

import copy
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from drop_in import (
    NARROW,
    ROUNDING,
    allowed,
    assert_within,
    cases,
    channels_of_pairs,
    frequencies,
    laws,
    layouts,
    normal,
    offsets,
    theirs,
    turned,
)
from hypothesis import given

from rope_export import RotaryEmbedding

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
