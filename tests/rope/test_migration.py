"""Models of rotary-embedding-torch go on with ours: same numbers, same names, same optimizer."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from drop_in import NARROW, allowed, assert_within, frequencies, normal, turned
from rotary_embedding_torch import RotaryEmbedding as Theirs
from selection import slow_unless
from torch import nn

from rope_export import RotaryEmbedding, replace_rotary_embeddings

DIM, LENGTH = 16, 24


class Layer(nn.Module):
    """What users wrote around it."""

    def __init__(self, rope: nn.Module, *, xpos: bool = False) -> None:
        super().__init__()
        self.rope, self.xpos = rope, xpos
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.mix(x)
        if self.xpos:
            q, k = self.rope.rotate_queries_and_keys(q, x)
        else:
            q, k = (self.rope.rotate_queries_or_keys(t) for t in (q, x))
        return nn.functional.scaled_dot_product_attention(q, k, x)


def inputs(seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(2, 3, length, DIM, generator=torch.Generator().manual_seed(seed))


VARIANTS = {
    "plain": {},
    "another base": {"theta": 500.0},
    "rescaled base": {"theta_rescale_factor": 4.0},
    "interpolated": {"interpolate_factor": 2.0},
    "pixel": {"freqs_for": "pixel", "max_freq": 5},
    "constant": {"freqs_for": "constant", "num_freqs": DIM // 2},
    "learned": {"learned_freq": True},
    "xPos": {"use_xpos": True, "xpos_scale_base": 64},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_computes_what_it_computed(variant):
    torch.manual_seed(0)
    options = VARIANTS[variant]
    model = nn.Sequential(Layer(Theirs(DIM, **options), xpos=options.get("use_xpos", False)))
    expected = model(inputs()).detach()
    names = list(model.state_dict())
    assert replace_rotary_embeddings(model) == ["0.rope"]
    assert isinstance(model[0].rope, RotaryEmbedding)
    assert list(model.state_dict()) == names
    # Their angles are float32 products, up to 188 radians where frequencies are those of pixels.
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)


def test_frequencies_that_were_trained_are_kept_and_trained_on():
    torch.manual_seed(0)
    model = Layer(Theirs(DIM, learned_freq=True))
    with torch.no_grad():
        model.rope.freqs.mul_(1.25)
    trained = model.rope.freqs.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = copy.deepcopy(model)
    replace_rotary_embeddings(model)
    assert torch.equal(model.rope.freqs, trained)
    for each in (model, expected):
        each(inputs()).square().sum().backward()
    torch.testing.assert_close(
        model.rope.freqs.grad, expected.rope.freqs.grad, rtol=1e-4, atol=1e-5
    )
    optimizer.step()
    assert not torch.equal(model.rope.freqs, trained)


def test_what_is_shared_stays_shared_and_heads_may_come_after_the_sequence():
    rope = Theirs(DIM, seq_before_head_dim=True)
    model = nn.ModuleDict({"a": nn.ModuleList([rope]), "b": rope, "own": Theirs(DIM)})
    x = inputs().transpose(1, 2)
    expected = copy.deepcopy(rope).rotate_queries_or_keys(x)
    assert replace_rotary_embeddings(model.eval()) == ["b", "own", "a.0"]
    assert model["b"] is model["a"][0]
    assert model["b"] is not model["own"]
    assert not model["b"].training
    torch.testing.assert_close(model["b"].rotate_queries_or_keys(x), expected)
    assert replace_rotary_embeddings(model) == []


def test_it_exports_right_at_lengths_it_never_saw_even_after_warm_calls():
    torch.manual_seed(0)
    model = Layer(Theirs(DIM)).eval()
    model(inputs())  # theirs would bake in what it cached here
    long = inputs(1, 3 * LENGTH)
    expected = copy.deepcopy(model)(long)
    replace_rotary_embeddings(model)
    length = torch.export.Dim("length", max=4096)
    program = torch.export.export(model, (inputs(),), dynamic_shapes=({2: length},))
    torch.testing.assert_close(program.module()(long), expected, rtol=1e-5, atol=1e-6)


# Models that were cast


CASTS = {
    "float16": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float16 and back": lambda m: m.half().float(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "bfloat16, then float16": lambda m: m.bfloat16().half(),
    "float16 and on to float64": lambda m: m.half().double(),
}
casts = pytest.mark.parametrize(
    "cast", slow_unless(lambda cast: cast in ("float16 and back", "bfloat16"), CASTS)
)
TOLD = {
    "plain": {},
    "interpolated": {"interpolate_factor": 2.5},
    "Llama 3's base": {"theta": 500000},
    "Qwen's base": {"theta": 1e6},
    "a small base": {"theta": 100.0},
    "two digits": {"theta": 160000},
    "a power of two": {"theta": 1024},
    "rescaled base": {"theta_rescale_factor": 4.0},
    "pixel": {"freqs_for": "pixel"},
    "pixel of their README": {"freqs_for": "pixel", "max_freq": 256},
    "pixel of ImageNet": {"freqs_for": "pixel", "max_freq": 224},
    "constant": {"freqs_for": "constant", "num_freqs": 16},
    "xPos": {"use_xpos": True},
}


def cast_and_replaced(cast, **arguments):
    model = nn.ModuleDict({"rope": Theirs(**arguments)})
    model["rope"].rotate_queries_or_keys(normal(1, 4, 256), scale=1.0)  # which is cached
    CASTS[cast](model)
    stored = model["rope"].freqs.detach().double()
    assert replace_rotary_embeddings(model) == ["rope"]
    return model["rope"], stored


def assert_exact(rope, freqs, factor=1.0):
    """At position 6000 the rounding of float16 is 3 radians, of bfloat16 a number of turns."""
    np.testing.assert_allclose(rope.inv_freq * factor, freqs, rtol=1e-12)
    x, positions = normal(1, 9, 2 * len(freqs)), 6000 + np.arange(9)
    angles = np.outer(positions / factor, freqs)
    actual = rope.rotate_queries_or_keys(x, offset=6000, scale=1.0)
    assert_within(actual, turned(x, angles), allowed(x, angles))


@casts
@pytest.mark.parametrize("kind", TOLD)
def test_a_model_that_was_cast_gets_exact_frequencies(kind, cast):
    arguments = TOLD[kind]
    freqs = frequencies(**{"dim": 32, "freqs_for": "lang"} | arguments)
    rope, _ = cast_and_replaced(cast, dim=32, **arguments)
    assert_exact(rope, freqs, arguments.get("interpolate_factor", 1.0))
    assert rope.freqs.dtype == torch.float32


@casts
@pytest.mark.parametrize("dim", [4, 8, 64, 128])  # theirs divides by dim - 2
def test_the_default_is_told_of_any_width(dim, cast):
    rope, _ = cast_and_replaced(cast, dim=dim)
    assert_exact(rope, frequencies(dim, freqs_for="lang"))
    assert rope.theta == 10000.0


UNTOLD = [
    {"theta": 501.37},
    {"theta": 10090.0},
    {"theta": 123456.0},
    {"freqs_for": "pixel", "max_freq": 22.4},
]


@casts
@pytest.mark.parametrize("arguments", UNTOLD, ids=str)
def test_a_base_that_nobody_can_tell_is_not_guessed(arguments, cast):
    name, value = list(arguments.items())[-1]
    with pytest.warns(UserWarning, match=rf"^rope\.freqs stay .* any {name} in .* cast") as said:
        rope, stored = cast_and_replaced(cast, dim=64, **arguments)
    least, most = str(said[0].message).partition(f"{name} in ")[2].partition(";")[0].split(" … ")
    assert float(least) <= value <= float(most)
    np.testing.assert_array_equal(rope.inv_freq, stored)


def test_round_bases_that_round_alike_are_not_told_apart():
    """8192 and 8200 give the same eight frequencies in bfloat16, up to one."""
    with pytest.warns(UserWarning, match="any theta in"):
        rope, stored = cast_and_replaced("bfloat16", dim=16, theta=8192)
    np.testing.assert_array_equal(rope.inv_freq, stored)


CUSTOM = {
    "any": [0.9, 0.123, 0.04, 0.0017, 0.3],
    "negative": [1.0, -0.123, 0.04, -0.0017],
    "a series but for one": [*(10000.0 ** -(np.arange(7) / 8)), 0.5],
    "a series that does not begin at 1": list(2 * 10000.0 ** -(np.arange(8) / 8)),
    "too few to tell": [1.0, 0.123],
    "zeros": [0.0, 0.0, 0.0, 0.0],
}


@casts
@pytest.mark.parametrize("kind", CUSTOM)
def test_custom_frequencies_are_those_that_were_there(kind, cast):
    given = torch.tensor(CUSTOM[kind], dtype=torch.float32)
    rope, stored = cast_and_replaced(cast, dim=2 * len(given), custom_freqs=given)
    np.testing.assert_array_equal(rope.inv_freq, stored)


@pytest.mark.parametrize("arguments", [{}, {"theta": 501.37}, {"theta": 500000}], ids=str)
def test_frequencies_that_were_not_rounded_stay_what_they_were(arguments):
    model = nn.ModuleDict({"rope": Theirs(64, **arguments)})
    stored = model["rope"].freqs.detach().double()
    replace_rotary_embeddings(model)
    np.testing.assert_array_equal(model["rope"].inv_freq, stored)


@casts
def test_learned_frequencies_are_what_was_trained(cast):
    model = CASTS[cast](nn.ModuleDict({"rope": Theirs(32, learned_freq=True)}))
    trained = model["rope"].freqs
    replace_rotary_embeddings(model)
    assert model["rope"].freqs is trained


# The same, stored


@casts
@pytest.mark.parametrize("kind", ["plain", "Llama 3's base", "pixel of their README"])
@pytest.mark.parametrize("known", [True, False])
def test_a_checkpoint_that_was_cast_gets_exact_frequencies(kind, known, cast):
    """Whether or not the module was made with the checkpoint's base."""
    arguments = {"dim": 32, "freqs_for": "lang"} | TOLD[kind]
    state = CASTS[cast](Theirs(**arguments)).state_dict()
    made = arguments if known else {"dim": 32, "freqs_for": arguments["freqs_for"]}
    rope = RotaryEmbedding(**made)
    rope.load_state_dict(state)
    assert_exact(rope, frequencies(**arguments))
    again = RotaryEmbedding(**made)
    again.load_state_dict(rope.state_dict())
    np.testing.assert_allclose(again.freqs, frequencies(**arguments), rtol=1e-6)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_checkpoint_of_another_base_that_nobody_can_tell_is_taken_as_it_is(dtype):
    state = {f"0.{k}": v for k, v in Theirs(64, theta=501.37).to(dtype).state_dict().items()}
    model = nn.Sequential(RotaryEmbedding(64))
    with pytest.warns(
        UserWarning, match=r"^0\.freqs are taken as they are: .* give the module the"
    ):
        model.load_state_dict(state)
    np.testing.assert_array_equal(model[0].inv_freq, state["0.freqs"].double())
    model = nn.Sequential(RotaryEmbedding(64, theta=501.37))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)
    assert_exact(model[0], frequencies(64, theta=501.37, freqs_for="lang"))
