"""Models of rotary-embedding-torch go on with ours: same numbers, same names, same optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding as Theirs
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
